"""`core-seg estimate`: what a fit configuration needs, before there is a GPU."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import ActionConfigFile
from lightning.pytorch.cli import LightningArgumentParser

from lab.errors import LabError
from lab.estimate.job import Job, read_job
from lab.estimate.machines import Machine, read_machine
from lab.estimate.plan import GIB, USABLE, Estimate, advise, estimate, fits

ABOUT = """\
What a configuration of stage 1 or 2 needs: parameters, memory on each GPU by part and strategy, tokens, FLOPs and time
of a step, and what to change when it does not fit. Weights need not be there. Takes every flag of core-seg fit, such as
--model.init_args.max_new_tokens 256."""
STRATEGIES = {"single": "one GPU", "ddp": "ddp", "sharded": "sharded (FSDP2)"}


def read_arguments(arguments: list[str]) -> tuple[Job, Machine]:
    """A job from `-c CONFIG --gpus 8x80GB` and flags as `core-seg fit` takes them; nothing is built.

    Raises:
        ArgumentError: For what does not parse.
        LabError: No configuration, or one that cannot be estimated.
    """
    parser = LightningArgumentParser(prog="core-seg estimate", description=ABOUT, exit_on_error=False)
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="Of core-seg fit.")
    parser.add_argument("--gpus", type=str, default="1x24GB", help="Such as 8x80GB, or 4x8x80GB for four nodes.")
    parser.add_argument("--seed_everything", type=int, default=0, help="As in fit; it changes nothing here.")
    parser.add_lightning_class_args(L.Trainer, "trainer")
    parser.add_lightning_class_args(L.LightningModule, "model", subclass_mode=True)
    parser.add_lightning_class_args(L.LightningDataModule, "data", subclass_mode=True)
    settings: dict[str, Any] = parser.parse_args(arguments).as_dict()
    if not settings["config"]:
        raise LabError("core-seg estimate needs a configuration; add -c configs/tiny/sft.yaml")
    return read_job(settings, Path(str(settings["config"][-1]))), read_machine(settings["gpus"])


def run_estimate(arguments: list[str]) -> None:
    """Print the estimate of a configuration."""
    job, machine = read_arguments(arguments)
    found = estimate(job)
    for line in report(found, machine):
        print(line)
    if found.best(machine):
        return
    print(f"\nIt does not fit on {machine} with any strategy that uses all of it. One change after the other:")
    last = found
    for change, last in advise(found, machine):
        strategies = [name for name in last.strategies(machine) if name != "single" or machine.world == 1]
        memory = min((last.memory(name, machine.world) for name in strategies), key=lambda memory: memory.peak)
        verdict = "fits" if fits(memory, machine) else f"not yet; most is needed for {memory.worst}"
        print(f"  {change}: {memory.peak / GIB:.1f} GB ({memory.strategy}), {verdict}")
    if not last.best(machine):
        print("  nothing is left to change: take larger GPUs or a smaller model")


def report(found: Estimate, machine: Machine) -> Iterator[str]:
    """The estimate as lines of text."""
    job, model = found.job, found.job.core_seg
    yield f"stage {job.stage}: {model.reasoner.model} with {model.segmenter.architecture}, on {machine}"
    yield f"parameters: {found.total / 1e6:,.1f} M, of which {found.trained / 1e6:,.1f} M are trained"
    batch = f"{job.records} records" + (f" x {job.group_size} completions" if job.stage == "grpo" else "")
    length = f"prompts of {found.prompt_tokens} tokens, answers of {job.answer_tokens} (the most that is allowed)"
    yield f"a step on each GPU: {batch}, {length}: {found.tokens:,} tokens, {found.flops / 1e12:,.1f} TFLOP"
    yield ""
    memories = [found.memory(name, machine.world) for name in found.strategies(machine)]
    rows = [("GB (2^30 bytes) on each GPU", *(STRATEGIES[memory.strategy] for memory in memories))]
    for part in ("weights", "gradients", "optimiser"):
        rows.append((part, *(f"{getattr(memory, part) / GIB:.2f}" for memory in memories)))
    rows.append(("SAM: weights", *(f"{memory.sam / GIB:.2f}" for memory in memories)))
    rows.append(("SAM: encoding", *(f"{found.phases.segmenter.peak / GIB:.2f}" for _ in memories)))
    rows.append(("activations", *(f"{found.phases.learning.peak / GIB:.2f}" for _ in memories)))
    rows.append(("KV cache", *(f"{memory.kv_cache / GIB:.2f}" for memory in memories)))
    for phase in memories[0].phases:
        rows.append((f"in use while {phase}", *(f"{(m.held + m.phases[phase]) / GIB:.2f}" for m in memories)))
    rows.append(("most at once", *(f"{memory.peak / GIB:.2f}" for memory in memories)))
    limit = USABLE * machine.gigabytes
    rows.append((f"fits (below {limit:.1f})", *("yes" if fits(memory, machine) else "NO" for memory in memories)))
    times = [found.seconds(machine, name) for name in found.strategies(machine)]
    rows.append(("seconds a step", *(f"{sum(parts.values()):.2f}" for parts in times)))
    for part in times[-1]:
        rows.append((f"  {part}", *(f"{parts.get(part, 0):.2f}" for parts in times)))
    rows.append((f"hours of {job.steps:,} steps", *(f"{sum(t.values()) * job.steps / 3600:.1f}" for t in times)))
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    for row in rows:
        yield "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))])
    yield ""
    yield f"Times are estimates for {machine.gpu.name}: docs/scaling.md says how they are made."
