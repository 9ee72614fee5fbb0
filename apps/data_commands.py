"""`core-seg data ...`: manifests, from what sets are distributed as to what is trained on."""

from pathlib import Path
from typing import Literal


def check(manifest: Path, workers: int = 2):
    """List all that is wrong with a manifest: lines, files, pixels, words, and what two splits share; exit code 2 then.

    Args:
        manifest: manifest.jsonl, or what core-seg data pack wrote.
        workers: Images that are read at once.
    """
    import sys

    from lab.data.check import check_manifest
    from lab.data.manifest import ManifestError

    report = check_manifest(manifest, workers)
    for warning in report.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if report.problems:
        raise ManifestError(report.problems)
    print(f"{report.lines} records, all well, {len(report.warnings)} warnings")


def stats(manifest: Path, out: Path, name: str = ""):
    """Draw how a manifest is distributed (OUT/distribution.png) and write a dataset card (OUT/README.md).

    Args:
        manifest: manifest.jsonl, or what core-seg data pack wrote.
        out: Folder for both.
        name: Title of the card; that of the manifest's folder where none is given.
    """
    from lab.data.manifest import read_manifest
    from lab.data.statistics import dataset_card, draw_statistics, frame_of

    frame = frame_of(read_manifest(manifest))
    draw_statistics(out / "distribution.png", frame)
    (out / "README.md").write_text(dataset_card(name or manifest.absolute().parent.name, frame, "distribution.png"))
    print(f"wrote {out / 'README.md'} and {out / 'distribution.png'}: {len(frame)} records")


def pack(manifest: Path, out: Path, images_per_shard: int = 1000, workers: int = 2):
    """Pack a manifest so that a million records open at once: a Parquet index, and tar shards with images and masks.

    The folder or the index is then given wherever a manifest.jsonl is. Run again, it goes on where it stopped.

    Args:
        manifest: manifest.jsonl.
        out: Folder for index.parquet and shard-*.tar; or NAME.parquet beside the manifest for an index alone.
        images_per_shard: Images in a shard, with all of their masks.
        workers: Shards that are written at once.
    """
    from lab.data.pack import pack as write
    from lab.data.packed import PackedRecords
    from lab.errors import LabError

    if images_per_shard < 1 or workers < 1:
        raise LabError("--images_per_shard and --workers must be at least 1; change them")
    index = write(manifest, out, images_per_shard, workers)
    print(f"wrote {index}: {len(PackedRecords(index))} records")


def filter_by_difficulty(
    manifest: Path,
    out: Path,
    name: str = "difficult.jsonl",
    share: float = 0.0,
    folds: int = 5,
    steps: int = 400,
    size: int = 128,
    batch_size: int = 16,
    seed: int = 0,
):
    """Keep what is hard for a U-Net that has not seen it: the paper's filter; each fold is kept, so that it can resume.

    Args:
        manifest: manifest.jsonl; all splits are scored, and a group is never scored by a model that trained on it.
        out: Folder for scores.csv, filter.json and the plots errors.png and kept.png.
        name: Of the manifest of what is kept, beside the old one; random-NAME has as many of each split at random.
        share: 0 keeps what lies beyond the knee of the errors' power law; else the hardest such share.
        folds: Parts of the data; every one is scored by a U-Net trained on the others.
        steps: Optimiser steps of each U-Net.
        size: Side of its input in pixels, a multiple of 8.
        batch_size: Images a step.
        seed: Of folds, weights and draws.
    """
    from lab.data.difficulty import Settings
    from lab.data.knee import filter_manifest
    from lab.data.manifest import Derived
    from lab.errors import LabError

    settings = Settings(folds, steps, size, batch_size, seed)
    if folds < 2 or steps < 2 or batch_size < 2 or size < 32 or size % 8 or not 0 <= share < 1:
        raise LabError(
            f"{settings}, share {share}: folds, steps and images a step are at least 2, size is a multiple of 8 from 32"
            " on, and share lies from 0 to below 1; change them"
        )
    hard, control = Derived(manifest, name), Derived(manifest, f"random-{name}")
    told = filter_manifest(hard, control, out, settings, share)
    fit = told["fit"]
    print(f"knee {fit['knee']:.3f} of a power law with alpha {fit['alpha']:.2f} from {fit['xmin']:.3f}")
    print(f"wrote {hard.path}: {told['kept']} of {told['records']} records, and {control.path} as its control")


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


