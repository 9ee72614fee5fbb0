"""The Data tab: the records of a manifest with mask, reasoning and facts, and how they are distributed."""

import html
from dataclasses import asdict
from urllib.parse import urlencode

import gradio as gr
import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from apps.lab import views
from apps.lab.library import Library
from lab.data.facts import measure
from lab.data.images import load_sample
from lab.data.reasoning import write
from lab.data.sample import Record
from lab.model.answer import parse, render
from lab.model.core_seg import Prediction


def distributions(records: list[Record]) -> go.Figure:
    """Lesion size (share of the image, logarithmic), and how many records each modality and source has."""
    frame = pd.DataFrame(
        [{"size": r.mask_fraction, "modality": r.modality, "source": r.source, "split": r.split} for r in records]
    )
    figure = make_subplots(1, 3, subplot_titles=["lesion, per cent of the image", "modality", "source"])
    sizes = np.log10(100 * frame[frame["size"] > 0]["size"])
    figure.add_histogram(x=sizes, nbinsx=40, marker_color="#64748b", row=1, col=1, showlegend=False)
    ticks = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100]
    figure.update_xaxes(tickvals=np.log10(ticks), ticktext=[f"{tick:g}" for tick in ticks], row=1, col=1)
    for column, name in ((2, "modality"), (3, "source")):
        for number, (split, rows) in enumerate(frame.groupby("split")):
            counts = rows[name].value_counts()
            figure.add_bar(
                x=counts.index,
                y=counts,
                name=split,
                marker_color=["#2563eb", "#d97706", "#059669"][number % 3],
                showlegend=column == 2,
                row=1,
                col=column,
            )
    return views.plain(figure).update_layout(
        barmode="stack",
        height=340,
        margin={"t": 40, "b": 20, "l": 40, "r": 10},
    )


def shown(record: Record) -> tuple[str, str]:
    """HTML of a record: its image with the true mask, and its query, reasoning and facts.

    Raises:
        LabError: When its files cannot be read.
    """
    sample = load_sample(record)
    facts = measure(sample.image, sample.mask)
    reasoning = record.reasoning or write(
        facts, record.modality, record.anatomy, record.lesion, np.random.default_rng(0)
    )
    text = render(reasoning, record.lesion, np.zeros((0, 4)), 100)
    truth = Prediction(text, parse(text, 100), np.zeros((0, 4)), sample.mask, sample.mask * 1.0, True, 0.0, 0)
    zeros = np.zeros(sample.mask.shape, np.float32)
    picture = views.viewer(sample.image, views.Shown("truth", truth, zeros, sample.mask, facts), record.id)
    rounded = {k: np.round(v, 3).tolist() if isinstance(v, float | tuple) else v for k, v in asdict(facts).items()}
    measured = "".join(f"<span>{k} <b>{html.escape(str(v))}</b></span>" for k, v in rounded.items() if v != "")
    about = ("id", "modality", "anatomy", "lesion", "source", "license", "split", "group")
    told = "".join(f"<span>{name} <b>{html.escape(str(getattr(record, name)))}</b></span>" for name in about)
    said = views.reasoning(f"<think> {reasoning} </think>", facts)
    return (
        picture,
        f'<h3>{html.escape(record.query)}</h3>{said}<p class="figures">{told}</p><p class="figures">{measured}</p>'
        f'<p><a href="?{urlencode({"record": record.id})}">Open in Inspect</a></p>',
    )


def build(library: Library) -> None:
    """The tab."""
    records = list(library.records.values())

    def choose(split: str, source: str) -> gr.Slider:
        return gr.Slider(0, max(1, len(chosen(split, source)) - 1), value=0, step=1)

    def chosen(split: str, source: str) -> list[Record]:
        return [r for r in records if split in ("all", r.split) and source in ("all", r.source)]

    def show(split: str, source: str, place: int):
        found = chosen(split, source)
        if not found:
            return "", "<p>No record is both.</p>"
        return shown(found[min(int(place), len(found) - 1)])

    if not records:
        gr.Markdown("No manifest is open; start the lab with `--manifest FILE`.")
        return
    gr.Plot(distributions(records), show_label=False)
    with gr.Row():
        split = gr.Dropdown(["all", *sorted({r.split for r in records})], value="all", label="Split")
        source = gr.Dropdown(["all", *sorted({r.source for r in records})], value="all", label="Source")
        place = gr.Slider(0, max(1, len(records) - 1), 0, step=1, label="Record", elem_id="record-slider")
    with gr.Row():
        picture, told = gr.HTML(elem_id="data-image"), gr.HTML(elem_id="data-facts")
    gr.on([split.input, source.input], choose, [split, source], place, api_visibility="private").then(
        show, [split, source, place], [picture, told], api_visibility="private"
    )
    place.change(show, [split, source, place], [picture, told], api_visibility="private")
    start = gr.Timer(0.1)
    start.tick(show, [split, source, place], [picture, told], api_visibility="private")
    start.tick(lambda: gr.Timer(active=False), None, start, api_visibility="private")
