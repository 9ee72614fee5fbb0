"""From a traced step to memory and time on given GPUs, by strategy, and what to change when it does not fit.

Memory is traced, time is an estimate: FLOPs and bytes of a step over a stated share of what the GPU's maker states.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import nn

from lab.estimate.job import Job
from lab.estimate.machines import BANDWIDTH_SHARE, LAUNCH, UTILISATION, Machine
from lab.estimate.phases import Phases, trace_phases
from lab.estimate.skeleton import Skeleton

GIB = 2**30
Strategy = Literal["single", "ddp", "deepspeed", "fsdp2"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
USABLE = 0.92
"""Share of a GPU's memory that tensors can fill; the CUDA context, NCCL and fragmentation take the rest."""


@dataclass
class Memory:
    """Bytes on each GPU at the worst moment of a step, by part."""

    weights: float
    """Of all but SAM; under `fsdp2` a share of the language model's layers, and the layer that is at work."""
    gradients: float
    optimiser: float
    """AdamW's two moments; under `deepspeed` a share of them and of a copy of the weights that are trained."""
    sam: float
    """SAM's weights."""
    phases: dict[str, float]
    """What comes on top in each part of the step, with its gradients."""

    @property
    def held(self) -> float:
        """From step to step."""
        return self.weights + self.optimiser + self.sam

    @property
    def peak(self) -> float:
        return self.held + max(self.phases.values())

    @property
    def worst(self) -> str:
        """The part of the step that takes most."""
        return max(self.phases, key=self.phases.get)


@dataclass(frozen=True)
class Traced:
    """A model and a step of one process."""

    phases: Phases
    total: int
    """Parameters."""
    trained: int
    sizes: dict[str, int]
    """Bytes on one process that shards nothing: `weights`, `sam`, `trained`, `layers` (the language model's, which are
    sharded), `layer` (the largest), `trained_layers`."""
    prompt_tokens: int


@dataclass(frozen=True)
class Estimate:
    """What a step of one process needs under a strategy."""

    job: Job
    """The process's share."""
    strategy: Strategy
    machine: Machine
    traced: Traced

    @property
    def tokens(self) -> int:
        """Of a step on this process, prompts and completions."""
        job = self.job
        return job.accumulate * job.records * (self.traced.prompt_tokens + job.group_size * job.answer_tokens)

    @property
    def flops(self) -> float:
        """Of a step on this process, with the encoders."""
        phases, accumulate = self.traced.phases, self.job.accumulate
        return phases.encoding.flops * accumulate + phases.learning.flops + self.samplings * phases.sampling.flops

    @property
    def samplings(self) -> float:
        """How often a step samples, on average."""
        return 1.0 if self.job.stage == "grpo" else self.job.own_text * self.job.accumulate

    @property
    def memory(self) -> Memory:
        """On each GPU."""
        s, phases = self.traced.sizes, self.traced.phases
        weights, trained, fetched = s["weights"], s["trained"], 0.0
        if self.strategy == "fsdp2":  # a layer is whole while it works, and the next is fetched
            elsewhere = 1 - 1 / self.machine.world
            weights += 2 * s["layer"] - s["layers"] * elsewhere
            trained -= s["trained_layers"] * elsewhere
            fetched = s["layers"] * elsewhere - 2 * s["layer"]  # to sample and to validate, the whole model
        optimiser = 3 * trained / self.machine.world if self.strategy == "deepspeed" else 2 * trained
        extra = {
            "encoding images": phases.encoding.peak,
            "sampling": phases.sampling.peak + fetched,
            "learning": phases.learning.peak + trained,
            "the optimiser's step": 2 * trained,  # AdamW over all tensors at once, or the sum over processes
        }
        return Memory(weights, trained, optimiser, s["sam"], extra)

    @property
    def fits(self) -> bool:
        return self.memory.peak <= USABLE * self.machine.gigabytes * GIB

    @property
    def seconds(self) -> dict[str, float]:
        """Of the parts of a step."""
        gpu, job, phases = self.machine.gpu, self.job, self.traced.phases
        fast, slow = UTILISATION * gpu.bf16, UTILISATION * gpu.fp32
        frozen = fast if job.weights == torch.bfloat16 else slow  # without autocast
        towers = phases.encoding.flops - phases.segmenter.flops
        read = phases.read_bytes / (BANDWIDTH_SHARE * gpu.memory)
        sampling = max(read, phases.sampling.flops / frozen, phases.sampling.operators * LAUNCH)
        learning = phases.learning.flops / (fast if job.bf16 else frozen)
        parts = {
            "encoding": job.accumulate * (phases.segmenter.flops / slow + towers / frozen),
            "sampling": self.samplings * sampling,
            "learning": max(learning, phases.learning.operators * LAUNCH),
        }
        if self.strategy == "fsdp2":  # layers are fetched for each pass, and once to sample
            passes = 2 + (job.beta > 0)
            groups = job.records * job.inner_steps if job.stage == "grpo" else 1
            fetches = passes * groups * job.accumulate + self.samplings
            parts["communication"] = fetches * self.traced.sizes["layers"] / self.machine.link
        elif self.strategy == "ddp":
            parts["communication"] = 2 * self.traced.sizes["trained"] / self.machine.link
        elif self.strategy == "deepspeed":  # gradients are summed, averaged by DeepSpeed, and the weights fetched
            parts["communication"] = 5 * self.traced.sizes["trained"] / self.machine.link
        return parts


