"""The commands beside training. Each is a function whose arguments jsonargparse turns into flags."""

import json
from collections.abc import Callable
from pathlib import Path

from apps.data_commands import (
    check,
    convert,
    filter_by_difficulty,
    hard,
    leave_out,
    pack,
    reason,
    sheet,
    stats,
    synthesize,
)
from apps.publishing import merge, push, release


def find(arguments: list[str]) -> Callable[[], None] | None:
    """The command that the first word (for `data`, the first two) names, bound to the rest; None for no such."""
    top = {"segment": segment, "evaluate": evaluate, "compare": compare, "curves": curves}
    top |= {"release": release, "merge": merge, "push": push, "space": space, "app": app, "demo": demo}
    data = {"synthesize": synthesize, "hard": hard, "leave-out": leave_out, "sheet": sheet, "convert": convert}
    data |= {"check": check, "stats": stats, "pack": pack, "filter": filter_by_difficulty, "reason": reason}
    words = 2 if arguments[0] == "data" else 1
    function = top.get(arguments[0]) if words == 1 else data.get(arguments[1] if len(arguments) > 1 else "")
    if function is None:
        return None

    def run() -> None:
        from jsonargparse import ArgumentParser

        parser = ArgumentParser(prog=f"core-seg {' '.join(arguments[:words])}", exit_on_error=False)
        several = [name for name, kind in function.__annotations__.items() if kind == list[Path]]
        parser.add_function_arguments(function, as_positional=True, skip=set(several))
        for name in several:
            parser.add_argument(name, nargs="+", type=Path, help="One or more folders.")
        switches = {f"--{name}" for name, kind in function.__annotations__.items() if kind is bool}
        rest = arguments[words:]
        alone = [after not in ("true", "false") for after in [*rest[1:], ""]]  # --swapped is --swapped true
        typed = [f"{word}=true" if word in switches and no_value else word for word, no_value in zip(rest, alone)]
        function(**parser.instantiate_classes(parser.parse_args(typed)))

    return run


def segment(image: Path, *, release: Path, query: str = "Locate and segment the lesion.", out: Path = Path("out")):
    """Ask a release about one image; writes NAME_mask.png, NAME_overlay.png and NAME.json.

    Args:
        image: PNG, JPEG or TIFF.
        release: Folder that core-seg release wrote.
        query: What to look for.
        out: Folder for the results.
    """
    import cv2
    import numpy as np

    from lab.data.images import read_image
    from lab.evaluation.report import contoured
    from lab.model.release import load_model

    pixels = read_image(image)
    (prediction,) = load_model(release).predict([pixels], [query])
    out.mkdir(parents=True, exist_ok=True)
    overlay = contoured(pixels, None, prediction.mask)
    for x1, y1, x2, y2 in prediction.boxes.round().astype(int).tolist():
        cv2.rectangle(overlay, (x1, y1), (x2 - 1, y2 - 1), (255, 220, 0), 1)
    cv2.imwrite(str(out / f"{image.stem}_mask.png"), prediction.mask.astype(np.uint8) * 255)
    cv2.imwrite(str(out / f"{image.stem}_overlay.png"), overlay[..., ::-1])
    result = {
        "query": query,
        "text": prediction.text,
        "draft": prediction.draft,
        "valid": prediction.answer.valid,
        "problem": prediction.answer.problem,
        "reasoning": prediction.answer.reasoning,
        "boxes": prediction.boxes.round(1).tolist(),
        "mask_fraction": round(float(prediction.mask.mean()), 5),
        "seconds": round(prediction.seconds, 3),
        "notice": "Research use only. Not a medical device.",
    }
    (out / f"{image.stem}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(prediction.answer.reasoning or prediction.text)
    state = "no lesion found" if prediction.answer.says_empty else f"{result['mask_fraction']:.2%} of the image"
    print(
        f"{state if prediction.has_mask else 'INVALID ANSWER: ' + result['problem']}, {result['seconds']} s, in {out}/"
    )


def evaluate(
    model: Path, *, manifest: Path, split: str = "test", out: Path = Path("out"), swapped: bool = False, limit: int = 0
):
    """Score a release or checkpoint on a split of a manifest; stage 0 is given the true boxes, a U-Net reads no query.

    Args:
        model: Folder of a release, or checkpoints/best.ckpt of a run.
        manifest: manifest.jsonl.
        split: train, val or test.
        out: Folder for evaluation.json, evaluation.md, cases.csv, cases.png and worst.webp, the four worst.
        swapped: Score once more with the query of another lesion in the same image.
        limit: Only this many records, evenly spread; 0 takes all.
    """
    from lab.baselines.unet import unet_from_checkpoint
    from lab.data.manifest import read_manifest
    from lab.data.sample import evenly, lesion_boxes
    from lab.errors import LabError
    from lab.evaluation.influence import reasoning_influence
    from lab.evaluation.metrics import bootstrap_interval, summarise
    from lab.evaluation.report import draw_cases, machine, write_report
    from lab.evaluation.run import evaluate as ask
    from lab.evaluation.run import evaluate_boxes, load_sample
    from lab.memory import keep_freed_memory
    from lab.model.release import load_any, read_checkpoint
    from lab.model.segmenter import Segmenter

    keep_freed_memory()
    records = [record for record in read_manifest(manifest) if record.split == split]
    if not records:
        raise LabError(f"{manifest}: no record has split '{split}'; name another split")
    records = evenly(records, limit)
    about = {
        "model": model.name if model.is_dir() else "/".join(model.parts[-3:]),
        "manifest": "/".join(manifest.parts[-2:]),
        "split": split,
    } | machine()
    is_unet = model.suffix == ".ckpt" and "unet" in read_checkpoint(model)["hyper_parameters"]
    asked = unet_from_checkpoint(model) if is_unet else load_any(model)
    if swapped and isinstance(asked, Segmenter):
        raise LabError(f"'{model}' is of stage 0 and is asked nothing; drop --swapped")
    other = ask(asked.predict, records, 0, swapped=True) if swapped else None
    if swapped and other.empty:
        few = f", of the {limit} that --limit takes" if limit else ""
        raise LabError(f"{manifest}: no image is asked about twice{few}, so that --swapped has nothing to do; drop it")
    if isinstance(asked, Segmenter):
        frame = evaluate_boxes(asked, records)
    elif is_unet:
        frame = ask(asked.predict, records, 0).drop(columns=["box_f1", "claims"])
    else:
        frame = ask(asked.predict, records, asked.config.reasoner.max_boxes)
        frame["influence"] = frame.id.map(reasoning_influence(asked, records, frame.text))
    summary = about | summarise(frame)
    if swapped:
        gap = frame.set_index("id").dice[other.id].to_numpy() - other.dice.to_numpy()
        summary["swapped_query"] = {"mDice": round(float(other.dice.mean()), 4), "n": len(other)}
        summary["query_gap"] = {"mDice": round(float(gap.mean()), 4), "mDice_ci": bootstrap_interval(gap, other.group)}

    def mask_of(record, query):
        sample = load_sample(record)
        if isinstance(asked, Segmenter):
            return asked.segment_boxes(sample.image, lesion_boxes(sample.mask))
        return asked.predict([sample.image], [query])[0].mask

    write_report(out, summary, frame)
    draw_cases(out, frame, records, mask_of)
    overall = summary["overall"]
    print(f"mDice {overall['mDice']:.3f} {overall['mDice_ci']}, failure rate {overall['failure_rate']:.3f}, in {out}/")


def compare(base: Path, others: list[Path], *, out: Path | None = None):
    """Compare evaluations of one model, in several seeds or one, with that of a base, image by image.

    Args:
        base: Folder that core-seg evaluate wrote, of what the others are to be better than.
        others: The same of the other model, a folder a seed.
        out: JSON to write.
    """
    from lab.evaluation.compare import compare as against
    from lab.evaluation.compare import comparison_table, read_cases
    from lab.evaluation.report import machine

    comparison = against(read_cases(base), [read_cases(other) for other in others])
    if out:
        of = {folder.as_posix(): json.loads((folder / "evaluation.json").read_text()) for folder in (base, *others)}
        models = {"models": [summary["model"] for summary in of.values()], "evaluations": of}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(comparison | machine() | models, indent=1) + "\n")
    print(comparison_table(comparison))


