"""`make demo`: the whole road on one CPU, from synthetic lesions to a page with what was just trained."""

import subprocess
import sys
import time
from pathlib import Path

from lab.data.manifest import read_manifest
from lab.errors import LabError

FOLDER = Path("runs/demo")
SHARE_OF_STAGE_0 = 0.55
"""Of the minutes for training; the rest is stage 1."""
STEPS_PER_MINUTE = {"segmenter": 60, "sft": 60}
"""Optimiser steps of the demo's small images that 2 cores do; this sets where the cosine ends."""
IMAGE_SIZE, IMAGES, EVALUATED = 192, 1200, 120


def run_demo(data: str, minutes: float, page: bool, port: int) -> None:
    """Synthesise, train, evaluate, serve; parts that are done are skipped.

    Args:
        data: A manifest, or empty for synthetic lesions.
        minutes: For both trainings together.
        page: Open the page at the end.
        port: Of the page.
    """
    if data and {record.split for record in read_manifest(data)} < {"train", "val", "test"}:
        raise LabError(f"{data}: the demo needs the splits train, val and test; mark records so")
    say(f"CORE-Seg on this machine: about {minutes + 1.5:.0f} minutes, then a page. Everything goes to {FOLDER}/.")
    manifest = Path(data) if data else FOLDER / "data" / "manifest.jsonl"
    reason = FOLDER / "reason" / "manifest.jsonl"
    synthesis = ["data", "synthesize", "--size", str(IMAGE_SIZE)]
    if not data:
        part("1/5 synthetic lesions (half a minute)", manifest, [*synthesis, str(manifest.parent), "--n", str(IMAGES)])
    part(
        "1/5 lesions to be told apart by a query",
        reason,
        [*synthesis, str(reason.parent), "--n", "400", "--kind=reason"],
    )
    budget = {"segmenter": minutes * SHARE_OF_STAGE_0, "sft": minutes * (1 - SHARE_OF_STAGE_0)}
    say("2/5 stage 0: a small SAM learns to segment from boxes")
    stage("segmenter", budget["segmenter"], manifest, reason)
    say("3/5 stage 1: the language model learns to reason, to name boxes, and to prompt the segmenter")
    stage("sft", budget["sft"], manifest, reason)
    release = FOLDER / "release"
    checkpoint = FOLDER / "sft" / "checkpoints" / "last.ckpt"
    part(
        "4/5 the release", release / "config.json", ["release", str(checkpoint), str(release), "--title=CORE-Seg demo"]
    )
    evaluation = [
        "evaluate",
        str(release),
        f"--manifest={manifest}",
        f"--limit={EVALUATED}",
        f"--out={FOLDER / 'evaluation'}",
    ]
    part("5/5 evaluation on the test split (half a minute)", FOLDER / "evaluation" / "cases.png", evaluation)
    if page:
        from apps.page import launch

        test = [record for record in read_manifest(manifest) if record.split == "test"]
        launch(release, port, examples=[[str(record.image), record.query] for record in test[:: len(test) // 5 + 1]])


def stage(name: str, minutes: float, manifest: Path, reason: Path) -> None:
    """Train one stage with its own configuration, shortened; a stage that was interrupted goes on."""
    folder = FOLDER / name
    done = folder / "done"
    if done.exists():
        return say("    already done")
    steps = max(4, round(minutes * STEPS_PER_MINUTE[name] / 4) * 4)
    parts = [
        {"manifest": str(manifest), "per_batch": 8},
        {"manifest": str(reason), "per_batch": 8, "queries_per_image": 2},
    ]
    model = "--model.init_args."
    core = "core_seg." if name == "sft" else ""
    flags = [
        f"--name=demo/{name}",
        f"--trainer.max_steps={steps}",
        "--trainer.check_val_every_n_epoch=4",
        f"{model}total_steps={steps}",
        f"{model}{core}segmenter.image_size={IMAGE_SIZE}",
        f"--data.init_args.train={parts}",
        f"--data.init_args.val={manifest}",
        "--data.init_args.val_limit=30",
        f"--data.init_args.steps_per_epoch={steps // 4}",
        f"--trainer.max_time={time.strftime('00:%H:%M:%S', time.gmtime(96 * minutes))}",  # a slow machine stops here
    ]
    if name == "sft":
        flags += [
            f"{model}core_seg.reasoner.image_size={IMAGE_SIZE}",
            f"{model}segmenter_checkpoint={FOLDER / 'segmenter' / 'checkpoints' / 'last.ckpt'}",
            f"{model}cache={FOLDER / 'cache'}",
            f"{model}own_text_after={steps // 2}",
        ]
    if (folder / "checkpoints" / "last.ckpt").exists():
        flags.append("--ckpt_path=last")
    config = Path(__file__).parents[1] / "configs" / "tiny" / f"{name}.yaml"
    core_seg("fit", "-c", str(config), *flags)
    done.touch()


def part(title: str, result: Path, arguments: list[str]) -> None:
    """Run a command unless its result is there."""
    say(title)
    if result.exists():
        return say("    already done")
    core_seg(*arguments)


def core_seg(*arguments: str) -> None:
    """A core-seg command in a process of its own, so that each part starts with all of the memory.

    Raises:
        LabError: When it fails; its own message is above.
    """
    process = subprocess.Popen([sys.executable, "-m", "lab", *arguments])
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.wait()  # it has the Ctrl-C too, and saves
        raise
    if code:
        raise LabError(f"'core-seg {arguments[0]}' ended with code {code}; see above, then run the demo again to go on")


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)
