"""Whether one model is better than another on the same images: paired, with intervals, over several seeds."""

from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import wilcoxon

from lab.errors import LabError
from lab.evaluation.metrics import bootstrap_interval


def read_cases(folder: Path) -> pd.DataFrame:
    """The `cases.csv` that an evaluation left in a folder, one row an image.

    Raises:
        LabError: When there is none.
    """
    path = folder / "cases.csv"
    if not path.is_file():
        raise LabError(f"'{path}' does not exist; give folders that core-seg evaluate wrote")
    cases = pd.read_csv(path, converters={"id": str, "group": str})  # also where they look like numbers
    return cases if "group" in cases else cases.assign(group=cases.id)  # of an evaluation before there were groups


def compare(base: pd.DataFrame, others: list[pd.DataFrame]) -> dict:
    """Each of `others` (one model, several seeds) against `base`, on the images that all were asked about.

    Args:
        base: Frame of `lab.evaluation.run.evaluate`.
        others: The same of the other model's seeds.

    Returns:
        `base` (mDice, failure_rate, n), `seeds` and `mean`, the images' mean over seeds: mDice, failure_rate, `gain`
        (mean per-image difference of Dice), `gain_ci` (95 %, bootstrap over groups), `failures_removed` (1 - failure
        rate / base's; None when base never fails) and `p`, of Wilcoxon's signed-rank test on the groups' mean gains (1
        when all are equal).

    Raises:
        LabError: When the images are not the same.
    """
    base = base.set_index("id")
    seeds = [other.set_index("id") for other in others]
    if any(set(seed.index) != set(base.index) for seed in seeds):
        raise LabError("the evaluations are not of the same images; compare the same manifest, split and limit")
    seeds = [seed.loc[base.index] for seed in seeds]
    dice, failed = (np.mean([seed[name].to_numpy(float) for seed in seeds], axis=0) for name in ("dice", "failed"))
    return {
        "base": {"mDice": _rounded(base.dice), "failure_rate": _rounded(base.failed), "n": len(base)},
        "seeds": [_against(base, seed.dice.to_numpy(float), seed.failed.to_numpy(float)) for seed in seeds],
        "mean": _against(base, dice, failed),
    }


def _against(base: pd.DataFrame, dice: np.ndarray, failed: np.ndarray) -> dict:
    gain = (dice - base.dice.to_numpy(float)).round(9)  # a mean over equal seeds is not equal to the last digit
    of_groups = pd.Series(gain).groupby(base.group.to_numpy()).mean()
    return {
        "mDice": _rounded(dice),
        "failure_rate": _rounded(failed),
        "gain": _rounded(gain),
        "gain_ci": bootstrap_interval(gain, base.group),
        "failures_removed": round(1 - failed.mean() / base.failed.mean(), 3) if base.failed.any() else None,
        "p": float(f"{wilcoxon(of_groups).pvalue:.2g}") if of_groups.any() else 1.0,
    }


def _rounded(values: np.ndarray | pd.Series) -> float:
    return round(float(np.mean(values)), 4)


def comparison_table(comparison: dict) -> str:
    """Markdown: a row for the base, each seed, and their mean."""
    base = comparison["base"]
    lines = [
        f"| on {base['n']} images | mDice | failure rate | gain in Dice (95 %) | failures removed | Wilcoxon p |",
        "|---|---|---|---|---|---|",
        f"| base | {base['mDice']:.3f} | {base['failure_rate']:.1%} | | | |",
    ]
    rows = [(f"seed {place}", row) for place, row in enumerate(comparison["seeds"])]
    for name, row in [*rows, ("mean of the seeds", comparison["mean"])][: 1 if len(rows) == 1 else None]:
        removed = "" if row["failures_removed"] is None else f"{row['failures_removed']:.0%}"
        low, high = row["gain_ci"]
        lines.append(
            f"| {name} | {row['mDice']:.3f} | {row['failure_rate']:.1%} | "
            f"{row['gain']:+.3f} ({low:+.3f} to {high:+.3f}) | {removed} | {row['p']:.2g} |"
        )
    return "\n".join(lines)
