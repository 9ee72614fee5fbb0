"""The optimiser that every stage uses: AdamW, linear warm-up, cosine to zero, no decay on vectors."""

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def adamw_warmup_cosine(
    parts: list[tuple[Iterable[nn.Parameter], float]],
    weight_decay: float,
    warmup_steps: int,
    total_steps: int,
    falls_from: int = 0,
) -> dict:
    """Lightning's optimiser configuration, stepped every optimiser step.

    Args:
        parts: Parameters, of which those that take gradients are trained, and their peak rate.
        weight_decay: AdamW's decay of matrices; biases, norms and other vectors are not decayed.
        warmup_steps: Steps of linear warm-up.
        total_steps: Step at which the cosine reaches zero; later steps stay there.
        falls_from: Step at which the cosine begins, if that is after the warm-up.
    """
    groups = []
    for parameters, rate in parts:
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        groups.append({"params": [p for p in trained if p.ndim > 1], "lr": rate, "weight_decay": weight_decay})
        groups.append({"params": [p for p in trained if p.ndim <= 1], "lr": rate, "weight_decay": 0.0})
    groups = [group for group in groups if group["params"]]
    sharded = any(isinstance(parameter, DTensor) for group in groups for parameter in group["params"])
    optimizer = torch.optim.AdamW(groups, foreach=False if sharded else None)  # no list holds sharded and whole ones
    falls_from = max(warmup_steps, falls_from)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min(1.0, max(0, step - falls_from) / max(1, total_steps - falls_from))
        return 0.5 * (1 + math.cos(math.pi * progress))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
