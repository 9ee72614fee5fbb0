"""Without this the table could train a cell twice, or leave out what it could not afford without saying so."""

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from apps.cli import main
from benchmarks import cells, ood, own_words, table
from lab.data.reason import write_reason
from lab.errors import LabError
from lab.model.core_seg import CoreSeg, CoreSegConfig
from lab.model.release import save_release
from lab.model.segmenter import Segmenter, SegmenterConfig
from tests.tiny_model import tiny_config


@pytest.fixture
def in_this_process(monkeypatch):
    """core-seg commands run in the process of the test: each of their own starts takes 15 s of a core."""

    def core_seg(*arguments):
        assert main(list(arguments)) == 0

    monkeypatch.setattr(cells, "core_seg", core_seg)


def test_the_table_goes_on_where_the_minutes_ended_and_trains_nothing_twice(
    tmp_path, monkeypatch, capsys, in_this_process
):
    monkeypatch.chdir(tmp_path)
    write_reason(Path("data/reason"), 8, seed=4, size=64)
    manifest = write_reason(Path("data/real"), 12, seed=5, fractions=(0.5, 0.25, 0.25), size=64)
    monkeypatch.setattr(table, "TRACKS", {"real": ""})
    save_release(Segmenter(SegmenterConfig()), Path("stage0"), "Stage 0", "nothing")
    save_release(CoreSeg(CoreSegConfig()), Path("language"), "Language", "nothing")
    starts = {"segmenter": Path("stage0"), "language": Path("language")}
    settings = {"cells": ["sft", "text-box"], "ours": "sft", "quick": 0.003, "limit": 3, **starts}
    table.main(manifest, 0, **settings)
    assert "minutes are over before sft" in capsys.readouterr().out
    table.main(manifest, 60, **settings)
    found = json.loads((tmp_path / "out" / "table" / "table.json").read_text())
    assert [row["cell"] for row in found] == ["sft", "text-box"] and all(row["n"] == 3 for row in found)
    assert found[1]["gain_ci"][0] <= found[1]["gain"] <= found[1]["gain_ci"][1]
    (runs,) = (tmp_path / "runs").glob("table-*")
    run_of = {name: next(runs.glob(f"{name}-0-*")) for name in ("sft", "text-box")}
    checkpoint = run_of["sft"] / "checkpoints" / "last.ckpt"
    before = checkpoint.stat().st_mtime_ns
    (run_of["text-box"] / "checkpoints" / "last.ckpt").unlink()  # its JSON is enough
    table.main(manifest, 0, **settings)
    assert checkpoint.stat().st_mtime_ns == before and "minutes are over" not in capsys.readouterr().out
    table.main(manifest, 0, **settings | {"quick": 0.004}, out=Path("out/other"))
    assert "minutes are over before sft" in capsys.readouterr().out, (
        "a run of other settings was taken for one of these"
    )
    with pytest.raises(LabError, match="cell sft in 'out/table' is of another configuration; move sft-"):
        other = replace(table.CELLS["sft"], flags=("--model.init_args.blind=1.0",))
        with monkeypatch.context() as changed:
            changed.setitem(table.CELLS, "sft", other)
            table.main(manifest, 0, **settings)
    drawn = (tmp_path / "out" / "table" / "table.md").read_text()
    assert (
        "best of 1 of 5 baselines with language: text to box (Seg-Zero), SFT" in drawn and "mDice by modality" in drawn
    )
    assert (tmp_path / "out" / "table" / "table.png").stat().st_size > 5_000


def test_a_row_of_one_seed_is_compared_with_that_seed_alone():
    """Else an ablation would seem better or worse by what another seed of ours did."""

    def cell(dice):
        figures = {"mDice": float(np.mean(dice))}
        images = {f"i{number}": value for number, value in enumerate(dice)}
        by = {"modality": {"CT": figures}, "anatomy": {"lung": figures}}
        track = {"overall": figures, "by": by, "dice": images, "group": dict.fromkeys(images, "g") | {"i0": "h"}}
        return {"tracks": {"real": track}}

    cells = {("grpo", 0): cell([0.6, 0.8]), ("grpo", 1): cell([0.1, 0.1]), ("linear", 0): cell([0.5, 0.6])}
    ours, linear = sorted(table.rows(cells, "grpo"), key=lambda row: row["cell"])
    assert ours["mDice"] == pytest.approx(0.4) and ours["seeds"] == 2
    assert linear["gain"] == pytest.approx(0.15)
    assert "gain" not in table.rows({key: cells[key] for key in [("grpo", 1), ("linear", 0)]}, "grpo")[-1]


def test_a_source_that_is_left_out_is_in_no_part_of_the_training(tmp_path, monkeypatch, capsys, in_this_process):
    monkeypatch.chdir(tmp_path)
    for name, seed in (("data/reason", 4), ("data/synthetic", 6)):
        write_reason(Path(name), 8, seed=seed, size=64)
    manifest = write_reason(Path("data/real"), 8, seed=5, fractions=(0.5, 0.25, 0.25), size=64)
    settings = {"quick": 0.002, "limit": 2}
    ood.main(manifest, budget_minutes=0, **settings)
    assert "minutes are over before manifest" in capsys.readouterr().out
    ood.main(manifest, budget_minutes=30, **settings)
    told = json.loads(Path("out/ood/manifest.json").read_text())
    for row in ("sft", "unet"):
        assert [told[row][part]["n"] for part in ("left out", "val of the others")] == [2, 2]
    assert "gain_ci" in told["sft over unet"]
    for part in ("stage0", "sft", "unet"):
        (config,) = (path.read_text() for path in Path("runs").glob(f"ood-*/manifest-{part}/config_fit.yaml"))
        assert "../shared" not in config and "releases/" not in config, "it starts from what has seen everything"


def test_a_blind_seg_draws_the_same_whatever_is_said_before_it():
    model = CoreSeg(tiny_config()).eval()
    text = "<think> {} </think><answer>The cyst are located at [[10,10,60,60]]. The mask is <seg>.</answer>"
    scene = model.open([np.zeros((64, 64, 3), np.uint8)] * 2, ["Segment the cyst."] * 2)

    def drawn():
        one, other = model.segment_text(scene, [text.format("left"), text.format("right")])
        return one.probability, other.probability

    assert np.abs(np.subtract(*drawn())).max() > 1e-6
    own_words.blind(model)
    np.testing.assert_allclose(*drawn(), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "flags", "said"),
    [
        ("table", ["--cells=[nothing]"], "no cell 'nothing'"),
        ("ood", ["--budget-minutes=0"], "minutes are over"),
        ("free_form", ["--models=[nothing]"], "cannot be read"),
        ("own_words", ["--models=[nothing]"], "cannot be read"),
    ],
)
def test_the_benchmarks_take_what_their_docstrings_say(name, flags, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, f"--manifest={tmp_path / 'none.jsonl'}", *flags])
    monkeypatch.delitem(sys.modules, f"benchmarks.{name}", raising=False)
    try:
        runpy.run_module(f"benchmarks.{name}", run_name="__main__")
    except SystemExit as ended:
        assert said in str(ended)
    else:
        assert said in capsys.readouterr().out
