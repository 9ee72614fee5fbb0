"""The Leaderboard tab: evaluations side by side, A against B image by image, and the worst cases."""

import json
from pathlib import Path
from typing import NamedTuple

import cv2
import gradio as gr
import pandas as pd
import plotly.graph_objects as go

from apps.lab import views
from apps.lab.library import Library
from lab.evaluation.compare import compare, comparison_table, read_cases

GROUPINGS = ["overall", "source", "anatomy", "modality"]


class Board(NamedTuple):
    """The evaluations of one split of one manifest, by name."""

    folders: dict[str, Path]
    summaries: dict[str, dict]


def boards(folders: list[Path]) -> dict[str, Board]:
    """Evaluations below folders, grouped by what was asked: `manifest, split, n`."""
    found: dict[str, Board] = {}
    for root in folders:
        for path in sorted(root.rglob("evaluation.json")):
            try:
                summary = json.loads(path.read_text())
                title = f"{summary['manifest']}, {summary['split']}, {summary['overall']['n']} records"
            except (ValueError, KeyError, OSError):
                continue  # still written, or something else of that name
            board = found.setdefault(title, Board({}, {}))
            name = str(path.parent.relative_to(root))
            board.folders[name], board.summaries[name] = path.parent, summary
    return found


def ranking(summaries: dict[str, dict], by: str) -> pd.DataFrame:
    """One row an evaluation, or one for each group of it, the best mDice first."""
    rows = []
    for name, summary in summaries.items():
        groups = {"all": summary["overall"]} if by == "overall" else summary["by"].get(by, {})
        for group, values in groups.items():
            low, high = values["mDice_ci"]
            row = {"evaluation": views.short(name), "model": views.short(summary["model"])}
            row |= {} if by == "overall" else {by: group}
            row |= {"mDice": values["mDice"], "95 %": f"{low:.3f} to {high:.3f}", "mIoU": values["mIoU"]}
            row |= {"failure rate": values["failure_rate"], "box F1": values["box_f1"]}
            row |= {name: values.get(key) for name, key in {"NSD": "NSD", "lesion F1": "lesion_f1"}.items()}
            row |= {"true claims": values.get("faithfulness"), "influence": values.get("influence")}
            rows.append(row | {"n": values["n"]})
    frame = pd.DataFrame(rows)
    order = ["mDice"] if by == "overall" else [by, "mDice"]
    return frame.sort_values(order, ascending=[name == by for name in order]) if len(frame) else frame


def scatter(one: pd.DataFrame, other: pd.DataFrame, names: tuple[str, str]) -> go.Figure:
    """Dice of every image under A (x) and B (y); what lies above the diagonal is better under B."""
    both = one.merge(other, on="id", suffixes=("_a", "_b"))
    figure = go.Figure()
    for source, rows in both.groupby("source_a"):
        figure.add_scatter(
            x=rows.dice_a,
            y=rows.dice_b,
            mode="markers",
            name=str(source),
            customdata=rows.id,
            marker={"size": 7, "opacity": 0.7},
            hovertemplate="%{customdata}<br>A %{x:.3f}, B %{y:.3f}",
        )
    figure.add_scatter(
        x=[0, 1], y=[0, 1], mode="lines", line={"dash": "dot", "color": "gray"}, showlegend=False, hoverinfo="skip"
    )
    a, b = map(views.short, names)
    return views.plain(figure).update_layout(
        xaxis_title=f"A: {a}",
        yaxis_title=f"B: {b}",
        height=560,
        margin={"t": 20, "b": 40, "l": 50, "r": 10},
        legend={"orientation": "h", "y": -0.15},
    )


def worst(folder: Path) -> str:
    """The picture of worst, median and best cases that an evaluation left, as HTML."""
    picture = cv2.imread(str(folder / "cases.png"))
    if picture is None:
        return "<p>This evaluation left no cases.png.</p>"
    encoded = views.data_uri(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB), side=1600)
    return f'<img src="{encoded}" alt="worst, median and best cases" style="width:100%">'


def build(library: Library) -> None:
    """The tab."""

    def table(title: str | None, by: str):
        board = library_boards().get(title or "")
        if board is None:
            return pd.DataFrame(), gr.Dropdown([]), gr.Dropdown([])
        names = list(board.folders)
        return ranking(board.summaries, by), gr.Dropdown(names, value=names[0]), gr.Dropdown(names, value=names[-1])

    def against(title: str | None, a: str | None, b: str | None):
        board = library_boards().get(title or "")
        if board is None or a not in board.folders or b not in board.folders:
            return None, "", ""
        one, other = read_cases(board.folders[a]), read_cases(board.folders[b])
        told = comparison_table(compare(one, [other])).replace("| base |", "| A |").replace("| seed 0 |", "| B |")
        return scatter(one, other, (a, b)), told, worst(board.folders[b])

    def library_boards() -> dict[str, Board]:
        return boards(library.evaluations)

    titles = list(library_boards())
    with gr.Row():
        title = gr.Dropdown(titles, value=titles[0] if titles else None, label="What was asked")
        by = gr.Radio(GROUPINGS, value="overall", label="By")
        again = gr.Button("Look again", scale=0)
    rows = gr.Dataframe(interactive=False, wrap=True, elem_id="leaderboard")
    with gr.Row():
        a, b = gr.Dropdown([], label="A"), gr.Dropdown([], label="B")
    told = gr.Markdown(elem_id="paired")
    gr.Markdown(
        "Dice of every image, of what `core-seg evaluate` wrote below `runs/` and `out/` (`--evaluations`); "
        "a click on a point opens that image under Inspect, where it is of the manifest that is open."
    )
    plot = gr.Plot(show_label=False, elem_id="scatter")
    with gr.Accordion("The worst, the median and the best cases of B", open=False):
        cases = gr.HTML()
    by.change(lambda title, by: table(title, by)[0], [title, by], rows, api_visibility="private")
    title.change(table, [title, by], [rows, a, b], api_visibility="private").then(
        against, [title, a, b], [plot, told, cases], api_visibility="private"
    )
    gr.on([a.input, b.input], against, [title, a, b], [plot, told, cases], api_visibility="private")
    again.click(lambda: gr.Dropdown(list(library_boards())), None, title, api_visibility="private")
    if titles:
        start = gr.Timer(0.1)  # filled in when the page is opened
        start.tick(table, [title, by], [rows, a, b], api_visibility="private").then(
            against, [title, a, b], [plot, told, cases], api_visibility="private"
        )
        start.tick(lambda: gr.Timer(active=False), None, start, api_visibility="private")
