"""Without these the reference that CORE-Seg is measured against could be broken, and any model would look good."""

import json
from pathlib import Path

import pytest
import torch

from apps.cli import main
from lab.baselines.unet import UNetConfig, unet_from_checkpoint
from lab.data.synthetic import write_plain
from lab.model.core_seg import CoreSeg
from lab.model.release import ReleaseError, save_release
from modules.unet import UNetModule
from tests.tiny_model import tiny_config

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("release")
    save_release(CoreSeg(tiny_config()), folder, "t", "nothing", half=False)
    return folder


def test_it_starts_from_the_encoder_of_a_release(release):
    unet, model = UNetModule(UNetConfig(64), encoder=str(release)).unet, CoreSeg(tiny_config())
    assert not torch.equal(unet.backbone.conv_stem.weight, model.segmenter.image_encoder.backbone.conv_stem.weight)
    from lab.model.release import load_segmenter

    theirs = load_segmenter(release).image_encoder.backbone.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in unet.backbone.state_dict().items())


def test_it_learns_what_it_is_shown_and_is_evaluated_without_text(release, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    manifest = write_plain(Path("data"), 8, 3, size=64)
    arguments = ["fit", "-c", str(ROOT / "configs" / "tiny" / "unet.yaml"), "--name=unet", "--trainer.max_steps=60"]
    arguments += [f'--data.init_args.train=[{{"manifest": "{manifest}", "per_batch": 4}}]', "--trainer.accelerator=cpu"]
    arguments += [
        f"--data.init_args.val={manifest}",
        "--data.init_args.num_workers=0",
        "--model.init_args.total_steps=60",
    ]
    arguments += ["--model.init_args.unet.image_size=64", f"--model.init_args.encoder={release}"]
    assert main([*arguments, "--model.init_args.warmup_steps=5", "--model.init_args.augmentation=0"]) == 0
    checkpoint = "runs/unet/checkpoints/last.ckpt"
    assert main(["evaluate", checkpoint, f"--manifest={manifest}", "--split=train", "--out=out"]) == 0
    overall = json.loads(Path("out/evaluation.json").read_text())["overall"]
    assert overall["mDice"] > 0.5 and overall["box_f1"] is None
    assert not {"faithfulness", "influence"} & overall.keys() and 0 <= overall["calibration_error"] <= 1
    with pytest.raises(ReleaseError, match="does not exist"):
        unet_from_checkpoint("runs/unet/checkpoints/none.ckpt")
