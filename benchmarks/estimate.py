"""Makes the table under "Memory and time" in docs/scaling.md anew: `python -m benchmarks.estimate`, some 4 minutes.

Nothing is trained, and neither weights nor a GPU are needed: every row is one of `core-seg estimate`.
"""

from pathlib import Path

from tqdm import tqdm

from apps.estimate import read_arguments
from lab.estimate.plan import GIB, Estimate, advise, best, estimates

CONFIGS = [f"configs/{preset}/{stage}.yaml" for preset in ("small", "paper") for stage in ("sft", "grpo")]
MACHINES = ["1x24GB", "1x80GB", "8x80GB", "4x8x80GB"]
DOCUMENT = Path("docs/scaling.md")
BEGIN, END = "<!-- made by python -m benchmarks.estimate -->\n", "<!-- end -->\n"
COLUMNS = ["configuration", "GPUs", "strategy", "GB on each: peak (weights, SAM, gradients and optimiser), when"]
COLUMNS += ["images a step", "seconds a step", "hours of the run", "what had to change"]
HEAD = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|\n"


def row(config: str, gpus: str) -> str:
    """The fastest strategy that fits, or what has to change until one does."""
    job, machine = read_arguments(["-c", config, "--gpus", gpus])
    found = estimates(job, machine)
    chosen, changed = best(found), ""
    if chosen is None:
        chosen = min(found[-2:], key=lambda each: each.memory.peak)
        steps, needed = list(advise(chosen, job)), f"{chosen.memory.peak / GIB:.0f} GB as it is"
        chosen = steps[-1][1] if steps else chosen
        changed = f"{needed}: " + ("; ".join(words for words, _ in steps) if chosen.fits else "does not fit")
    elif job.images % machine.world:
        changed = f"per_batch: {chosen.job.images * machine.world} images, not {job.images}"
    return f"| `{config}` | {machine} | {' | '.join(cells(chosen))} | {changed} |\n"


def cells(found: Estimate) -> list[str]:
    memory, seconds = found.memory, sum(found.seconds.values())
    world = 1 if found.strategy == "single" else found.machine.world
    held = (memory.weights, memory.sam, memory.gradients + memory.optimiser)
    return [
        {"single": "one GPU"}.get(found.strategy, found.strategy),
        f"{memory.peak / GIB:.1f} ({', '.join(f'{part / GIB:.1f}' for part in held)}), {memory.worst}",
        str(found.job.images * found.job.accumulate * world),
        f"{seconds:.1f}",
        f"{seconds * found.job.steps / 3600:.1f}",
    ]


def main() -> None:
    rows = [row(config, gpus) for config in tqdm(CONFIGS, unit="configuration") for gpus in MACHINES]
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    DOCUMENT.write_text(before + BEGIN + HEAD + "".join(rows) + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
