"""The Rewards tab: any metric of any runs against steps, time, tokens or samples, live while a run is written."""

import re
from collections import defaultdict
from urllib.parse import urlencode

import gradio as gr
import pandas as pd
import plotly.graph_objects as go
from plotly.colors import qualitative
from plotly.subplots import make_subplots

from apps.lab.library import Library, described, read_config
from apps.lab.views import ADDRESS, plain
from lab.errors import LabError
from lab.evaluation.curves import read_metrics, smoothed

DEFAULT = ["reward", "dice", "failure_rate", "rewards/detect/mean", "kl", "completions/mean_length"]
AXES = ["step", "minutes", "tokens", "samples"]
BY_RUN, BY_NAME = "each run by itself", "runs whose names differ in the last -number"
REFRESH = 5
"""Seconds between two looks at runs that are still written."""


def differing(configs: dict[str, dict[str, object]]) -> pd.DataFrame:
    """The configuration keys in which runs differ, one row a key, one column a run."""
    keys = sorted({key for config in configs.values() for key in config})
    rows = [{"key": key} | {name: str(config.get(key, "")) for name, config in configs.items()} for key in keys]
    rows = [row for row in rows if len({row[name] for name in configs}) > 1]
    return pd.DataFrame(rows, columns=["key", *configs])


def grouped(names: list[str], by: str, configs: dict[str, dict[str, object]]) -> dict[str, list[str]]:
    """Label to runs: each by itself, by name without its last number, or by the value of a configuration key."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        label = name if by == BY_RUN else re.sub(r"-\d+$", "", name)
        groups[label if by in (BY_RUN, BY_NAME) else f"{by.rpartition('.')[2]} {configs[name].get(by, '')}"].append(
            name
        )
    return dict(groups)


def along(frame: pd.DataFrame, axis: str, group_size: float = 1) -> pd.Series:
    """What a frame of `read_metrics` is drawn against."""
    if axis == "minutes":
        return (frame.time - frame.time.iloc[0]) / 60
    if axis == "tokens" and "num_tokens" in frame:
        return frame.num_tokens.ffill().fillna(0)  # rows of a validation have none
    if axis == "samples":
        return (frame.step + 1) * group_size
    return frame.step


def chart(
    frames: dict[str, pd.DataFrame], groups: dict[str, list[str]], metrics: list[str], axis: str, weight: float
) -> go.Figure:
    """A panel a metric; zooming in one moves all. Runs are faint as they were logged, groups strong and smoothed, with
    the range of their runs as a band.

    Args:
        frames: Of `read_metrics`, by run; `axis` is their index.
        groups: Label to runs.
        metrics: Columns.
        axis: Name of the x axis.
        weight: Of the smoothing, 0 to below 1.
    """
    columns = min(3, max(1, len(metrics)))
    rows = max(1, -(-len(metrics) // columns))
    titles = [with_missing(metric, frames) for metric in metrics]
    figure = make_subplots(rows, columns, subplot_titles=titles, horizontal_spacing=0.06, vertical_spacing=0.36 / rows)
    named: set[str] = set()
    for number, metric in enumerate(metrics):
        place = {"row": number // columns + 1, "col": number % columns + 1}
        for order, (label, names) in enumerate(groups.items()):
            colour = qualitative.D3[order % len(qualitative.D3)]
            curves = [frames[name][metric].dropna() for name in names if metric in frames[name]]
            curves = [curve[~curve.index.duplicated()] for curve in curves]
            for curve in curves:
                faint = {"color": colour, "width": 1}
                figure.add_scatter(
                    x=curve.index, y=curve, line=faint, opacity=0.2, hoverinfo="skip", showlegend=False, **place
                )
            if not curves:
                continue
            smooth = pd.concat([smoothed(curve, weight) for curve in curves], axis=1).sort_index()
            smooth = smooth.interpolate("index", limit_area="inside")  # minutes and tokens of two runs differ
            if len(curves) > 1:
                for edge in (smooth.min(axis=1), smooth.max(axis=1)):
                    fill = {"fill": "tonexty", "fillcolor": _faded(colour)} if edge.equals(smooth.max(axis=1)) else {}
                    figure.add_scatter(
                        x=edge.index, y=edge, line={"width": 0}, hoverinfo="skip", showlegend=False, **fill, **place
                    )
            mean = smooth.mean(axis=1)
            figure.add_scatter(
                x=mean.index,
                y=mean,
                name=label,
                line={"color": colour, "width": 2.5},
                legendgroup=label,
                showlegend=label not in named,
                hovertemplate="%{y:.4g}",
                **place,
            )
            named.add(label)
    figure.update_xaxes(matches="x", title_text=axis)
    lines = 1 + sum(60 + 7 * len(label) for label in groups) // 900  # of the legend, in a column of 900 pixels
    above = 45 + 22 * lines
    return plain(figure).update_layout(
        height=above + 310 * rows,
        hovermode="x unified",
        uirevision="keep",
        legend={"orientation": "h", "yref": "container", "y": 1, "yanchor": "top"},
        margin={"l": 40, "r": 10, "t": above, "b": 40},
    )


def with_missing(metric: str, frames: dict[str, pd.DataFrame]) -> str:
    """The title of a metric's panel, which says which runs do not log it."""
    missing = [name for name, frame in frames.items() if metric not in frame]
    return f"{metric}<br><sub>not logged by {', '.join(missing)}</sub>" if missing else metric


