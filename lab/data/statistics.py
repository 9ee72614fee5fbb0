"""How a data set is distributed: the paper's figure, and a dataset card for people and for the Hugging Face Hub."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import yaml

from lab.data.facts import SIZES
from lab.data.manifest import SPLITS
from lab.data.sample import Record

SIZE_CATEGORIES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
"""Upper bounds of the number of records, in the Hub's words."""
HUB_LICENSES = {"cc0": "cc0-1.0", "apache-2.0": "apache-2.0", "mit": "mit"} | {
    f"cc {kind} 4.0": f"cc-{kind}-4.0" for kind in ("by", "by-sa", "by-nc", "by-nc-sa", "by-nd", "by-nc-nd")
}
"""Licences in a manifest's words, lower case, and in the Hub's."""
FEW = 50
"""Records below which a figure about a source says little."""
COLUMNS = ("image", "modality", "anatomy", "lesion", "source", "license", "split", "group", "mask_fraction")
COLORS = {"train": "#2563eb", "val": "#d97706", "test": "#059669"}


def frame_of(records: Sequence[Record]) -> pd.DataFrame:
    """One row a record: `COLUMNS`, `pixels` (width x height) and `words` (of the reasoning)."""
    rows = [
        [str(r.image) if name == "image" else getattr(r, name) for name in COLUMNS]
        + [r.width * r.height, len(r.reasoning.split())]
        for r in records
    ]
    return pd.DataFrame(rows, columns=[*COLUMNS, "pixels", "words"])


def draw_statistics(path: Path, frame: pd.DataFrame) -> None:
    """The paper's figure: records by modality, anatomy, lesion and lesion size.

    Args:
        path: Of the PNG.
        frame: Of `frame_of`.
    """
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(13, 10), layout="constrained")
    bars(axes[0, 0], frame, "modality")
    bars(axes[0, 1], frame, "anatomy")
    bars(axes[1, 0], frame, "lesion")
    with_lesion = frame[frame.mask_fraction > 0]
    edges = np.geomspace(max(1e-5, with_lesion.mask_fraction.min()), 1, 41) if len(with_lesion) else [0, 1]
    parts = [with_lesion[with_lesion.split == split].mask_fraction for split in SPLITS]
    axes[1, 1].hist(parts, edges, stacked=True, color=[COLORS[split] for split in SPLITS], label=SPLITS)
    axes[1, 1].set(xscale="log", title="Lesion size", xlabel="share of the image", ylabel="records")
    if len(with_lesion):
        median = with_lesion.mask_fraction.median()
        axes[1, 1].axvline(median, color="black", linestyle="--", linewidth=1, label=f"median {median:.2%}")
    axes[1, 1].legend(frameon=False)
    figure.suptitle(f"{len(frame):,} records, {frame.image.nunique():,} images, {frame.source.nunique()} sources")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def bars(axis: "matplotlib.axes.Axes", frame: pd.DataFrame, name: str, most: int = 31) -> None:
    """Records by one column, most frequent on top, split by split; the paper has 31 diseases."""
    table = pd.crosstab(frame[name], frame.split).reindex(columns=list(SPLITS), fill_value=0)
    table = table.loc[table.sum(axis=1).sort_values(ascending=False, kind="stable").index]
    if rest := max(0, len(table) - most):
        others = table.iloc[most:].sum().rename(f"{rest} others")
        table = pd.concat([table.iloc[:most], others.to_frame().T])
    left = np.zeros(len(table))
    names = [f"{value}  {count / len(frame):.1%}" for value, count in table.sum(axis=1).items()]
    for split in SPLITS:
        axis.barh(names, table[split], left=left, color=COLORS[split], label=split)
        left += table[split].to_numpy()
    axis.invert_yaxis()
    axis.tick_params(axis="y", labelsize=9 if len(table) <= 20 else 7)
    axis.set(title=name.capitalize(), xlabel="records")
    axis.grid(axis="x", alpha=0.3)


