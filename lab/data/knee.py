"""From errors to what is kept: a power law (Clauset et al. 2009), its knee (Satopaa et al. 2011), and the pictures."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import powerlaw
from kneed import KneeLocator

from lab.data.difficulty import Settings, cross_validated
from lab.data.manifest import Derived, read_manifest
from lab.errors import LabError
from lab.evaluation.report import machine

ALPHAS = [1.001, 50.0]
"""Exponents that are looked for; the package's own upper bound of 3 is too low for errors, which end at 1."""


TAIL = 0.9
"""Where a tail begins at the latest, as a share of the largest error: the errors of lesions that were not found at all
pile up at 1, and a tail of that pile alone fits any steep law, with a knee that tells nothing apart."""


@dataclass(frozen=True)
class Fit:
    """A power law `p(error) ~ error ** -alpha` from `xmin` on, and the knee of its tail."""

    alpha: float
    xmin: float
    """Error from which the law holds, where the Kolmogorov-Smirnov distance is smallest."""
    distance: float
    """That distance, 0..1."""
    lognormal_ratio: float
    """Log-likelihood ratio against a log-normal tail, normalised: below 0 the log-normal fits better,"""
    lognormal_p: float
    """and with which p-value the sign of the ratio is chance."""
    knee: float
    """Error beyond which a record is hard."""

    def tail(self, error: np.ndarray) -> np.ndarray:
        """Share of the records from `xmin` on whose error is at least this, by the law."""
        return (error / self.xmin) ** (1 - self.alpha)


def fit_errors(errors: np.ndarray) -> Fit:
    """Fit the errors' tail and find its knee by Kneedle, on the law's complementary cumulative distribution.

    Args:
        errors: (N,) in 0..1; those of 0 are left out, as they have no place in a power law.

    Raises:
        LabError: Errors that no law can be fitted to.
    """
    some = errors[errors > 0]
    if len(np.unique(some)) < 10:
        raise LabError("fewer than 10 different errors make no distribution; give more records, or raise --steps")
    # not every value is tried as xmin, as the package would: that takes minutes
    candidates = np.unique(np.quantile(some, np.linspace(0, 0.95, 96), method="lower"))
    candidates = candidates[candidates <= TAIL * some.max()]
    if not len(candidates):
        raise LabError("nearly all errors are as large as the largest, which is no distribution; raise --steps")
    fits = [powerlaw.Fit(some, xmin=xmin, parameter_ranges={"alpha": ALPHAS}, verbose=0) for xmin in candidates]
    found = min(fits, key=lambda fit: fit.power_law.D)
    ratio, p = found.distribution_compare("power_law", "lognormal", normalized_ratio=True)
    law = found.power_law
    without_knee = Fit(float(law.alpha), float(found.xmin), float(law.D), float(ratio), float(p), np.nan)
    grid = np.linspace(without_knee.xmin, some.max(), 2000)
    knee = KneeLocator(grid, without_knee.tail(grid), curve="convex", direction="decreasing").knee
    if knee is None:
        raise LabError("the power law of the errors has no knee; choose by --share instead")
    return Fit(**without_knee.__dict__ | {"knee": float(knee)})


def hardest(scores: pd.DataFrame, fit: Fit, share: float) -> pd.Series:
    """Which records are kept, (N,) bool: those beyond the knee, or if `share` is above 0 the hardest such share of all
    splits together."""
    if share == 0:
        return scores.error > fit.knee
    order = scores.sort_values(["error", "id"], ascending=[False, True], kind="stable").index
    return scores.index.isin(order[: round(share * len(scores))])


def as_many_at_random(scores: pd.DataFrame, kept: np.ndarray, seed: int) -> np.ndarray:
    """(N,) bool: as many records of every split as are kept, drawn at random: what the hard ones are compared with."""
    rng, chosen = np.random.default_rng(seed), np.zeros(len(scores), bool)
    for split in sorted(scores.split.unique()):
        places = np.flatnonzero(scores.split == split)
        chosen[rng.choice(places, int(kept[places].sum()), replace=False)] = True
    return chosen


