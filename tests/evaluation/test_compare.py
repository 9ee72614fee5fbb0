"""Without these a chance difference could be called a gain, or one model's images be compared with another's."""

import json

import numpy as np
import pandas as pd
import pytest

from apps.cli import main
from lab.errors import LabError
from lab.evaluation.compare import compare, comparison_table, read_cases
from lab.evaluation.curves import draw_curves, read_metrics, smoothed


def cases(dice):
    dice = np.asarray(dice, float)
    ids = [f"x/{n}" for n in range(len(dice))]
    return pd.DataFrame({"id": ids, "group": ids, "dice": dice, "failed": dice == 0})


BASE = cases(np.r_[np.zeros(10), np.linspace(0.3, 0.9, 90)])


def test_a_gain_on_every_image_is_one_and_none_is_none():
    better = cases(np.r_[np.zeros(4), np.full(6, 0.5), np.linspace(0.33, 0.93, 90)])
    found = compare(BASE, [better, better])
    assert found["mean"] == found["seeds"][0] == found["seeds"][1]
    assert found["mean"]["gain"] == pytest.approx(0.03 * 0.9 + 0.5 * 0.06)
    assert 0 < found["mean"]["gain_ci"][0] < found["mean"]["gain"] < found["mean"]["gain_ci"][1]
    assert found["mean"]["failures_removed"] == 0.6 and found["mean"]["p"] < 1e-6
    same = compare(BASE, [BASE])["mean"]
    assert same["gain_ci"] == [0, 0] and same["failures_removed"] == 0 and same["p"] == 1
    assert compare(BASE, [BASE, BASE, BASE])["mean"]["p"] == 1  # means of equal numbers differ in the last digit
    assert "seed 1" in comparison_table(found) and "mean of the seeds" in comparison_table(found)


def test_ids_that_look_like_numbers_stay_what_they_are(tmp_path):
    (tmp_path / "cases.csv").write_text("id,dice,failed\n0001,0.5,False\n1,0.5,False\n")
    read = read_cases(tmp_path)
    assert read.id.tolist() == read.group.tolist() == ["0001", "1"]


def test_noise_is_not_a_gain():
    rng = np.random.default_rng(0)
    other = cases(np.clip(BASE.dice + rng.normal(0, 0.1, 100), 0, 1))
    low, high = compare(BASE, [other])["mean"]["gain_ci"]
    assert low < 0.01 and high > -0.01


def test_images_of_one_patient_are_not_so_many_patients():
    """100 images of 5 patients, of whom 4 gain a little and one loses: counted as 100, that would be sure to help."""
    gains = np.repeat([0.05, 0.04, 0.06, 0.05, -0.1], 20)
    one, other = (cases(0.5 + gain).assign(group=np.arange(100) // 20) for gain in (np.zeros(100), gains))
    found = compare(one, [other])["mean"]
    assert found["gain_ci"][0] < 0 < found["gain"] and found["p"] > 0.05
    assert compare(cases(one.dice), [cases(other.dice)])["mean"]["gain_ci"][0] > 0


def test_order_does_not_matter_but_the_images_do():
    assert compare(BASE, [BASE.sample(frac=1, random_state=0)])["mean"]["gain"] == 0
    with pytest.raises(LabError, match="not of the same images"):
        compare(BASE, [BASE[1:]])


def test_evaluations_in_folders_of_one_name_are_all_kept(tmp_path):
    for name in ("a", "b"):
        folder = tmp_path / name / "real"
        folder.mkdir(parents=True)
        BASE.to_csv(folder / "cases.csv", index=False)
        (folder / "evaluation.json").write_text(json.dumps({"model": name}))
    out = tmp_path / "both.json"
    assert main(["compare", str(tmp_path / "a/real"), str(tmp_path / "b/real"), f"--out={out}"]) == 0
    told = json.loads(out.read_text())
    assert told["models"] == ["a", "b"] and len(told["evaluations"]) == 2


@pytest.fixture
def runs(tmp_path):
    """Two seeds of one configuration and one run of another; the second seed was killed within a line."""
    for number, name in enumerate(("a-0", "a-1", "b")):
        lines = [{"step": step, "time": 1.0, "reward": number + step / 10} for step in range(20)]
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with (tmp_path / "a-1" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "rew')
    return tmp_path


def test_curves_of_several_runs_are_drawn(runs, capsys):
    assert len(read_metrics(runs / "a-1")) == 20
    assert (
        main(["curves", *(str(runs / n) for n in ("a-0", "a-1", "b")), "--metrics", "reward", f"--out={runs}/c.png"])
        == 0
    )
    assert (runs / "c.png").stat().st_size > 5000
    with pytest.raises(LabError, match="no run logged 'dice'; choose from reward, step, time"):
        draw_curves(runs / "d.png", {"a": [runs / "a-0"]}, ["dice"])


def test_smoothing_keeps_a_constant_and_starts_at_the_first_value():
    assert smoothed(pd.Series([2.0] * 5), 0.9).tolist() == pytest.approx([2] * 5)
    rising = smoothed(pd.Series([0.0, 1, 1, 1]), 0.5)
    assert rising[0] == 0 and (rising.diff()[1:] > 0).all()
    assert smoothed(pd.Series([0.0, 1, 0]), 0.0).tolist() == [0, 1, 0]