def curves(
    runs: list[Path],
    *,
    out: Path = Path("curves.png"),
    metrics: str = "reward,dice,failure_rate,rewards/detect/mean,kl,entropy",
    smoothing: float = 0.9,
):
    """Draw metrics of runs; runs whose names differ only behind the last `-`, such as seeds, share a colour.

    Args:
        runs: Folders of runs, such as runs/tiny-grpo-0 runs/tiny-grpo-1.
        out: PNG to write.
        metrics: Names in metrics.jsonl, with commas between.
        smoothing: 0 draws what was logged; towards 1 ever smoother.
    """
    from lab.errors import LabError
    from lab.evaluation.curves import draw_curves

    if not 0 <= smoothing < 1:
        raise LabError(f"--smoothing {smoothing} is not from 0 to below 1; change it")
    groups: dict[str, list[Path]] = {}
    for run in runs:
        groups.setdefault(run.name.rpartition("-")[0] or run.name, []).append(run)
    draw_curves(out, groups, metrics.split(","), smoothing)
    print(f"wrote {out}")


def app(
    releases: Path = Path("releases"),
    *,
    runs: Path | None = Path("runs"),
    manifest: Path | None = None,
    evaluations: Path = Path("out"),
    public: bool = False,
    port: int = 7860,
):
    """Open the lab on this machine: models side by side, reward curves and rollouts.

    Args:
        releases: Folder of releases, or one release.
        runs: Folder of your runs; their checkpoints can be asked too.
        manifest: manifest.jsonl whose records can be picked, with their truth.
        evaluations: Folder below which core-seg evaluate wrote.
        public: For strangers: releases only, no runs and no manifest.
        port: On 127.0.0.1.
    """
    from apps.lab.library import Library
    from apps.lab.page import launch
    from lab.errors import LabError

    if runs is not None and not runs.is_dir():
        runs = None
    library = Library(releases, None if public else runs, None if public else manifest, [evaluations])
    if not library.models():
        raise LabError(f"there is no release in '{releases}' and no trained run; train one, or give --releases DIR")
    launch(library, port, public)


def space(out: Path, *, releases: Path = Path("releases")):
    """Assemble the folder to push to a Space on Hugging Face: the public page with releases of the tiny preset.

    Args:
        out: New folder, or an empty clone of the Space.
        releases: Folder of releases, or one release.
    """
    from apps.lab.library import Library
    from apps.space.assemble import assemble

    size = assemble(out, list(Library(releases).models().values()))
    print(f"wrote {out} ({size / 1e6:.1f} MB); commit and push it, or try it with: python {out}/app.py")


def demo(data: str = "", minutes: float = 9.0, page: bool = True, port: int = 7860):
    """Synthesise, train stages 0, 1 and 2, evaluate and open the page; finished parts are not done again.

    Args:
        data: manifest.jsonl of your own lesions (splits train, val and test); default: synthetic ones.
        minutes: For all of the training together.
        page: Open the page at the end.
        port: Of the page.
    """
    from apps.demo import run_demo

    run_demo(data, minutes, page, port)
