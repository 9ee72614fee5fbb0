"""A filter whose model has seen what it scores, or whose knee is not the curve's, would keep the wrong half."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import brentq

from apps.cli import main
from lab.data import difficulty
from lab.data.difficulty import Settings, cross_validated, group_folds
from lab.data.knee import as_many_at_random, fit_errors, hardest
from lab.data.manifest import read_manifest
from lab.data.synthetic import write_plain
from lab.errors import LabError

SETTINGS = Settings(folds=3, steps=4, size=32, batch_size=2, seed=0)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """15 images, of which 5 and 5 share a group."""
    path = write_plain(tmp_path_factory.mktemp("made"), 15, 9, fractions=(0.6, 0.2, 0.2), size=64)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for place, line in enumerate(lines[:9]):
        line["group"] = f"patient-{place // 3}"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("alpha, xmin", [(2.5, 0.02), (4.5, 0.1)])
def test_fit_finds_the_law_that_samples_were_drawn_from_and_its_knee(alpha, xmin):
    """Kneedle's knee is where the curve, scaled to the unit square, falls as fast as it goes right."""
    rng = np.random.default_rng(0)
    law = xmin * (1 - rng.random(3000)) ** (-1 / (alpha - 1))
    fit = fit_errors(np.concatenate([law[law < 1], rng.uniform(0.2 * xmin, xmin, 1000), np.zeros(50)]))
    assert fit.xmin == pytest.approx(xmin, rel=0.15) and fit.alpha == pytest.approx(alpha, rel=0.07)
    top = law[law < 1].max()
    steepness = (1 - (top / fit.xmin) ** (1 - fit.alpha)) / (top - fit.xmin)
    expected = brentq(lambda x: (fit.alpha - 1) / fit.xmin * (x / fit.xmin) ** -fit.alpha - steepness, fit.xmin, top)
    assert fit.knee == pytest.approx(expected, abs=0.005)


def test_total_failures_do_not_hide_the_law():
    """Many errors are exactly 1: a lesion that is not found at all."""
    law = 0.05 * (1 - np.random.default_rng(0).random(2000)) ** (-1 / 1.5)
    fit = fit_errors(np.concatenate([np.minimum(law, 1), np.ones(200)]))
    assert fit.xmin < 0.5 and fit.xmin < fit.knee < 0.5


def test_a_pile_of_near_failures_is_no_tail():
    """A weak U-Net misses a quarter of the lesions: their errors just below 1 would fit the steepest law best."""
    rng = np.random.default_rng(0)
    fit = fit_errors(np.concatenate([rng.uniform(0.1, 1, 600), rng.uniform(0.9995, 1, 200)]))
    assert fit.alpha < 10 and fit.knee < 0.95


def test_errors_without_a_distribution_are_one_sentence():
    with pytest.raises(LabError, match="raise --steps"):
        fit_errors(np.ones(500))


def test_no_record_is_scored_by_a_model_that_saw_its_group(made, tmp_path, monkeypatch):
    records, train, score = read_manifest(made), difficulty.train, difficulty.score
    seen, scored = [], []
    monkeypatch.setattr(difficulty, "train", lambda given, *rest: (seen.append(given), train(given, *rest))[1])
    monkeypatch.setattr(
        difficulty, "score", lambda unet, given, size: (scored.append(given), score(unet, given, size))[1]
    )
    scores = cross_validated(records, SETTINGS, tmp_path)
    assert list(scores.id) == [record.id for record in records] and scores.error.between(0, 1).all()
    assert sorted(record.id for given in scored for record in given) == sorted(scores.id)
    for trained_on, held_out in zip(seen, scored, strict=True):
        assert not {record.group for record in trained_on} & {record.group for record in held_out}
        assert len(trained_on) + len(held_out) == len(records)


def test_folds_share_every_source_and_never_a_group():
    base = {"modality": "", "anatomy": "", "lesion": "", "license": "", "split": "", "mask_fraction": 0, "query": ""}
    records = [
        difficulty.Record(f"{s}{i}", Path(), Path(), 1, 1, source=s, group=f"{s}{i // 3}", **base)
        for s, count in (("a", 90), ("b", 30))
        for i in range(count)
    ]
    frame = pd.DataFrame({"fold": group_folds(records, 5, 0), "group": [r.group for r in records]})
    frame["source"] = [r.source for r in records]
    assert (frame.groupby("group").fold.nunique() == 1).all()
    assert (pd.crosstab(frame.source, frame.fold).to_numpy() == [[18] * 5, [6] * 5]).all()
    assert not np.array_equal(frame.fold, group_folds(records, 5, 1))
    with pytest.raises(LabError, match="lower --folds"):
        group_folds([replace(record, group="one") for record in records], 5, 0)


def test_a_stopped_filter_goes_on_after_the_last_whole_fold_and_ends_the_same(made, tmp_path, monkeypatch):
    records, train, folds = read_manifest(made), difficulty.train, []
    whole = cross_validated(records, SETTINGS, tmp_path / "whole")

    def stopping(given, settings, fold, bar):
        if fold == 1 and folds == [0]:
            raise KeyboardInterrupt
        folds.append(fold)
        return train(given, settings, fold, bar)

    monkeypatch.setattr(difficulty, "train", stopping)
    with pytest.raises(KeyboardInterrupt):
        cross_validated(records, SETTINGS, tmp_path / "cut")
    folds.append("stopped")
    pd.testing.assert_frame_equal(cross_validated(records, SETTINGS, tmp_path / "cut"), whole)
    assert folds == [0, "stopped", 1, 2]
    for given, settings in ((records[1:], SETTINGS), (records, replace(SETTINGS, steps=5))):
        with pytest.raises(LabError, match="other records or settings"):
            cross_validated(given, settings, tmp_path / "cut")


def test_what_is_kept_is_the_hardest_and_its_control_has_as_many_of_each_split():
    rng = np.random.default_rng(0)
    scores = pd.DataFrame({"id": [f"{i:03d}" for i in range(200)], "split": ["train", "train", "val", "test"] * 50})
    scores["error"] = rng.random(200).round(2)
    fit = fit_errors(scores.error.to_numpy())
    assert np.array_equal(hardest(scores, fit, 0), scores.error > fit.knee)
    kept = hardest(scores, fit, 0.25)
    assert kept.sum() == 50 and scores.error[kept].min() >= scores.error[~kept].max()
    control = as_many_at_random(scores, kept, 3)
    assert scores.split[control].value_counts().to_dict() == scores.split[kept].value_counts().to_dict()
    assert not np.array_equal(control, kept)


def test_the_command_leaves_scores_plots_and_two_manifests(made, tmp_path, capsys):
    command = ["data", "filter", str(made), str(tmp_path / "out"), "--folds=2", "--steps=8", "--size=32"]
    assert main([*command, "--batch_size=4", "--share=0.4"]) == 0, capsys.readouterr().err
    scores = pd.read_csv(tmp_path / "out" / "scores.csv")
    kept = {record.id for record in read_manifest(made.parent / "difficult.jsonl")}
    assert kept == set(scores.id[scores.kept]) and len(kept) == 6
    assert len(read_manifest(made.parent / "random-difficult.jsonl")) == 6
    told = json.loads((tmp_path / "out" / "filter.json").read_text())
    assert told["kept"] == 6 and told["by"]["source"] == {"synthetic": {"records": 15, "kept": 6}}
    assert all((tmp_path / "out" / name).stat().st_size > 5000 for name in ("errors.png", "kept.png"))
    assert main([*command, "--size=30"]) == 2 and "multiple of 8" in capsys.readouterr().err
