"""From a traced step to memory and time on given GPUs, by strategy, and what to change when it does not fit.

Memory is traced, time is an estimate: FLOPs and bytes of a step over a stated share of what the GPU's maker states.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from lab.estimate.job import Job
from lab.estimate.machines import BANDWIDTH_SHARE, LAUNCH, UTILISATION, Machine
from lab.estimate.phases import Phases, trace_phases
from lab.estimate.skeleton import Skeleton

GIB = 2**30
USABLE = 0.92
"""Share of a GPU's memory that tensors can fill; the CUDA context, NCCL and fragmentation take the rest."""


@dataclass
class Memory:
    """Bytes on each GPU at the worst moment of a step, by part."""

    strategy: str
    weights: float
    """Of the language model, the adapter and the heads; under `sharded` also of the layer that is gathered."""
    gradients: float
    optimiser: float
    """AdamW's two moments."""
    sam: float
    """SAM's weights."""
    phases: dict[str, float]
    """What comes on top in each part of the step, its gradients included."""
    kv_cache: float

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


@dataclass
class Estimate:
    """A traced job."""

    job: Job
    phases: Phases
    total: int
    """Parameters."""
    trained: int
    sizes: dict[str, int]
    """Bytes: `weights`, `sam`, `trained`, `layers` (the part of the language model that is sharded), `layer` (its
    largest layer), `trained_layers`."""
    prompt_tokens: int

    @property
    def tokens(self) -> int:
        """Tokens of a step, prompt and completions."""
        job = self.job
        return job.accumulate * job.records * (self.prompt_tokens + job.group_size * job.answer_tokens)

    @property
    def flops(self) -> float:
        """Of a step with the encoders."""
        phases = self.phases
        return (
            phases.encoding.flops * self.job.accumulate
            + phases.learning.flops
            + self.sampled_share * (phases.sampling.flops)
        )

    @property
    def sampled_share(self) -> float:
        return 1.0 if self.job.stage == "grpo" else self.job.own_text * self.job.accumulate

    def memory(self, strategy: str, world: int) -> Memory:
        """On each of `world` GPUs.

        Args:
            strategy: `single`, `ddp` (all of everything on each GPU, and buckets of gradients beside the gradients) or
                `sharded` (FSDP2 of the language model's layers; one is whole while it works and one is fetched).
            world: Number of processes.
        """
        s, phases = self.sizes, self.phases
        weights, trained = s["weights"], s["trained"]
        if strategy == "sharded":
            weights += 2 * s["layer"] - s["layers"] * (1 - 1 / world)
            trained -= s["trained_layers"] * (1 - 1 / world)
        gradients = trained * (2 if strategy == "ddp" else 1)
        buckets = gradients - trained
        extra = {
            "encoding images": phases.encoding.peak + buckets,
            "sampling": phases.sampling.peak + buckets,
            "learning": phases.learning.peak + gradients,
            "optimiser step": trained + gradients,  # AdamW over all tensors at once holds one more set of them
        }
        return Memory(strategy, weights, gradients, 2 * trained, s["sam"], extra, phases.kv_cache)

    def seconds(self, machine: Machine, strategy: str) -> dict[str, float]:
        """Of the parts of a step."""
        gpu, job, phases = machine.gpu, self.job, self.phases
        fast, slow = UTILISATION * gpu.bf16, UTILISATION * gpu.fp32
        frozen = fast if job.weights == torch.bfloat16 else slow  # without autocast
        towers = phases.encoding.flops - phases.segmenter.flops
        read = phases.read_bytes / (BANDWIDTH_SHARE * gpu.memory)
        parts = {
            "encoding": job.accumulate * (phases.segmenter.flops / slow + towers / frozen),
            "sampling": self.sampled_share
            * max(read, phases.sampling.flops / frozen, phases.sampling.operators * LAUNCH),
            "learning": max(phases.learning.flops / (fast if job.bf16 else frozen), phases.learning.operators * LAUNCH),
        }
        if strategy == "sharded":  # layers are gathered for each pass, and for each token that is sampled
            passes = (3 if job.beta else 2) * (job.records if job.stage == "grpo" else 1) * job.inner_steps
            gathered = self.sizes["layers"] / machine.link
            parts["communication"] = gathered * (passes * job.accumulate + self.sampled_share * job.answer_tokens)
        elif strategy == "ddp":
            parts["communication"] = 2 * self.sizes["trained"] / machine.link
        return parts

    def strategies(self, machine: Machine) -> list[str]:
        return ["single", "ddp", "sharded"] if machine.world > 1 else ["single"]

    def best(self, machine: Machine) -> tuple[str, Memory] | None:
        """The fastest strategy that uses all GPUs and fits, with its memory; None where none does."""
        able = [
            (sum(self.seconds(machine, name).values()), name)
            for name in self.strategies(machine)
            if (name != "single" or machine.world == 1) and fits(self.memory(name, machine.world), machine)
        ]
        return (min(able)[1], self.memory(min(able)[1], machine.world)) if able else None


def fits(memory: Memory, machine: Machine) -> bool:
    return memory.peak <= USABLE * machine.gigabytes * GIB


def estimate(job: Job) -> Estimate:
    """Build a job's model on the meta device and trace a step of it."""
    skeleton = Skeleton(job)
    segmenter = list(skeleton.segmenter.parameters())
    layers: nn.ModuleList = skeleton.language_model.layers
    trained = [p for p in skeleton.parameters() if p.requires_grad]
    sam = size(segmenter)
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
    return Estimate(job, phases, total, sum(p.numel() for p in trained), sizes, skeleton.prompt_tokens)


def size(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes."""
    return sum(tensor.nbytes for tensor in tensors)


def changes(job: Job, worst: str) -> Iterator[tuple[str, Job]]:
    """Settings that make the worst part of a step smaller, the ones that cost least first."""
    if job.weights == torch.float32 and job.lora_rank and job.core_seg.reasoner.model != "small":
        yield "reasoner.dtype bfloat16", replace(job, weights=torch.bfloat16)
    if worst == "learning" and not job.checkpointing and job.core_seg.reasoner.model != "small":
        yield "gradient_checkpointing true", replace(job, checkpointing=True)
    if worst == "learning" and job.stage == "grpo":
        if job.group_size > 4:
            yield f"group_size {job.group_size // 2}", replace(job, group_size=job.group_size // 2)
        if job.answer_tokens > 128:
            yield f"max_new_tokens {job.answer_tokens // 2}", replace(job, answer_tokens=job.answer_tokens // 2)
    elif job.records > 1:
        half = replace(job, records=job.records // 2, images=-(-job.images // 2))
        words = f"per_batch halved ({half.records} records together)"
        if job.stage == "sft":
            half = replace(half, accumulate=2 * job.accumulate)
            words += f" and trainer.accumulate_grad_batches {half.accumulate}"
        yield words, half
    if worst == "optimiser step" and not job.lora_rank:
        yield "reasoner.lora_rank 64", replace(job, lora_rank=64)


def advise(found: Estimate, machine: Machine) -> Iterator[tuple[str, Estimate]]:
    """One change after another, each with what it leads to, until it fits or nothing is left to change."""
    strategy = "single" if machine.world == 1 else "sharded"
    while not found.best(machine):
        memory = found.memory(strategy, machine.world)
        change = next(changes(found.job, memory.worst), None)
        if change is None:
            return
        found = estimate(change[1])
        yield change[0], found