def _faded(colour: str) -> str:
    red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.18)"


def labels(library: Library) -> list[tuple[str, str]]:
    """What a run is listed as, and its name."""
    return [(described(name, folder), name) for name, folder in library.run_folders().items()]


def build(library: Library) -> tuple[gr.Dropdown, gr.Dropdown]:
    """The tab's components, and what a link fills in: runs and metrics."""

    def load(names: list[str], axis: str) -> tuple[dict[str, pd.DataFrame], dict[str, dict[str, object]]]:
        configs, frames = {name: read_config(library.run(name)) for name in names}, {}
        for name in names:
            frame = read_metrics(library.run(name))
            if len(frame):
                batch = sum(v for k, v in configs[name].items() if k.endswith("per_batch")) or 1
                size = batch * configs[name].get("model.init_args.group_size", 1)
                frames[name] = frame.set_index(along(frame, axis, size))
        return frames, configs

    def known(names: list[str], metrics: list[str]) -> gr.Dropdown:
        frames, _ = load(names, "step")
        found = sorted({column for frame in frames.values() for column in frame.columns} - {"step", "time"})
        chosen = [metric for metric in metrics or DEFAULT if metric in found] or found[:3]
        return gr.Dropdown(found, value=chosen)

    def keys(names: list[str]) -> gr.Dropdown:
        _, configs = load(names, "step")
        return gr.Dropdown([BY_RUN, BY_NAME, *differing(configs).key], value=BY_RUN)

    def draw(names: list[str], metrics: list[str], axis: str, weight: float, by: str):
        if not names or not metrics:
            return None, pd.DataFrame(), ""
        frames, configs = load(names, axis)
        groups = grouped([name for name in names if name in frames], by, configs)
        logged = {column for frame in frames.values() for column in frame.columns}
        if not set(metrics) <= logged:
            raise LabError(f"no run logs '{min(set(metrics) - logged)}'; choose metrics from the list")
        address = "?" + urlencode({"runs": ",".join(names), "metrics": ",".join(metrics)})
        return chart(frames, groups, metrics, axis, weight), differing(configs), address

    def redraw(*chosen):
        """What is wrong with the choice was said when it was made."""
        try:
            return draw(*chosen)[:2]
        except LabError:
            return gr.skip(), gr.skip()

    def table(names: list[str], metrics: list[str]) -> str:
        frames, _ = load(names or [], "step")
        if not frames:
            raise LabError("there are no curves yet; choose runs first")
        path = library.scratch() / "curves.csv"
        tables = [frame.reindex(columns=["time", *metrics]).assign(run=name) for name, frame in frames.items()]
        pd.concat(tables).to_csv(path, index_label="step")
        return str(path)

    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            runs = gr.Dropdown(labels(library), multiselect=True, label="Runs, the newest first")
            metrics = gr.Dropdown([], multiselect=True, allow_custom_value=True, label="Metrics")
            axis = gr.Radio(AXES, value="step", label="x axis")
            weight = gr.Slider(0, 0.99, 0.8, step=0.01, label="Smoothing")
            by = gr.Dropdown([BY_RUN, BY_NAME], value=BY_RUN, label="Group by")
            live = gr.Checkbox(True, label=f"Live: look again every {REFRESH} s")
            reload = gr.Button("Look for new runs")
            address = gr.Textbox(label="Link to this view", interactive=False, buttons=["copy"])
            save, made = gr.Button("CSV"), gr.DownloadButton("CSV", elem_id="curves-csv", elem_classes="unseen")
        with gr.Column(scale=4):
            gr.Markdown(
                "Choose one or more runs. Dragging zooms all charts, a double click goes back; the camera above them "
                "saves a PNG. Of runs drawn as one the line is the mean, and the band reaches from lowest to highest."
            )
            plot = gr.Plot(show_label=False, elem_id="curves")
            gr.Markdown("### In which settings the runs differ")
            differences = gr.Dataframe(interactive=False, wrap=True)
    shown, outputs = [runs, metrics, axis, weight, by], [plot, differences, address]
    listed = runs.change(known, [runs, metrics], metrics, api_visibility="private")
    listed.then(keys, runs, by, api_visibility="private").then(draw, shown, outputs, api_name="curves")
    gr.on([metrics.input, axis.input, weight.release, by.input], draw, shown, outputs, api_visibility="private")
    timer = gr.Timer(REFRESH)
    timer.tick(redraw, shown, outputs[:2], api_visibility="private", show_progress="hidden")
    live.input(lambda on: gr.Timer(active=on), live, timer, api_visibility="private")
    reload.click(lambda: gr.Dropdown(labels(library)), None, runs, api_visibility="private")
    save.click(table, [runs, metrics], made, api_visibility="private").success(
        None, js="() => setTimeout(() => document.querySelector('#curves-csv').click(), 300)"
    )
    address.change(None, address, address, js=ADDRESS)
    return runs, metrics
