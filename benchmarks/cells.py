"""The rows of `benchmarks.table` and `benchmarks.ood`: what each is, its training and its evaluation."""

import hashlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from apps.demo import core_seg, say
from lab.evaluation.compare import read_cases
from lab.model.release import read_checkpoint

CONFIGS = Path(__file__).parents[1] / "configs" / "tiny"
MODEL = "--model.init_args."


@dataclass(frozen=True)
class Cell:
    """A row of the table: what is trained, and from what."""

    title: str
    configs: tuple[str, ...]
    share: float
    """Of the optimiser steps in its first configuration."""
    rival: bool = False
    """A baseline with language: one of those that the paper's margin is over."""
    after: str = ""
    """The cell that it starts from; none is stage 0, and the language model."""
    flags: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """Of all that its configurations say, of its flags, and of the cell before it: a cell that was trained as they
        were once is another."""
        read = [yaml.safe_load((CONFIGS / config).read_text()) for config in self.configs]
        before = CELLS[self.after].digest if self.after else ""
        told = json.dumps([self.share, self.flags, before, read], sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Shared:
    """What all cells have in common; cells that differ in it are in no table together."""

    manifest: Path
    segmenter: Path
    language: Path
    quick: float
    limit: int

    @property
    def runs(self) -> str:
        """Folder below runs/ of what is trained so."""
        return run_folder("table", self.quick, self.manifest, self.segmenter, self.language)

    def settings(self) -> dict:
        """As JSON, the manifest by its folder and name."""
        return asdict(self) | {
            name: "/".join(getattr(self, name).parts[-2:]) for name in ("manifest", "segmenter", "language")
        }


def run_folder(name: str, quick: float, *places: Path) -> str:
    """A folder for runs of these settings, so that none goes on, or is evaluated, as one of others."""
    settings = json.dumps([quick, *(str(place.resolve()) for place in places)])
    return f"{name}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"


def sft(title: str, *configs: str, rival: bool = False) -> Cell:
    return Cell(title, ("sft.yaml", *configs), 0.1, rival)


def grpo(title: str, *flags: str, after: str = "sft", rival: bool = False) -> Cell:
    return Cell(title, ("grpo.yaml",), 0.15, rival, after, flags)


CELLS = {
    "sft": sft("CORE-Seg, SFT"),
    "grpo": grpo("CORE-Seg, SFT + GRPO"),
    "unet": Cell("U-Net, no language", ("unet.yaml",), 0.4),
    "text-box": sft("text to box (Seg-Zero), SFT", "ablations/text_box.yaml", rival=True),
    "text-box-grpo": grpo(
        "text to box (Seg-Zero), SFT + RL",
        f"{MODEL}seg_weight=0",
        f"{MODEL}rewards.segment=0",
        f"{MODEL}rewards.detect_kind=binary",
        after="text-box",
        rival=True,
    ),
    "seg-token": sft("<seg> token (LISA), no reasoning", "ablations/seg_token.yaml", rival=True),
    "queries": sft("learnable queries (LENS), SFT", "ablations/queries.yaml", rival=True),
    "queries-grpo": grpo(
        "learnable queries (LENS), SFT + RL",
        f"{MODEL}rewards.segment_kind=iou2",
        after="queries",
        rival=True,
    ),
    "one-look": sft("one look, SFT", "ablations/one_look.yaml"),
    "one-look-grpo": grpo("one look, SFT + GRPO", after="one-look"),
    "linear": sft("linear map for the adapter", "ablations/linear_adapter.yaml"),
    "mean": sft("mean state for that of <seg>", "ablations/mean_state.yaml"),
    "no-reasoning": sft("no reasoning", "ablations/no_reasoning.yaml"),
    "grpo-no-dicece": grpo("GRPO without DiceCE", f"{MODEL}seg_weight=0"),
    "grpo-residual": grpo("GRPO, residual reward", f"{MODEL}rewards.segment_kind=residual"),
    "grpo-dice": grpo("GRPO, Dice reward", f"{MODEL}rewards.segment_kind=dice"),
    "grpo-4": grpo("GRPO, groups of 4", f"{MODEL}group_size=4"),
    "grpo-16": grpo("GRPO, groups of 16", f"{MODEL}group_size=16"),
}


def checkpoint_of(run: str) -> Path:
    return Path("runs") / run / "checkpoints" / "last.ckpt"


def finished(cell: Cell, run: str, quick: float) -> Path | None:
    """The checkpoint of a cell that has been trained to its end."""
    last = checkpoint_of(run)
    return last if last.is_file() and read_checkpoint(last)["global_step"] >= steps_of(cell, quick) else None


def steps_of(cell: Cell, quick: float) -> int:
    """Optimiser steps."""
    config = yaml.safe_load((CONFIGS / cell.configs[0]).read_text())
    return max(1, round(quick * cell.share * config["trainer"]["max_steps"]))


def train(
    cell: Cell, run: str, manifest: Path, starts: dict[str, Path], seed: int, quick: float, minutes: float
) -> Path | None:
    """Train a cell, or go on with it; its checkpoint once it is done, None when the minutes were over before.

    Args:
        cell: What to train.
        run: Folder below runs/.
        manifest: In place of the real lesions of the configuration.
        starts: Arguments of the module, with the releases or checkpoints that they take.
        seed: Of weights and data.
        quick: Share of the cell's steps.
        minutes: At most.
    """
    if (done := finished(cell, run, quick)) or minutes <= 0:
        return done
    config = yaml.safe_load((CONFIGS / cell.configs[0]).read_text())
    data, arguments, steps = config["data"]["init_args"], config["model"]["init_args"], steps_of(cell, quick)
    # steps that a configuration counts shrink with it; an ablation's own come after
    flags = [f"--config={CONFIGS / cell.configs[0]}"]
    counted = [key for key in ("decoder_after", "own_text_after") if key in arguments]
    flags += [f"{MODEL}{key}={round(quick * cell.share * arguments[key])}" for key in counted]
    flags += [f"--config={CONFIGS / config}" for config in cell.configs[1:]]
    flags += [f"--name={run}", f"--seed_everything={seed}", f"--data.init_args.seed={seed}"]
    flags += [f"--trainer.max_steps={steps}", f"{MODEL}total_steps={steps}", *cell.flags]
    parts = [p | {"manifest": str(manifest)} if p["manifest"] == data["val"] else p for p in data["train"]]
    flags += [f"--data.init_args.train={parts}", f"--data.init_args.val={manifest}"]
    flags += [f"{MODEL}{argument}={start}" for argument, start in starts.items()]
    if "seed" in arguments:
        flags.append(f"{MODEL}seed={seed}")
    spent = 0.0
    if checkpoint_of(run).is_file():
        flags.append("--ckpt_path=last")
        spent = read_checkpoint(checkpoint_of(run))["callbacks"]["Timer"]["time_elapsed"]["train"]  # it counts on
    days, seconds = divmod(round(60 * minutes + spent), 86400)
    flags.append(f"--trainer.max_time={days:02}:{time.strftime('%H:%M:%S', time.gmtime(seconds))}")
    say(f"{run}: {cell.title}, {steps} steps")
    core_seg("fit", *flags)
    return finished(cell, run, quick)


def trained(name: str, seed: int, shared: Shared, end: float) -> Path | None:
    """A cell's checkpoint, after that of the cell that it starts from; None when the minutes were over before.

    Args:
        name: Of the cell.
        seed: Of it.
        shared: What all cells have in common.
        end: By `time.monotonic`.
    """
    cell = CELLS[name]
    if cell.after:
        starts = {"start": trained(cell.after, seed, shared, end)}
    elif cell.configs[0] == "unet.yaml":
        starts = {"encoder": shared.segmenter}
    else:
        starts = {"segmenter_checkpoint": shared.segmenter, "language_checkpoint": shared.language}
    if None in starts.values():
        return None
    minutes = (end - time.monotonic()) / 60
    run = f"{shared.runs}/{name}-{seed}-{cell.digest}"
    return train(cell, run, shared.manifest, starts, seed, shared.quick, minutes)


def evaluated(checkpoint: Path, manifest: Path, limit: int, folder: Path, split: str = "test") -> dict:
    """An evaluation's summary, and the Dice and the group of every image."""
    if not (folder / "evaluation.json").is_file():
        flags = [f"--manifest={manifest}", f"--split={split}", f"--limit={limit}", f"--out={folder}"]
        core_seg("evaluate", str(checkpoint), *flags)
    cases = read_cases(folder)
    return json.loads((folder / "evaluation.json").read_text()) | {
        "dice": dict(zip(cases.id, cases.dice.round(4))),
        "group": dict(zip(cases.id, cases.group)),
    }
