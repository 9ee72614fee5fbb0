"""`make demo`: the whole road on one CPU, from synthetic lesions to a page with what was just trained."""

import hashlib
import subprocess
import sys
import time
from pathlib import Path

from lab.data.manifest import read_manifest
from lab.errors import LabError

SHARES = {"segmenter": 0.5, "sft": 0.38, "grpo": 0.12}
"""Of the minutes for training."""
STEPS_PER_MINUTE = {"segmenter": 85, "sft": 80, "grpo": 16}
"""Optimiser steps of the demo's small images that 2 cores do; this sets where the cosine ends."""
IMAGE_SIZE, IMAGES, EVALUATED = 192, 1200, 120
STAGES = {
    "segmenter": "stage 0: a small SAM learns to segment from boxes",
    "sft": "stage 1: the language model learns to reason, to name boxes, and to prompt the segmenter",
    "grpo": "stage 2: it tries several answers to each image, and those that earn more become likelier",
}


def run_demo(data: str, minutes: float, page: bool, port: int) -> None:
    """Synthesise, train, evaluate, serve; parts that are done are skipped.

    Args:
        data: A manifest, or empty for synthetic lesions.
        minutes: For all of the training together.
        page: Open the page at the end.
        port: Of the page.
    """
    if data and {record.split for record in read_manifest(data)} < {"train", "val", "test"}:
        raise LabError(f"{data}: the demo needs the splits train, val and test; mark records so")
    folder = folder_of(data)
    say(f"CORE-Seg on this machine: about {minutes + 3:.0f} minutes, then a page. Everything goes to {folder}/.")
    manifest = Path(data) if data else folder / "data" / "manifest.jsonl"
    reason = folder / "reason" / "manifest.jsonl"
    synthesis = ["data", "synthesize", "--size", str(IMAGE_SIZE)]
    if not data:
        part("1/6 synthetic lesions (half a minute)", manifest, [*synthesis, str(manifest.parent), "--n", str(IMAGES)])
    part(
        "1/6 lesions to be told apart by a query",
        reason,
        [*synthesis, str(reason.parent), "--n", "400", "--kind=reason"],
    )
    for number, (name, title) in enumerate(STAGES.items(), start=2):
        say(f"{number}/6 {title}")
        stage(folder / name, minutes * SHARES[name], manifest, reason)
    release = folder / "release"
    arguments = ["release", str(checkpoint(folder / "grpo")), str(release), "--title=CORE-Seg demo"]
    part("5/6 the release", release / "config.json", arguments)
    evaluation = [
        "evaluate",
        str(release),
        f"--manifest={manifest}",
        f"--limit={EVALUATED}",
        f"--out={folder / 'evaluation'}",
    ]
    part("6/6 evaluation on the test split (half a minute)", folder / "evaluation" / "cases.png", evaluation)
    if page:
        from apps.lab.library import Library
        from apps.lab.page import launch

        launch(Library(release, folder, manifest), port)


def folder_of(data: str) -> Path:
    """One for each data set: what was trained on another is not gone on with."""
    manifest = Path(data).absolute()
    digest = hashlib.sha256(str(manifest).encode()).hexdigest()[:8]
    return Path("runs") / (f"demo-{manifest.parent.name}-{digest}" if data else "demo")


def stage(folder: Path, minutes: float, manifest: Path, reason: Path) -> None:
    """Train one stage with its own configuration, shortened; a stage that was interrupted goes on."""
    name, demo, done = folder.name, folder.parent, folder / "done"
    if done.exists():
        return say("    already done")
    steps = max(4, round(minutes * STEPS_PER_MINUTE[name] / 4) * 4)
    images = 4 if name == "grpo" else 8
    parts = [
        {"manifest": str(manifest), "per_batch": images},
        {"manifest": str(reason), "per_batch": images, "queries_per_image": 2},
    ]
    model = "--model.init_args."
    flags = [
        f"--name={demo.name}/{name}",
        f"--trainer.max_steps={steps}",
        "--trainer.check_val_every_n_epoch=4",
        f"{model}total_steps={steps}",
        f"--data.init_args.train={parts}",
        f"--data.init_args.val={manifest}",
        "--data.init_args.val_limit=30",
        f"--data.init_args.steps_per_epoch={steps // 4}",
        f"--trainer.max_time={time.strftime('00:%H:%M:%S', time.gmtime(66 * minutes))}",  # a slow machine stops here
    ]
    flags += {
        "segmenter": [f"{model}segmenter.image_size={IMAGE_SIZE}"],
        "sft": [
            f"{model}core_seg.segmenter.image_size={IMAGE_SIZE}",
            f"{model}core_seg.reasoner.image_size={IMAGE_SIZE}",
            f"{model}segmenter_checkpoint={checkpoint(demo / 'segmenter')}",
            f"{model}cache={demo / 'cache'}",
            f"{model}views=2",
            f"{model}decoder_after={steps // 4}",
            f"{model}own_text_after={steps * 3 // 4}",
        ],
        "grpo": [
            f"{model}warmup_steps=2",
            f"{model}start={checkpoint(demo / 'sft')}",
            f"{model}cache={demo / 'cache'}",
            f"{model}views=2",
        ],
    }[name]
    if checkpoint(folder).exists():
        flags.append("--ckpt_path=last")
    config = Path(__file__).parents[1] / "configs" / "tiny" / f"{name}.yaml"
    core_seg("fit", "-c", str(config), *flags)
    done.touch()


def checkpoint(folder: Path) -> Path:
    return folder / "checkpoints" / "last.ckpt"


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
        raise LabError(f"'core-seg {arguments[0]}' ended with code {code}; see above, then call this again to go on")


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)
