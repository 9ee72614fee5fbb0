"""What a fit configuration asks for, as far as memory and time depend on it."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from lab.errors import LabError
from lab.model.core_seg import CoreSegConfig
from lab.model.release import from_plain, read_checkpoint

QUERY_TOKENS = {"small": 20, "checkpoint": 48}
"""About; of the latter half are the chat template."""


@dataclass(frozen=True)
class Job:
    """A training run: the batch is that of all processes, or, from `share`, of one."""

    stage: Literal["sft", "grpo"]
    core_seg: CoreSegConfig = field(hash=False)
    asked: tuple[int, ...]
    """Of each image in a batch, how many records ask about it; the encoders see it once."""
    query_tokens: int
    """Of the longest prompt, beside the visual tokens: query and chat template."""
    answer_tokens: int
    """Of the longest completion, `max_new_tokens`: the worst case."""
    steps: int
    """Optimiser steps, `trainer.max_steps`."""
    lora_rank: int
    bf16: bool
    """Training passes run with bfloat16 autocast."""
    weights: torch.dtype
    """Of the vision language model, `reasoner.dtype`; LoRA and all else are float32."""
    checkpointing: bool
    """The language model's activations are computed again in the backward pass, not kept."""
    trains_encoders: bool = False
    own_text: float = 0.0
    """Stage 1: share of steps that sample."""
    group_size: int = 1
    """Stage 2: completions an image."""
    inner_steps: int = 1
    beta: float = 0.0
    accumulate: int = 1
    """Batches an optimiser step."""

    @property
    def images(self) -> int:
        return len(self.asked)

    @property
    def records(self) -> int:
        return sum(self.asked)

    @property
    def sampled(self) -> bool:
        return self.stage == "grpo" or self.own_text > 0

    def share(self, world: int) -> "Job":
        """What falls to the process that has most to do, when so many share each batch."""
        return replace(self, asked=tuple(sorted(self.asked, reverse=True)[: -(-self.images // world)]))


def read_job(settings: dict[str, Any], beside: Path) -> Job:
    """The job of a configuration.

    Args:
        settings: `model`, `data` and `trainer` with all defaults filled in, as plain values.
        beside: The configuration's path; where `start` does not exist yet, `sft.yaml` in its folder says what it will
            hold.

    Raises:
        LabError: For another stage, or a start that cannot be known.
    """
    kind, h = settings["model"]["class_path"].rpartition(".")[2], settings["model"]["init_args"]
    if kind not in ("Sft", "Grpo"):
        raise LabError(
            f"core-seg estimate knows modules.sft.Sft and modules.grpo.Grpo, not {kind}; give another config"
        )
    core_seg = h.get("core_seg") or start_of(h, beside)
    config = from_plain(CoreSegConfig, core_seg, f"the model of '{beside}'")
    parts, trainer = settings["data"]["init_args"]["train"], settings["trainer"]
    of_parts = [(part["per_batch"], part.get("queries_per_image", 1)) for part in parts]
    job = Job(
        stage="sft" if kind == "Sft" else "grpo",
        core_seg=config,
        asked=tuple(queries for records, queries in of_parts for _ in range(records // queries)),
        query_tokens=QUERY_TOKENS["small" if config.reasoner.model == "small" else "checkpoint"],
        answer_tokens=h["max_new_tokens"],
        steps=trainer["max_steps"],
        lora_rank=h["lora_rank"] if kind == "Grpo" else config.reasoner.lora_rank,
        bf16=h["bf16"],
        weights=getattr(torch, core_seg["reasoner"].get("dtype", "float32")),
        checkpointing=h.get("gradient_checkpointing", False),
        accumulate=trainer.get("accumulate_grad_batches") or 1,
    )
    if kind == "Sft":
        return replace(job, trains_encoders=h["encoder_learning_rate"] > 0, own_text=h["own_text"])
    return replace(job, group_size=h["group_size"], inner_steps=h["inner_steps"], beta=h["beta"])


def start_of(h: dict[str, Any], beside: Path) -> dict[str, Any]:
    """The model that training starts from, read from the release, the checkpoint or the stage that will make it."""
    start = Path(h["start"])
    if start.is_dir():
        return json.loads((start / "config.json").read_text())["core_seg"]
    if start.is_file():
        return read_checkpoint(start)["hyper_parameters"]["core_seg"]
    stage_1 = beside.parent / "sft.yaml"
    if not stage_1.is_file():
        raise LabError(
            f"{beside}: start '{start}' does not exist, and no sft.yaml beside it says what it will be; train it, or "
            "give --model.init_args.start RELEASE"
        )
    return yaml.safe_load(stage_1.read_text())["model"]["init_args"]["core_seg"]