def estimate(job: Job, machine: Machine, strategy: Strategy) -> Estimate:
    """What a step of a job needs.

    Args:
        job: With the batch of all processes.
        machine: Whose GPUs share the batch; with `single` one of them has all of it.
        strategy: `single`, `ddp` (all of everything on each GPU), `deepspeed` (AdamW's state spread) or `fsdp2` (the
            language model's layers spread).
    """
    if strategy != "single":
        job = job.share(machine.world)
    return Estimate(job, strategy, machine, trace(job))


@lru_cache
def trace(job: Job) -> Traced:
    """Build the model of a process's job on the meta device and trace a step of it."""
    skeleton = Skeleton(job)
    layers: nn.ModuleList = skeleton.language_model.layers
    trained = [p for p in skeleton.parameters() if p.requires_grad]
    sam = size(skeleton.segmenter.parameters()) + size(skeleton.segmenter.buffers())
    sizes = {
        "weights": size(skeleton.parameters()) + size(skeleton.buffers()) - sam,
        "sam": sam,
        "trained": size(trained),
        "layers": size(layers.parameters()),
        "layer": max(size(layer.parameters()) for layer in layers),
        "trained_layers": size(p for p in layers.parameters() if p.requires_grad),
    }
    total = sum(p.numel() for p in skeleton.parameters())
    phases = trace_phases(skeleton, job)
    return Traced(phases, total, sum(p.numel() for p in trained), sizes, skeleton.prompt_tokens)


def estimates(job: Job, machine: Machine) -> list[Estimate]:
    """Of every strategy that a machine allows, one GPU by itself first."""
    return [estimate(job, machine, strategy) for strategy in STRATEGIES if strategy == "single" or machine.world > 1]


def best(found: list[Estimate]) -> Estimate | None:
    """The fastest that fits and uses all GPUs; None where none does."""
    able = [each for each in found if each.fits and (each.strategy != "single" or each.machine.world == 1)]
    return min(able, key=lambda each: sum(each.seconds.values()), default=None)


def size(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes."""
    return sum(tensor.nbytes for tensor in tensors)


def changes(job: Job, machine: Machine, worst: str) -> Iterator[tuple[str, Job]]:
    """Settings that make the worst part of a step smaller, the ones that cost least first.

    Args:
        job: With the batch of all processes.
        machine: Where it does not fit.
        worst: `Memory.worst` there.
    """
    checkpoint = job.core_seg.reasoner.model != "small"
    if checkpoint and job.lora_rank and job.weights == torch.float32:
        yield "reasoner.dtype bfloat16", replace(job, weights=torch.bfloat16)
    if checkpoint and worst == "learning" and not job.checkpointing:
        yield "gradient_checkpointing true", replace(job, checkpointing=True)
    if job.images > machine.world and (worst != "learning" or job.stage == "sft"):
        half = replace(job, asked=job.asked[::2])
        words = f"per_batch halved ({half.images} images together)"
        if job.stage == "sft":
            half = replace(half, accumulate=2 * job.accumulate)
            words += f" and trainer.accumulate_grad_batches {half.accumulate}"
        yield words, half
    if job.stage == "grpo" and job.group_size > 4:
        yield f"group_size {job.group_size // 2}", replace(job, group_size=job.group_size // 2)
    if job.sampled and job.answer_tokens > 128:
        yield f"max_new_tokens {job.answer_tokens // 2}", replace(job, answer_tokens=job.answer_tokens // 2)
    if checkpoint and not job.lora_rank:
        yield "reasoner.lora_rank 64", replace(job, lora_rank=64)


def advise(found: Estimate, job: Job) -> Iterator[tuple[str, Estimate]]:
    """One change after another, each with what it leads to, until it fits or nothing is left to change.

    Args:
        found: What does not fit.
        job: With the batch of all processes.
    """
    while not found.fits:
        change = next(changes(job, found.machine, found.memory.worst), None)
        if change is None:
            return
        words, job = change
        found = estimate(job, found.machine, found.strategy)
        yield words, found
