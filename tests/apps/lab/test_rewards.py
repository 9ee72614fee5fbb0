"""Without these curves could be drawn against the wrong axis, or runs be grouped by what they do not share."""

import numpy as np
import pandas as pd
import pytest

from apps.lab import library, rewards
from apps.lab.rollouts import groups_of


@pytest.fixture
def frame():
    return pd.DataFrame(
        {"step": [0, 1, 2], "time": [100.0, 160.0, 220.0], "num_tokens": [5, 10, 15], "reward": [1.0, 2.0, 3.0]}
    )


def test_each_axis_is_what_it_says(frame):
    assert rewards.along(frame, "step").tolist() == [0, 1, 2]
    assert rewards.along(frame, "minutes").tolist() == [0, 1, 2]
    assert rewards.along(frame, "tokens").tolist() == [5, 10, 15]
    assert rewards.along(frame.assign(num_tokens=[np.nan, 10, np.nan]), "tokens").tolist() == [0, 10, 10]
    assert rewards.along(frame, "samples", 64).tolist() == [64, 128, 192]


def test_only_keys_that_differ_are_listed():
    one = library.flat({"a": {"lr": 1, "same": 2}, "parts": [{"per_batch": 4}, {"per_batch": 2}]})
    other = library.flat({"a": {"lr": 3, "same": 2}, "parts": [{"per_batch": 4}]})
    assert one["parts.1.per_batch"] == 2
    table = rewards.differing({"x": one, "y": other})
    assert table.key.tolist() == ["a.lr", "parts.1.per_batch"] and table.x.tolist() == ["1", "2"]
    assert table.y.tolist() == ["3", ""]


def test_runs_are_grouped_by_name_or_key():
    configs = {"a-0": {"m.kind": "paper"}, "a-1": {"m.kind": "dice"}, "b": {"m.kind": "dice"}}
    names = list(configs)
    assert rewards.grouped(names, rewards.BY_RUN, configs) == {"a-0": ["a-0"], "a-1": ["a-1"], "b": ["b"]}
    assert rewards.grouped(names, rewards.BY_NAME, configs) == {"a": ["a-0", "a-1"], "b": ["b"]}
    assert rewards.grouped(names, "m.kind", configs) == {"kind paper": ["a-0"], "kind dice": ["a-1", "b"]}


def test_the_chart_has_every_run_faint_and_every_group_once_in_the_legend(frame):
    frames = {name: frame.set_index("step") for name in ("a-0", "a-1", "b")}
    figure = rewards.chart(frames, {"a": ["a-0", "a-1"], "b": ["b"]}, ["reward"], "step", 0.5)
    assert [trace.name for trace in figure.data if trace.showlegend] == ["a", "b"]
    raw = [trace for trace in figure.data if trace.opacity == 0.2]
    assert len(raw) == 3 and list(raw[0].y) == [1, 2, 3]


def test_groups_are_sorted_and_the_silent_ones_found():
    rows = pd.DataFrame(
        {
            "id": np.repeat(["a", "b", "c"], 2),
            "view": 0,
            "query": "q",
            "reward": [1.0, 3.0, 5.0, 5.0, 0.0, 1.0],
        }
    )
    ids = lambda *how: [group.id.iloc[0] for group in groups_of(rows, *how)]  # noqa: E731
    assert ids("as sampled", False) == ["a", "b", "c"]
    assert ids("highest reward first", False) == ["b", "a", "c"]
    assert ids("lowest reward first", False) == ["c", "a", "b"]
    assert ids("widest spread first", False) == ["a", "c", "b"]
    assert ids("as sampled", True) == ["b"]


def test_runs_that_took_other_minutes_are_one_curve_from_left_to_right():
    """Else the mean would go back to its start."""
    frames = {
        name: pd.DataFrame({"reward": [1.0, 2.0, 3.0]}, index=x) for name, x in (("a", [0, 2, 4]), ("b", [1, 3, 5]))
    }
    figure = rewards.chart(frames, {"both": ["a", "b"]}, ["reward"], "minutes", 0.0)
    (mean,) = (trace for trace in figure.data if trace.name == "both")
    assert list(mean.x) == [0, 1, 2, 3, 4, 5] and mean.y[1:5].tolist() == pytest.approx([1.25, 1.75, 2.25, 2.75])


def test_a_run_that_does_not_log_a_metric_is_named_and_still_in_the_legend(frame):
    """Else stage 1 beside stage 2 has curves of no name, or is missed without a word."""
    frames = {"sft": frame.drop(columns="reward").set_index("step"), "grpo": frame.set_index("step")}
    groups = {name: [name] for name in frames}
    figure = rewards.chart(frames, groups, ["reward", "num_tokens"], "step", 0.0)
    assert [trace.name for trace in figure.data if trace.showlegend] == ["grpo", "sft"]
    assert [title.text for title in figure.layout.annotations] == [
        "reward<br><sub>not logged by sft</sub>",
        "num_tokens",
    ]
