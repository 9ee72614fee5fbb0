"""The Rollouts tab: what a run sampled, what each completion earned and why; and how single cases change."""

from pathlib import Path

import cv2
import gradio as gr
import numpy as np
import pandas as pd

from apps.lab import views
from apps.lab.library import Library, read_config
from lab.data.augment import view
from lab.data.facts import Facts, measure
from lab.data.images import load_sample
from lab.data.sample import Sample
from lab.errors import LabError
from lab.evaluation.report import contoured
from lab.grpo.objective import SPREAD
from modules.rollouts import read_mask

SORTS = ("as sampled", "highest reward first", "lowest reward first", "widest spread first")
COLOURS = {"format": "#2563eb", "detect": "#d97706", "segment": "#059669", "faithful": "#7c3aed"}
THUMBNAIL = 160


def steps_of(run: Path, kind: str) -> list[int]:
    """The steps that `rollouts/<kind>_*.parquet` of a run hold; kind is `step` or `followed`."""
    return sorted(int(path.stem.rpartition("_")[2]) for path in (run / "rollouts").glob(f"{kind}_[0-9]*.parquet"))


def read_rollouts(run: Path, kind: str, step: int) -> pd.DataFrame:
    """The rows of one file; `LabError` where there is none."""
    if step not in steps_of(run, kind):
        raise LabError(f"run '{run.name}' has no rollouts of step {step!r}; choose one from the list")
    return pd.read_parquet(run / "rollouts" / f"{kind}_{step:06d}.parquet")


def groups_of(rows: pd.DataFrame, sort: str, silent: bool) -> list[pd.DataFrame]:
    """The groups of a step.

    Args:
        rows: Of `read_rollouts`.
        sort: One of `SORTS`.
        silent: Only groups whose rewards are all equal, from which nothing was learnt.
    """
    groups = [group for _, group in rows.groupby(["id", "view", "query"], sort=False)]
    if silent:
        groups = [group for group in groups if not group.reward.std() > SPREAD]
    order = {
        "highest reward first": lambda group: -group.reward.mean(),
        "lowest reward first": lambda group: group.reward.mean(),
        "widest spread first": lambda group: -group.reward.std(),
    }
    return sorted(groups, key=order[sort]) if sort in order else groups


def weights_of(run: Path) -> dict[str, float]:
    """What each reward of a run counts for in the sum."""
    config = read_config(run)
    return {name: float(config.get(f"model.init_args.rewards.{name}", name != "faithful")) for name in COLOURS}


def reward_bar(row: dict, weights: dict[str, float]) -> str:
    """The parts of a reward as one bar, as they count; a full bar is 5, what the default rewards can add up to."""
    parts = {name.removeprefix("reward_"): value for name, value in row.items() if name.startswith("reward_")}
    words = ", ".join(f"{name} {value:.2f}" for name, value in parts.items())
    bars = "".join(
        f'<i style="width:{max(0, weights[name] * value) * 20:.1f}%;background:{COLOURS[name]}"></i>'
        for name, value in parts.items()
        if weights[name]
    )
    return f'<div class="bar" title="{words}">{bars}</div>'


def thumbnail(sample: Sample | None, mask: np.ndarray) -> np.ndarray:
    """The sampled mask over its image, or alone where the image is not at hand; at most `THUMBNAIL` pixels."""
    height, width = mask.shape
    if sample is None:
        picture = np.repeat((mask * 255).astype(np.uint8)[..., None], 3, axis=2)
    else:
        height, width = sample.mask.shape
        resized = cv2.resize(mask.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST) > 0
        picture = contoured(sample.image, sample.mask, resized)
    scale = THUMBNAIL / max(height, width)
    return cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)


def completion_card(row: dict, sample: Sample | None, facts: Facts | None, weights: dict[str, float]) -> str:
    """HTML of one completion: mask, rewards, advantage, and its text to unfold."""
    kind = "good" if row["advantage"] > 0 else "poor" if row["advantage"] < 0 else ""
    picture, bar = views.data_uri(thumbnail(sample, read_mask(row))), reward_bar(row, weights)
    return (
        f'<div class="completion"><img src="{picture}" alt="mask of completion {row["slot"]}">{bar}'
        f'reward {row["reward"]:.2f}<br>advantage <span class="{kind}">{row["advantage"]:+.2f}</span>'
        f"<br>Dice {row['dice']:.3f}"
        f"<details><summary>text</summary>{views.reasoning(row['completion'], facts)}</details></div>"
    )


