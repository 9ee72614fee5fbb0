"""Curves of runs, from what they left in metrics.jsonl: several runs, several metrics, one picture."""

import json
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd

from lab.errors import LabError


def read_metrics(run: Path) -> pd.DataFrame:
    """A run's `metrics.jsonl`: one row a step, one column a metric (NaN where it was not logged), `time` in seconds.

    Raises:
        LabError: When there is none.
    """
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise LabError(f"'{path}' does not exist; give folders of runs, such as runs/tiny-grpo")
    lines = pd.DataFrame([json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")])
    return lines.groupby("step", as_index=False).last() if len(lines) else pd.DataFrame({"step": [], "time": []})


def smoothed(values: pd.Series, weight: float) -> pd.Series:
    """Exponential moving average with TensorBoard's meaning of `weight` (0 none, below 1), without its bias."""
    return values.ewm(alpha=1 - weight, adjust=True).mean()


def draw_curves(path: Path, groups: dict[str, list[Path]], metrics: list[str], weight: float = 0.9) -> None:
    """A panel a metric and a colour a group: the mean over its runs, smoothed; each run as it was is faint behind.

    Args:
        path: Of the PNG.
        groups: Label to the runs that it stands for, such as the seeds of one configuration.
        metrics: Columns of `read_metrics`.
        weight: Of the smoothing.

    Raises:
        LabError: For a metric that no run logged.
    """
    matplotlib.use("Agg")
    from matplotlib import pyplot

    frames = {label: [read_metrics(run) for run in runs] for label, runs in groups.items()}
    known = sorted({name for runs in frames.values() for frame in runs for name in frame.columns})
    for metric in metrics:
        if metric not in known:
            raise LabError(f"no run logged '{metric}'; choose from {', '.join(known)}")
    columns = min(3, len(metrics))
    rows = -(-len(metrics) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(5 * columns, 3.4 * rows), layout="constrained", squeeze=False
    )
    for axis, metric in zip(axes.flat, metrics):
        for number, (label, runs) in enumerate(frames.items()):
            curves = [frame.set_index("step")[metric].dropna() for frame in runs if metric in frame]
            for curve in curves:
                axis.plot(curve.index, curve, color=f"C{number}", alpha=0.15, linewidth=0.7)
            if curves:
                smooth = pd.concat([smoothed(curve, weight) for curve in curves], axis=1)
                axis.plot(smooth.index, smooth.mean(axis=1), color=f"C{number}", label=label)
                if len(curves) > 1:
                    axis.fill_between(
                        smooth.index, smooth.min(axis=1), smooth.max(axis=1), color=f"C{number}", alpha=0.2
                    )
        shown = np.concatenate(
            [line.get_ydata()[len(line.get_ydata()) // 20 :] for line in axis.lines if line.get_label()[0] != "_"]
        )
        margin = 0.5 * (np.nanmax(shown) - np.nanmin(shown)) or 0.05
        axis.set_ylim(np.nanmin(shown) - margin, np.nanmax(shown) + margin)
        axis.set(title=metric, xlabel="optimiser step")
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(metrics) :]:
        axis.axis("off")
    axes.flat[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
