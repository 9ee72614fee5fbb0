"""The commands beside training. Each is a function whose arguments jsonargparse turns into flags."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal


def find(arguments: list[str]) -> Callable[[], None] | None:
    """The command that the first word (for `data`, the first two) names, bound to the rest; None for no such."""
    top = {"segment": segment, "evaluate": evaluate, "compare": compare, "curves": curves}
    top |= {"release": release, "space": space, "app": app, "demo": demo}
    data = {"synthesize": synthesize, "hard": hard, "leave-out": leave_out, "check": check, "sheet": sheet}
    data |= {"reason": reason}
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
        typed = [f"{word}=true" if word in switches else word for word in arguments[words:]]
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
        out: Folder for evaluation.json, evaluation.md, cases.csv and cases.png.
        swapped: Score once more with the query of another lesion in the same image.
        limit: Only this many records, evenly spread; 0 takes all.
    """
    from lab.baselines.unet import unet_from_checkpoint
    from lab.data.manifest import read_manifest
    from lab.data.sample import lesion_boxes
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
    if 0 < limit < len(records):
        records = [records[place * len(records) // limit] for place in range(limit)]
    about = {
        "model": model.name if model.is_dir() else "/".join(model.parts[-3:]),
        "manifest": "/".join(manifest.parts[-2:]),
        "split": split,
    } | machine()
    is_unet = model.suffix == ".ckpt" and "unet" in read_checkpoint(model)["hyper_parameters"]
    asked = unet_from_checkpoint(model) if is_unet else load_any(model)
    if isinstance(asked, Segmenter):
        frame = evaluate_boxes(asked, records)
    elif is_unet:
        frame = ask(asked.predict, records, 0).drop(columns=["box_f1", "claims"])
    else:
        frame = ask(asked.predict, records, asked.config.reasoner.max_boxes)
        frame["influence"] = frame.id.map(reasoning_influence(asked, records, frame.text))
    summary = about | summarise(frame)
    if swapped:
        if isinstance(asked, Segmenter):
            raise LabError(f"'{model}' is of stage 0 and is asked nothing; drop --swapped")
        other = ask(asked.predict, records, 0, swapped=True)
        if other.empty:
            raise LabError(f"{manifest}: no image is asked about twice, so that --swapped has nothing to do; drop it")
        gap = frame.set_index("id").dice[other.id].to_numpy() - other.dice.to_numpy()
        summary["swapped_query"] = {"mDice": round(float(other.dice.mean()), 4), "n": len(other)}
        summary["query_gap"] = {"mDice": round(float(gap.mean()), 4), "mDice_ci": bootstrap_interval(gap)}

    def mask_of(record, query):
        sample = load_sample(record)
        if isinstance(asked, Segmenter):
            return asked.segment_boxes(sample.image, lesion_boxes(sample.mask))
        return asked.predict([sample.image], [query])[0].mask

    write_report(out, summary, frame)
    draw_cases(out / "cases.png", frame, records, mask_of)
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
        of = {folder.name: json.loads((folder / "evaluation.json").read_text()) for folder in (base, *others)}
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


def release(
    checkpoint: Path,
    folder: Path,
    title: str = "CORE-Seg tiny",
    data: str = "see the run's config_fit.yaml",
    *,
    evaluations: list[Path] | None = None,
    mirrored: bool | None = None,
    threshold: float | None = None,
    corroborate: bool | None = None,
):
    """Write what can be shared of one of your own checkpoints: safetensors, config, tokenizer and card.

    Args:
        checkpoint: checkpoints/last.ckpt of a run, or a release, to be written anew.
        folder: Where to.
        title: Title of the model card.
        data: What the model was trained on, for the card.
        evaluations: Folders that core-seg evaluate wrote about it, for the card.
        mirrored: Segment the mirror image too, and average; None leaves it as the model has it.
        threshold: Probability above which a pixel is lesion; choose it on val. None leaves it as the model has it.
        corroborate: Keep only claims that the mask confirms, and draw boxes around it; None leaves it as it is.
    """
    from lab.errors import LabError
    from lab.model.release import load_any, save_release
    from lab.model.segmenter import Segmenter

    model = load_any(checkpoint)
    chosen = {"mirrored": mirrored, "threshold": threshold, "corroborate": corroborate}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    if isinstance(model, Segmenter) and chosen:
        raise LabError(f"--{next(iter(chosen))} is of stage 1 and 2, but '{checkpoint}' is of stage 0; drop it")
    vars(model.config).update(chosen)
    found = [json.loads((path / "evaluation.json").read_text()) for path in evaluations or ()]
    save_release(model, folder, title, data, evaluations=found)
    print(f"wrote {folder} ({sum(f.stat().st_size for f in folder.rglob('*') if f.is_file()) / 1e6:.1f} MB)")


def synthesize(
    out: Path, n: int = 1000, seed: int = 0, kind: Literal["plain", "reason", "track"] = "plain", size: int = 256
):
    """Write synthetic lesions with their manifest.

    Args:
        out: Folder for manifest.jsonl, images/ and masks/.
        n: Images (of `track` there are always 250 with 500 records).
        seed: 0 to 999; different seeds share no case.
        kind: `plain` asks for a lesion by name; `reason` asks for one of several; `track` is its benchmark.
        size: Side in pixels.
    """
    from lab.data.reason import write_reason, write_reason_track
    from lab.data.synthetic import write_plain
    from lab.errors import LabError

    if n < 1 or size < 64:
        raise LabError(f"--n {n} --size {size}: there must be at least 1 image of at least 64 pixels; change them")
    if kind == "track":
        path = write_reason_track(out, size)
    else:
        path = write_plain(out, n, seed, size=size) if kind == "plain" else write_reason(out, n, seed=seed, size=size)
    print(f"wrote {path}")


def hard(manifest: Path, evaluation: Path, out: str = "hard.jsonl", below: float = 0.5, others: float = 0.0):
    """Keep the records that a model finds hard: the paper's difficulty-aware filtering, by CORE-Seg itself.

    Args:
        manifest: manifest.jsonl.
        evaluation: Folder that core-seg evaluate wrote about it; records that it does not name are dropped.
        out: Name of the new manifest, beside the old one.
        below: Records whose Dice is below this are kept,
        others: and so many of the rest for each of them, evenly spread.
    """
    from lab.data.manifest import read_manifest
    from lab.evaluation.compare import read_cases

    path = beside(manifest, out)
    dice = read_cases(evaluation).set_index("id").dice
    asked = [record.id for record in read_manifest(manifest) if record.id in dice]
    kept = {name for name in asked if dice[name] < below}
    rest = [name for name in asked if name not in kept]
    wanted = min(len(rest), round(others * len(kept)))
    kept |= {rest[place * len(rest) // wanted] for place in range(wanted)}
    lines = [line for line in manifest.read_text().splitlines() if line and json.loads(line)["id"] in kept]
    path.write_text("\n".join(lines) + "\n")
    print(f"wrote {path}: {len(lines)} of {len(asked)} records")


def leave_out(manifest: Path, source: str, out: str = ""):
    """Make a manifest that trains without a source and is tested on it alone: how well a model does elsewhere.

    Args:
        manifest: manifest.jsonl.
        source: All of its records become the test split; those of other sources that were for testing are dropped.
        out: Name of the new manifest, beside the old one; without-SOURCE.jsonl where none is given.
    """
    from lab.data.manifest import read_manifest
    from lab.errors import LabError

    if source not in (sources := sorted({record.source for record in read_manifest(manifest)})):
        raise LabError(f"{manifest}: no record is of source '{source}'; choose from {', '.join(sources)}")
    path = beside(manifest, out or f"without-{source}.jsonl")
    lines = [json.loads(line) for line in manifest.read_text().splitlines() if line]
    kept = [
        line | {"split": "test" if line["source"] == source else line["split"]}
        for line in lines
        if line["source"] == source or line["split"] != "test"
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in kept))
    tested = sum(line["split"] == "test" for line in kept)
    print(f"wrote {path}: {len(kept) - tested} records to train and choose on, {tested} to test on")


def reason(
    manifest: Path,
    out: str,
    *,
    endpoint: str = "",
    model: str = "",
    judge: str = "",
    concurrency: int = 8,
    per_minute: float = 0.0,
    timeout: float = 120.0,
    price_in: float = 0.0,
    price_out: float = 0.0,
    tokens_in: int = 2500,
    tokens_out: int = 250,
    seconds: float = 6.0,
    seed: int = 0,
    limit: int = 0,
    dry_run: bool = False,
):
    """Write a manifest with reasoning: from measured facts, offline, or with --endpoint by a model, IMAGES ARE SENT.

    Beside OUT, .outcomes.jsonl tells how every record ended, and .calls.jsonl keeps the replies: start again after a
    stop, and none is paid twice. The key is read from OPENAI_API_KEY.

    Args:
        manifest: manifest.jsonl.
        out: Name of the new manifest, beside the old one.
        endpoint: URL of an OpenAI-compatible server, such as http://localhost:8000/v1. Images and masks are sent to it.
        model: Multimodal model that describes and reasons.
        judge: Model that scores each text; below 0.8 it is written again, at most three times. Empty: no judge.
        concurrency: Records at a time.
        per_minute: Requests a minute at most; 0 sets no limit.
        timeout: Seconds until a request is sent again.
        price_in: US dollars for a million tokens that are sent, for the estimate and the bill.
        price_out: The same of tokens that come back.
        tokens_in: Of one call, images included, for the estimate.
        tokens_out: The same of its reply.
        seconds: That one call takes, for the estimate.
        seed: Of the phrasings of facts.
        limit: Only this many records, evenly spread; 0 takes all.
        dry_run: Estimate calls, cost and time, and stop.
    """
    from lab.data.writer import Service, write_reasoning
    from lab.errors import LabError

    path, service = beside(manifest, out), None
    if endpoint:
        cost = (price_in, price_out, tokens_in, tokens_out, seconds)
        service = Service(endpoint, model, judge, concurrency, per_minute, timeout, *cost)
    elif model or judge:
        raise LabError("--model and --judge need --endpoint; give its URL, or drop them to write from facts")
    print(write_reasoning(manifest, path, service, limit=limit, seed=seed, dry_run=dry_run))


def beside(manifest: Path, name: str) -> Path:
    """A new file in the folder of a manifest, whose paths hold there."""
    from lab.errors import LabError

    if Path(name).name != name:
        raise LabError(f"--out '{name}' is not the name of a file; it is written beside the manifest")
    return manifest.parent / name


def check(manifest: Path):
    """Read every line, image and mask of a manifest and list what is wrong; exit code 2 when anything is.

    Args:
        manifest: manifest.jsonl.
    """
    from lab.data.manifest import ManifestError, check_pixels, read_manifest

    records = read_manifest(manifest)
    if problems := check_pixels(records):
        raise ManifestError(problems)
    print(f"{len(records)} records, all well")


def sheet(out: Path, seed: int = 0, kind: Literal["plain", "reason"] = "plain"):
    """Draw a contact sheet of synthetic lesions.

    Args:
        out: PNG to write.
        seed: Of the first case.
        kind: `plain`: looks in rows, difficulty rising to the right; `reason`: questions with their answers.
    """
    from lab.data import reason, synthetic

    out.parent.mkdir(parents=True, exist_ok=True)
    (reason if kind == "reason" else synthetic).contact_sheet(out, seed)
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
