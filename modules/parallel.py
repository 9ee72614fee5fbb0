"""Several processes, one run: what they sum, gather and shard, so that together they do what one process would.

Every loss is a share: what a process's rows add to the loss of the whole batch. Sums over processes are then the values
that one process has, for losses, metrics and gradients alike, however unevenly tokens and masks fall to the processes.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor


def several() -> bool:
    """Whether there are other processes."""
    return dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """Which process this is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def gather(values: list) -> list:
    """The lists of all processes one behind the other, on every process: in the order of the whole batch."""
    if not several():
        return values
    lists: list = [None] * dist.get_world_size()
    dist.all_gather_object(lists, values)
    return [value for values in lists for value in values]


def totals(values: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Sums of scalars over all processes, in one message."""
    if not several():
        return values
    together = torch.stack([value.detach().to(device, torch.float64) for value in values.values()])
    dist.all_reduce(together)
    return dict(zip(values, together.float()))


def shares(counts: dict[str, int], device: torch.device) -> dict[str, float]:
    """Which part of all processes' tokens, rows or masks this one has, by name; 0 where there are none at all."""
    whole = totals({name: torch.tensor(count) for name, count in counts.items()}, device)
    return {name: count / max(1, int(whole[name])) for name, count in counts.items()}


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sum the gradients of all processes, once before an optimiser step and in one message.

    Sharded parameters are left out: FSDP sums theirs in the backward pass. A parameter that no process used keeps no
    gradient, as in one process; one that only others used gets theirs.
    """
    if not several():
        return
    whole = [p for p in parameters if p.requires_grad and not isinstance(p, DTensor)]
    used = torch.tensor([float(p.grad is not None) for p in whole], device=whole[0].device)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in whole]
    together = torch.cat([used, *(gradient.float().flatten() for gradient in gradients)])
    dist.all_reduce(together)
    used, *parts = together.split([len(whole), *(p.numel() for p in whole)])
    for parameter, users, part in zip(whole, used.tolist(), parts):
        parameter.grad = part.view_as(parameter).to(parameter.dtype) if users else None


def average_statistics(module: nn.Module) -> None:
    """Make the running statistics of batch norms that train the mean of all processes', in one message."""
    norms = [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.training]
    if not several() or not norms:
        return
    statistics = [values for norm in norms for values in (norm.running_mean, norm.running_var)]
    together = torch.cat(statistics)
    dist.all_reduce(together)
    for values, part in zip(statistics, together.split([len(values) for values in statistics])):
        values.copy_(part / dist.get_world_size())


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> None:
    """As `torch.nn.utils.clip_grad_norm_`, which does not take sharded and whole parameters together."""
    parameters = list(parameters)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not any(isinstance(gradient, DTensor) for gradient in gradients):
        nn.utils.clip_grad_norm_(parameters, limit)
        return
    local = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    squares = [values.float().square().sum() for values in local]
    sharded = torch.stack([square for square, g in zip(squares, gradients) if isinstance(g, DTensor)]).sum()
    dist.all_reduce(sharded)
    whole = sum(square for square, g in zip(squares, gradients) if not isinstance(g, DTensor))
    scale = (limit / ((sharded + whole).sqrt() + 1e-6)).clamp(max=1)
    for values in local:
        values.mul_(scale)


def is_sharded(module: nn.Module) -> bool:
    return any(isinstance(part, FSDPModule) for part in module.modules())


def shard(language_model: nn.Module, mesh: DeviceMesh) -> None:
    """Spread a language model's layers, with their gradients and optimiser states, over the processes (FSDP2).

    Its embeddings, which its head is tied to, stay whole on each process, as do the parts of CORE-Seg around it: they
    are used outside of `forward`, where FSDP does not see it, and are frozen or small.
    """
    embeddings = set(language_model.get_input_embeddings().parameters())
    for part in [*language_model.layers, language_model]:
        fully_shard(part, mesh=mesh, reshard_after_forward=True, ignored_params=embeddings)
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Within, every process holds the whole model, fetched once, and its passes send nothing.

    For answers that are written token by token, and of another length on each process. All processes must enter.
    """
    parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(True, recurse=False)
