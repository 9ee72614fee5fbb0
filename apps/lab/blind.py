"""The Blind tab: two models on one image, names hidden and sides shuffled; votes are kept, win rates are shown."""

import json
import secrets
import threading
import time
from pathlib import Path

import gradio as gr
import numpy as np
import pandas as pd
from scipy.stats import binomtest

from apps.lab import views
from apps.lab.library import Library
from lab.data.images import load_sample

VOTES = {"left": "Left is better", "right": "Right is better", "tie": "Tie", "both bad": "Both are bad"}
KEPT = 64


def win_rates(votes: list[dict]) -> pd.DataFrame:
    """One row a pair of models: how often each won, ties and both-bad apart, and the 95 % interval (Wilson) of the
    first one's share of the decided votes."""
    rows = []
    pairs = sorted({tuple(sorted((vote["left"], vote["right"]))) for vote in votes})
    for one, other in pairs:
        of_pair = [vote for vote in votes if {vote["left"], vote["right"]} == {one, other}]
        winners = [vote[vote["vote"]] for vote in of_pair if vote["vote"] in ("left", "right")]
        wins = winners.count(one)
        row = {"A": views.short(one), "B": views.short(other), "A won": wins, "B won": len(winners) - wins}
        row |= {kind: sum(vote["vote"] == kind for vote in of_pair) for kind in ("tie", "both bad")}
        if winners:
            low, high = binomtest(wins, len(winners)).proportion_ci(method="wilson")
            row["A's share (95 %)"] = f"{wins / len(winners):.0%} ({low:.0%} to {high:.0%})"
        rows.append(row)
    return pd.DataFrame(rows, columns=["A", "B", "A won", "B won", "tie", "both bad", "A's share (95 %)"])


def read_votes(path: Path) -> list[dict]:
    """All votes of a file; a half-written line is left out."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def build(library: Library, path: Path) -> None:
    """The tab.

    Args:
        library: Where models and records come from.
        path: JSON lines, a vote each.
    """
    shown: dict[str, dict] = {}
    lock = threading.Lock()
    names = list(library.models())
    pool = [name for name, record in library.records.items() if record.split != "train"] or list(library.records)

    def deal(one: str | None, other: str | None):
        if not one or not other or one == other:
            raise gr.Error("Choose two different models.")
        if not pool:
            raise gr.Error("There are no records to show; start the lab with --manifest.")
        rng = np.random.default_rng()
        record = library.record(pool[rng.integers(len(pool))])
        sample = load_sample(record)
        sides = [one, other] if rng.random() < 0.5 else [other, one]
        said = [library.model(name).predict([sample.image], [record.query])[0] for name in sides]
        key = secrets.token_urlsafe(12)
        with lock:
            shown[key] = {"record": record.id, "left": sides[0], "right": sides[1]}
            for old in list(shown)[:-KEPT]:
                del shown[old]
        pictures = [
            views.viewer(sample.image, views.Shown("", answer, np.zeros(sample.mask.shape, np.float32)), side)
            for answer, side in zip(said, ("left", "right"))
        ]
        texts = [views.state(answer) + views.reasoning(answer.text) for answer in said]
        buttons = [gr.Button(interactive=True)] * len(VOTES)
        return key, f"### {record.query}", *pictures, *texts, "", *buttons

    def vote(key: str, choice: str):
        with lock:
            dealt = shown.pop(key, None)
            if dealt is None:
                raise gr.Error("That pair is gone, or you have voted on it; press Next pair.")
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(json.dumps(dealt | {"vote": choice, "time": round(time.time(), 1)}) + "\n")
        revealed = f"Left was **{dealt['left']}**, right was **{dealt['right']}**."
        return revealed, win_rates(read_votes(path)), *[gr.Button(interactive=False)] * len(VOTES)

    key = gr.State("")
    with gr.Row():
        one = gr.Dropdown(names, value=names[0] if names else None, label="One model")
        other = gr.Dropdown(names, value=names[1] if len(names) > 1 else None, label="The other")
        following = gr.Button("Next pair", variant="primary")
    gr.HTML(views.toolbar(["overlay", "contour", "off"]))
    asked = gr.Markdown(elem_id="blind-query")
    with gr.Row():
        pictures, texts = [], []
        for side in ("left", "right"):
            with gr.Column():
                pictures.append(gr.HTML(elem_id=f"blind-{side}"))
                texts.append(gr.HTML())
    with gr.Row():
        buttons = [gr.Button(label, interactive=False) for label in VOTES.values()]
    revealed = gr.Markdown(elem_id="revealed")
    rates = gr.Dataframe(win_rates(read_votes(path)), interactive=False, label="Win rates", elem_id="win-rates")
    following.click(
        deal,
        [one, other],
        [key, asked, *pictures, *texts, revealed, *buttons],
        concurrency_id="model",
        api_visibility="private",
    )
    for choice, button in zip(VOTES, buttons):
        button.click(
            lambda key, choice=choice: vote(key, choice), key, [revealed, rates, *buttons], api_visibility="private"
        )
