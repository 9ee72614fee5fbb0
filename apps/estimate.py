"""`core-seg estimate`: what a fit configuration needs, before there is a GPU."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import ActionConfigFile
from lightning.pytorch.cli import LightningArgumentParser

from lab.estimate.job import Job, read_job
from lab.estimate.machines import Machine, read_machine
from lab.estimate.plan import GIB, USABLE, Estimate, advise, best, estimates

ABOUT = """\
What a configuration of stage 1 or 2 needs: parameters, memory on each GPU by part and strategy, tokens, FLOPs and time
of a step, and what to change when it does not fit. Weights need not be there. Takes every flag of core-seg fit, such as
--model.init_args.max_new_tokens 256."""
NAMES = {"single": "one GPU", "ddp": "ddp", "deepspeed": "deepspeed (ZeRO 1)", "fsdp2": "fsdp2 (sharded)"}


def read_arguments(arguments: list[str]) -> tuple[Job, Machine]:
    """A job from `-c CONFIG --gpus 8x80GB` and flags as `core-seg fit` takes them; nothing is built.

    Raises:
        ArgumentError: For what does not parse.
        LabError: For a configuration that cannot be estimated.
    """
    parser = LightningArgumentParser(prog="core-seg estimate", description=ABOUT, exit_on_error=False)
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="Of core-seg fit.")
    parser.add_argument("--gpus", type=str, default="1x24GB", help="Such as 8x80GB, or 4x8x80GB for four nodes.")
    for flag, default in (("--seed_everything", 0), ("--name", ""), ("--ckpt_path", "")):
        parser.add_argument(flag, type=type(default), default=default, help="As in fit; it changes nothing here.")
    parser.add_lightning_class_args(L.Trainer, "trainer")
    parser.add_lightning_class_args(L.LightningModule, "model", subclass_mode=True)
    parser.add_lightning_class_args(L.LightningDataModule, "data", subclass_mode=True)
    settings: dict[str, Any] = parser.parse_args(arguments).as_dict()
    config = Path(str(settings["config"][-1])) if settings["config"] else Path("the flags")
    return read_job(settings, config), read_machine(settings["gpus"])


def run_estimate(arguments: list[str]) -> None:
    """Print the estimate of a configuration."""
    job, machine = read_arguments(arguments)
    found = estimates(job, machine)
    for line in report(found, job):
        print(line)
    if best(found):
        return
    tried = min(found[1:], key=lambda each: each.memory.peak) if machine.world > 1 else found[0]
    print(f"\nIt does not fit on {machine}. One change after the other, with {NAMES[tried.strategy]}:")
    steps = list(advise(tried, job))
    for change, then in steps:
        verdict = "fits" if then.fits else f"not yet: most is in use while {then.memory.worst}"
        print(f"  {change}: {then.memory.peak / GIB:.1f} GB, {verdict}")
    if not steps or not steps[-1][1].fits:
        print("  nothing is left to change: take larger GPUs or a smaller model")


def report(found: list[Estimate], job: Job) -> Iterator[str]:
    """Estimates of one job under several strategies as lines of text."""
    one, machine = found[0].traced, found[0].machine
    yield f"stage {job.stage}: {job.core_seg.reasoner.model} with {job.core_seg.segmenter.architecture}, on {machine}"
    yield f"parameters: {one.total / 1e6:,.1f} M, of which {one.trained / 1e6:,.2f} M are trained"
    completions = f" x {job.group_size} completions" if job.stage == "grpo" else ""
    yield f"a batch: {job.images} images, {job.records} records{completions}"
    yield f"prompts of {one.prompt_tokens} tokens, answers of {job.answer_tokens}, the most that is allowed"
    if job.images % machine.world:
        share = f"estimated for {found[-1].job.images} on each"
        yield f"{job.images} images cannot be shared evenly by {machine.world} processes ({share}): change per_batch"
    rows = [("on each GPU", *(NAMES[each.strategy] for each in found))]

    def add(name: str, *values: float, form: str = ".2f") -> None:
        rows.append((name, *(format(value, form) for value in values)))

    add("tokens a step", *(each.tokens for each in found), form=",")
    add("TFLOP a step", *(each.flops / 1e12 for each in found), form=",.1f")
    memories = [each.memory for each in found]
    for part in ("weights", "gradients", "optimiser"):
        add(f"GB: {part}", *(getattr(memory, part) / GIB for memory in memories))
    add("GB: activations", *(each.traced.phases.learning.peak / GIB for each in found))
    add("GB: KV cache", *(each.traced.phases.kv_cache / GIB for each in found))
    add("GB: SAM, weights", *(memory.sam / GIB for memory in memories))
    add("GB: SAM, its encoder at work", *(each.traced.phases.segmenter.peak / GIB for each in found))
    for phase in memories[0].phases:
        add(f"GB in use while {phase}", *((memory.held + memory.phases[phase]) / GIB for memory in memories))
    add("GB at the worst moment", *(memory.peak / GIB for memory in memories))
    rows.append((f"fits, below {USABLE * machine.gigabytes:.1f} GB", *("yes" if each.fits else "NO" for each in found)))
    for part in ("encoding", "sampling", "learning", "communication"):
        add(f"seconds: {part}", *(each.seconds.get(part, 0) for each in found))
    add("seconds a step", *(sum(each.seconds.values()) for each in found))
    add(f"hours of {job.steps:,} steps", *(sum(each.seconds.values()) * job.steps / 3600 for each in found), form=".1f")
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    yield ""
    for row in rows:
        yield "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
    yield f"\nGB are 2^30 bytes. Times are estimates for {machine.gpu.name}; docs/scaling.md says how they are made."