def dataset_card(name: str, frame: pd.DataFrame, figure: str) -> str:
    """A dataset card in Markdown with the Hub's front matter; every figure in it is counted from the records.

    Args:
        name: Of the data set.
        frame: Of `frame_of`.
        figure: File name of the picture of `draw_statistics`.
    """
    licenses = sorted(frame.license.unique())
    known = HUB_LICENSES.get(licenses[0].lower()) if len(licenses) == 1 else None
    category = next((word for bound, word in SIZE_CATEGORIES if len(frame) < bound), "n>1M")
    splits = [split for split in SPLITS if (frame.split == split).any()]
    sizes = [{"name": split, "num_examples": int((frame.split == split).sum())} for split in splits]
    front = {
        "pretty_name": name,
        "license": known or "other",
        **({} if known else {"license_name": "terms-of-the-sources"}),
        "language": ["en"],
        "task_categories": ["image-segmentation", "visual-question-answering"],
        "tags": ["medical", "lesion-segmentation", "reasoning"],
        "size_categories": [category],
        "dataset_info": {"splits": sizes},
    }
    counts = {f"{split}": frame[frame.split == split] for split in splits}
    reasoned = (frame.words > 0).mean()
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(),
        "---",
        f"# {name}",
        "",
        "**Research use only. Not for diagnosis.** Lesions to be segmented as a query asks, for models that reason "
        "before they segment (CORE-Seg, arXiv 2603.05911).",
        "",
        f"![modality, anatomy, lesion and lesion size]({figure})",
        "",
        "## Sizes",
        "| split | records | images | groups | without lesion |",
        "|---|---|---|---|---|",
        *(
            f"| {split} | {len(part):,} | {part.image.nunique():,} | {part.group.nunique():,} "
            f"| {(part.lesion == 'none').sum():,} |"
            for split, part in {**counts, "all": frame}.items()
        ),
        "",
        "A group (a patient, a case, near-duplicates) stays in one split.",
        "",
        "## Sources and licences",
        "| source | modality | anatomy | " + " | ".join(splits) + " | licence |",
        "|---|---|---|" + "---|" * (len(splits) + 1),
    ]
    for source, part in frame.groupby("source"):
        of_split = " | ".join(f"{(part.split == split).sum():,}" for split in splits)
        named = [", ".join(sorted(part[column].unique())) for column in ("modality", "anatomy")]
        lines.append(f"| {source} | {' | '.join(named)} | {of_split} | {'; '.join(sorted(part.license.unique()))} |")
    lines += ["", "## Statistics"]
    for column in ("modality", "anatomy", "lesion"):
        shares = frame[column].value_counts(normalize=True)
        lines.append(f"- {column} ({len(shares)}): " + ", ".join(f"{key} {share:.1%}" for key, share in shares.items()))
    fractions = frame[frame.mask_fraction > 0].mask_fraction
    if len(fractions):
        low, middle, high = fractions.quantile([0.05, 0.5, 0.95])
        lines.append(f"- lesion, share of the image: median {middle:.2%}, 5 % to 95 %: {low:.3%} to {high:.1%}")
        words = pd.cut(fractions, [0, *(bound for bound, _ in SIZES)], labels=[word for _, word in SIZES], right=False)
        lines.append("- lesion, in words: " + ", ".join(f"{k} {s:.1%}" for k, s in sized(words).items()))
    megapixels = frame.pixels / 1e6
    lines.append(f"- image: median {megapixels.median():.2f} megapixels, largest {megapixels.max():.2f}")
    written = f", median {frame.words[frame.words > 0].median():.0f} words" if reasoned else ""
    lines.append(f"- reasoning: written for {reasoned:.1%} of the records{written}")
    lines += ["", "## Terms", *terms(licenses), "", "## Limits", *limits(frame), ""]
    return "\n".join(lines)


def sized(words: pd.Series) -> pd.Series:
    """Share of each word, in the order of size."""
    return words.value_counts(normalize=True, sort=False)


def terms(licenses: list[str]) -> list[str]:
    """What a user of all sources together is held to, as far as the names of the licences tell."""
    text = " ".join(licenses).lower()
    lines = [f"- Each record keeps its own licence, of which there are {len(licenses)} (table above)."]
    if any(mark in text for mark in ("-nc", "non-commercial", "noncommercial", "research")):
        lines.append("- Some sources forbid commercial use: so do the whole, and what is trained on it.")
    if "-sa" in text or "share alike" in text:
        lines.append("- Some sources ask for share alike: pass the whole on under the same terms.")
    if "-nd" in text:
        lines.append("- Some sources forbid derivatives: do not pass on changed images of these.")
    return [*lines, "- Cite every source beside this data set."]


def limits(frame: pd.DataFrame) -> list[str]:
    """What the figures cannot say, counted from the records."""
    lines = []
    by_source = pd.crosstab(frame.source, frame.split)
    untested = [source for source, row in by_source.iterrows() if not row.get("test", 0)]
    unseen = [source for source, row in by_source.iterrows() if row.get("test", 0) and not row.get("train", 0)]
    few = [f"{source} ({count})" for source, count in by_source.get("test", pd.Series()).items() if 0 < count < FEW]
    if untested:
        lines.append(f"- Not tested on: {', '.join(untested)}.")
    if unseen:
        lines.append(f"- Tested on but not trained on: {', '.join(unseen)}.")
    if few:
        lines.append(f"- Fewer than {FEW} test records, so that their figures have wide intervals: {', '.join(few)}.")
    sources_of = frame[frame.lesion != "none"].groupby("lesion").source.nunique()
    if frame.source.nunique() > 1 and (alone := int((sources_of == 1).sum())):
        lines.append(
            f"- {alone} of {len(sources_of)} lesions come from one source only: a model can tell them by its look."
        )
    empty = (frame.lesion == "none").mean()
    lines.append(f"- {empty:.1%} of the records are without a lesion; no clinic's share is meant.")
    lines.append("- Masks are as good as their annotators; readers differ, and this card does not say by how much.")
    return lines
