"""Without this the command that the README's figures of speed come from can break unseen."""

import pytest

from benchmarks import grpo_step
from lab.data.synthetic import write_plain
from lab.model.core_seg import CoreSeg
from lab.model.release import save_release
from modules.groups import Group
from tests.tiny_model import tiny_config


@pytest.mark.parametrize("masks", [True, False])
def test_our_side_of_the_grpo_benchmark_runs_and_leaves_nothing_changed(masks, tmp_path, monkeypatch):
    monkeypatch.setattr(grpo_step, "IMAGES", 2)
    monkeypatch.setattr(grpo_step, "GROUP", 4)
    save_release(CoreSeg(tiny_config()), tmp_path / "start", "t", "nothing", half=False)
    manifest, score = write_plain(tmp_path / "data", 4, seed=0, size=64), Group.score
    told = grpo_step.ours(tmp_path / "start", manifest, 1, masks)
    assert told["seconds"] > 0 and sum(told["share_of_time"].values()) == pytest.approx(1, abs=0.01)
    assert {"rollout", "rewards", "backward"} <= told["share_of_time"].keys() and (told["masks_drawn"] > 0) == masks
    assert Group.score is score