def draw_fit(path: Path, errors: np.ndarray, fit: Fit) -> None:
    """The histogram of the errors and their tail, with the power law and its knee."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 4.6), layout="constrained")
    counts, edges, _ = left.hist(errors, np.linspace(0, 1, 51), color="#94a3b8", label=f"{len(errors):,} records")
    in_tail = (errors >= fit.xmin).sum()
    grid = np.linspace(fit.xmin, max(errors.max(), fit.xmin), 200)
    density = (fit.alpha - 1) / fit.xmin * (grid / fit.xmin) ** -fit.alpha
    law = f"power law, alpha {fit.alpha:.2f} from {fit.xmin:.2f}"
    left.plot(grid, in_tail * (edges[1] - edges[0]) * density, color="#2563eb", label=law)
    left.set(xlabel="error (1 - Dice) of a U-Net that has not seen it", ylabel="records", ylim=(0, 1.1 * counts.max()))
    ordered = np.sort(errors[errors > 0])
    share = 1 - np.arange(len(ordered)) / len(ordered)
    right.loglog(ordered, share, color="#64748b", label="records")
    right.loglog(grid, in_tail / len(ordered) * fit.tail(grid), color="#2563eb", label=law)
    right.set(xlabel="error", ylabel="share with at least this error")
    for axis in (left, right):
        axis.axvline(fit.knee, color="#dc2626", linestyle="--", label=f"knee {fit.knee:.2f}")
        axis.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_kept(path: Path, scores: pd.DataFrame) -> None:
    """How many records of every source are kept, and the spread of their errors."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    by_source = scores.groupby("source")
    order = by_source.kept.mean().sort_values().index
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 1.5 + 0.45 * len(order)), layout="constrained")
    sizes, hard = by_source.size()[order], by_source.kept.sum()[order]
    names = [f"{source}  {hard[source] / sizes[source]:.0%}" for source in order]
    left.barh(names, hard, color="#dc2626", label="kept")
    left.barh(names, sizes - hard, left=hard, color="#cbd5e1", label="left out")
    left.set(xlabel="records")
    left.legend(loc="lower right")
    right.boxplot([by_source.get_group(source).error for source in order], orientation="horizontal", widths=0.6)
    right.set_yticks(range(1, len(order) + 1), order)
    right.set(xlabel="error (1 - Dice)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def filter_manifest(hard: Derived, control: Derived, out: Path, settings: Settings, share: float) -> dict:
    """Score the records of a manifest, and write what is kept, its control of as many at random, and the reasons.

    Args:
        hard: Of the manifest that is scored, what is kept, to be written.
        control: Of the same one, as many at random, to be written.
        out: Folder for `fold-K.csv`, `scores.csv`, `filter.json`, `errors.png` and `kept.png`.
        settings: Of the cross-validation.
        share: See `hardest`.

    Returns:
        What is in `filter.json`: settings, fit, and how many are kept of every source and split.
    """
    scores = cross_validated(read_manifest(hard.manifest), settings, out)
    fit = fit_errors(scores.error.to_numpy())
    scores["kept"] = hardest(scores, fit, share)
    scores.to_csv(out / "scores.csv", index=False)
    draw_fit(out / "errors.png", scores.error.to_numpy(), fit)
    draw_kept(out / "kept.png", scores)
    at_random = as_many_at_random(scores, scores.kept.to_numpy(), settings.seed)
    for derived, chosen in ((hard, scores.kept), (control, at_random)):
        derived.write(dict.fromkeys(scores.id[chosen], {}))
    told = {"settings": asdict(settings) | {"share": share}, "fit": asdict(fit), "records": len(scores)}
    told |= {"kept": int(scores.kept.sum()), "by": {name: kept_of(scores, name) for name in ("source", "split")}}
    (out / "filter.json").write_text(json.dumps(told | machine(), indent=1) + "\n")
    return told


def kept_of(scores: pd.DataFrame, column: str) -> dict[str, dict[str, int]]:
    """By the values of a column: how many records there are, and how many are kept."""
    return {value: {"records": len(part), "kept": int(part.kept.sum())} for value, part in scores.groupby(column)}
