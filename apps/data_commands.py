"""Commands about a manifest as a whole: is it right, what is in it, how is it opened, what of it is hard."""

from pathlib import Path


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
    from apps.commands import beside
    from lab.data.difficulty import Settings
    from lab.data.knee import filter_manifest
    from lab.errors import LabError

    settings = Settings(folds, steps, size, batch_size, seed)
    if folds < 2 or steps < 2 or batch_size < 2 or size < 32 or size % 8 or not 0 <= share < 1:
        raise LabError(
            f"{settings}, share {share}: folds, steps and images a step are at least 2, size is a multiple of 8 from 32"
            " on, and share lies from 0 to below 1; change them"
        )
    hard, control = beside(manifest, name), beside(manifest, f"random-{name}")
    told = filter_manifest(manifest, out, settings, share, hard, control)
    fit = told["fit"]
    print(f"knee {fit['knee']:.3f} of a power law with alpha {fit['alpha']:.2f} from {fit['xmin']:.3f}")
    print(f"wrote {hard}: {told['kept']} of {told['records']} records, and {control} as its control")