def convert(name: str, root: Path, out: Path, *, jobs: int = 0, size: int = 1024, slices: int = 0):
    """Convert a public set, as it was unpacked, to a manifest; a run that was stopped goes on where it was.

    Args:
        name: Such as busi, lits or siim_acr (any other word lists them), or a YAML file that describes your own set:
            configs/convert/pairs.yaml, configs/convert/volumes.yaml.
        root: Folder that holds the set.
        out: Folder for manifest.jsonl, images/, masks/ and skipped.jsonl, which says what could not be used and why.
        jobs: Processes; 0 for one a core.
        size: Longest side of what is written, in pixels; 0 keeps every size.
        slices: Of a volume, for each lesion class; 0 leaves it to the set's description.
    """
    import os

    from lab.data.convert.run import convert as run
    from lab.data.convert.sets import SETS
    from lab.data.convert.source import read_description
    from lab.errors import LabError

    if name not in SETS and not name.endswith((".yaml", ".yml")):
        raise LabError(f"no set is called '{name}'; choose from {', '.join(SETS)}, or give a YAML file")
    source = SETS[name] if name in SETS else read_description(Path(name))
    done = run(source, root, out, jobs=jobs or os.cpu_count() or 1, size=size, most=slices)
    splits = ", ".join(f"{number} {split}" for split, number in sorted(done.splits.items()))
    print(f"wrote {out / 'manifest.jsonl'}: {done.records} records ({splits})")
    print(
        f"found {done.found} cases = {done.written} written + {done.skipped} skipped; of those written {done.left_out} "
        f"slices or lesions were left out ({out / 'skipped.jsonl'}); near-duplicates joined {done.joined} groups"
    )


def hard(manifest: Path, evaluation: Path, out: str = "hard.jsonl", below: float = 0.5, others: float = 0.0):
    """Keep the records that a model finds hard: the paper's difficulty-aware filtering, by CORE-Seg itself.

    Args:
        manifest: manifest.jsonl.
        evaluation: Folder that core-seg evaluate wrote about it; records that it does not name are dropped.
        out: Name of the new manifest, beside the old one.
        below: Records whose Dice is below this are kept,
        others: and so many of the rest for each of them, evenly spread.
    """
    from lab.data.manifest import Derived, read_manifest
    from lab.evaluation.compare import read_cases

    derived = Derived(manifest, out)
    dice = read_cases(evaluation).set_index("id").dice
    asked = [record.id for record in read_manifest(manifest) if record.id in dice]
    kept = {name for name in asked if dice[name] < below}
    rest = [name for name in asked if name not in kept]
    wanted = min(len(rest), round(others * len(kept)))
    kept |= {rest[place * len(rest) // wanted] for place in range(wanted)}
    derived.write(dict.fromkeys(kept, {}))
    print(f"wrote {derived.path}: {len(kept)} of {len(asked)} records")


def leave_out(manifest: Path, source: str, out: str = ""):
    """Make a manifest that trains without a source and is tested on it alone: how well a model does elsewhere.

    Args:
        manifest: manifest.jsonl.
        source: All of its records become the test split; those of other sources that were for testing are dropped.
        out: Name of the new manifest, beside the old one; without-SOURCE.jsonl where none is given.
    """
    from lab.data.manifest import Derived, read_manifest
    from lab.errors import LabError

    derived = Derived(manifest, out or f"without-{source}.jsonl")
    records = read_manifest(manifest)
    if source not in (sources := sorted({record.source for record in records})):
        raise LabError(f"{manifest}: no record is of source '{source}'; choose from {', '.join(sources)}")
    tested = {record.id: {"split": "test"} for record in records if record.source == source}
    others = {record.id: {} for record in records if record.source != source and record.split != "test"}
    derived.write(tested | others)
    print(f"wrote {derived.path}: {len(others)} records to train and choose on, {len(tested)} to test on")


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
    from lab.data.manifest import Derived
    from lab.data.writer import Service, write_reasoning
    from lab.errors import LabError

    derived, service = Derived(manifest, out), None
    if endpoint:
        cost = (price_in, price_out, tokens_in, tokens_out, seconds)
        service = Service(endpoint, model, judge, concurrency, per_minute, timeout, *cost)
    elif model or judge:
        raise LabError("--model and --judge need --endpoint; give its URL, or drop them to write from facts")
    print(write_reasoning(derived, service, limit=limit, seed=seed, dry_run=dry_run))


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