def build(library: Library) -> gr.Dropdown:
    """The tab; returns the choice of a run."""

    def sample_of(run: Path, row: dict | pd.Series) -> Sample | None:
        record = library.records_of(run).get(row["id"])
        return view(load_sample(record), int(row.get("view", 0))) if record else None

    def pick(name: str | None):
        run = library.run(name)
        steps, followed = steps_of(run, "step"), steps_of(run, "followed")
        names = sorted(set(read_rollouts(run, "followed", followed[-1]).id)) if followed else []
        return (
            gr.Dropdown(steps, value=steps[-1] if steps else None),
            gr.Dropdown(names, value=names[0] if names else None),
            gr.Slider(0, max(1, len(followed) - 1), value=0, step=1),
        )

    def show(name: str | None, step: int | None, sort: str, silent: bool) -> str:
        if name is None or step is None:
            return "<p>This run has no rollouts: only stage 2 writes them.</p>"
        run = library.run(name)
        groups, weights = groups_of(read_rollouts(run, "step", step), sort, silent), weights_of(run)
        if not groups:
            return "<p>No such group at this step: every one of them taught something.</p>"
        parts = []
        for group in groups:
            first = group.iloc[0]
            sample = sample_of(run, first)
            facts = measure(sample.image, sample.mask) if sample else None
            cards = "".join(completion_card(row, sample, facts, weights) for row in group.to_dict("records"))
            parts.append(
                f'<div class="group"><h4>{views.html.escape(first.query)} <small>{views.html.escape(first.id)}: mean '
                f"reward {group.reward.mean():.2f}, spread {group.reward.std():.2f}</small></h4>"
                f'<div class="completions">{cards}</div></div>'
            )
        legend = " ".join(
            f'<span class="swatch" style="--c:{colour}">{name}</span>'
            for name, colour in COLOURS.items()
            if weights[name]
        )
        return f'<div class="legend">{legend}</div><div class="groups">{"".join(parts)}</div>'

    def follow(name: str | None, identity: str | None, place: int) -> tuple[str, str]:
        if name is None or identity is None:
            return "", ""
        run = library.run(name)
        steps = steps_of(run, "followed")
        step = steps[min(int(place), len(steps) - 1)]
        rows = read_rollouts(run, "followed", step)
        row = rows[rows.id == identity].to_dict("records")[0]
        sample, mask = sample_of(run, row), read_mask(row)
        numbers = " ".join(f"{k.removeprefix('reward_')} {v:.2f}" for k, v in row.items() if k.startswith("reward_"))
        said = f"<h4>step {step}: Dice {row['dice']:.3f}</h4>{reward_bar(row, weights_of(run))}<small>{numbers}</small>"
        picture = (
            contoured(sample.image, sample.mask, mask) if sample else np.repeat(mask[..., None] * np.uint8(255), 3, 2)
        )
        facts = measure(sample.image, sample.mask) if sample else None
        return said + views.reasoning(row["completion"], facts), views.viewer(picture, label=f"followed at step {step}")

    with gr.Row():
        run = gr.Dropdown([name for name in library.run_folders()], value=None, label="Run")
        step = gr.Dropdown([], allow_custom_value=True, label="Step")
        sort = gr.Dropdown(list(SORTS), value=SORTS[0], label="Order of the groups")
        silent = gr.Checkbox(False, label="Only groups that taught nothing")
    with gr.Accordion("A validation image through the run", open=True):
        with gr.Row():
            identity = gr.Dropdown([], label="Followed image")
            place = gr.Slider(0, 1, 0, step=1, label="Training, from the first step to the last", elem_id="follow")
        with gr.Row():
            told, seen = gr.HTML(elem_id="followed-text"), gr.HTML(elem_id="followed-image")
    rows = gr.HTML(elem_id="rollout-groups")
    chosen = run.change(pick, run, [step, identity, place], api_visibility="private")
    chosen.then(show, [run, step, sort, silent], rows, api_name="rollouts").then(
        follow, [run, identity, place], [told, seen], api_visibility="private"
    )
    gr.on([step.input, sort.input, silent.input], show, [run, step, sort, silent], rows, api_visibility="private")
    gr.on([identity.input, place.change], follow, [run, identity, place], [told, seen], api_visibility="private")
    return run
