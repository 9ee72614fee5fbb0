"""Without these a run that was stopped could not be trusted: its losses, its metrics or its cache would differ."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from apps.cli import main
from lab.data.mixture import MixtureSampler
from lab.data.reason import write_reason
from lab.model.release import load_model, load_segmenter, save_release
from lab.model.segmenter import Segmenter, SegmenterConfig
from tests.modules.kill import killed_at
from tests.tiny_checkpoints import llama

ROOT = Path(__file__).parents[2]
STEPS = 6


@pytest.fixture(scope="module")
def lesions(tmp_path_factory):
    """Eight synthetic images that are asked about in two ways or more; the last two are for validation."""
    return write_reason(tmp_path_factory.mktemp("lesions"), 8, seed=9, fractions=(0.75, 0.25, 0.0), size=64)


def flags(stage, lesions, name, *more, steps=STEPS, per_epoch=3):
    core = "core_seg." if stage == "sft" else ""
    part = f'[{{"manifest": "{lesions}", "per_batch": 4, "queries_per_image": 2}}]'
    arguments = ["fit", "-c", str(ROOT / "configs" / "tiny" / f"{stage}.yaml"), f"--name={name}"]
    arguments += [f"--data.init_args.train={part}", f"--data.init_args.val={lesions}", "--data.init_args.num_workers=0"]
    arguments += [f"--data.init_args.steps_per_epoch={per_epoch}", f"--trainer.max_steps={steps}"]
    arguments += ["--trainer.check_val_every_n_epoch=1", "--trainer.log_every_n_steps=1", "--trainer.accelerator=cpu"]
    arguments += [f"--model.init_args.total_steps={STEPS}", f"--model.init_args.{core}segmenter.image_size=64"]
    if stage == "sft":
        arguments += [
            "--model.init_args.core_seg.reasoner.image_size=64",
            "--model.init_args.segmenter_checkpoint=null",
        ]
        arguments += ["--model.init_args.cache=cache", "--model.init_args.max_new_tokens=8"]
        arguments += ["--model.init_args.own_text_after=2", "--model.init_args.decoder_after=4"]
        arguments += ["--model.init_args.core_seg.reasoner.layers=1"]
    return [*arguments, *more]


def metrics(name):
    """(step, loss) of every training line, as written."""
    lines = [json.loads(line) for line in Path(f"runs/{name}/metrics.jsonl").read_text().splitlines()]
    key = "train/loss" if any("train/loss" in line for line in lines) else "train/seg_loss"
    return [(line["step"], line[key]) for line in lines if key in line]


@pytest.mark.parametrize("has", [True, False])
def test_bfloat16_is_for_hardware_that_has_it(has, lesions, tmp_path, monkeypatch, caplog):
    """Else the default configuration is 15 times as slow as it need be on a processor without AVX-512 BF16."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("modules.precision.has_bfloat16", lambda device: has)
    monkeypatch.setattr("modules.scored.has_bfloat16", lambda device: has)
    encode, seen = Segmenter.encode, []
    watched = lambda segmenter, pixels: seen.append(torch.is_autocast_enabled("cpu")) or encode(segmenter, pixels)  # noqa: E731
    monkeypatch.setattr(Segmenter, "encode", watched)
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        assert main(flags("segmenter", lesions, "run", "--trainer.limit_val_batches=0", steps=2)) == 0
    assert seen == [has, has]
    assert ("training in float32" in caplog.text) is not has


@pytest.mark.parametrize("stage", ["segmenter", "sft"])
def test_a_resumed_run_equals_an_unbroken_one(stage, lesions, tmp_path, monkeypatch):
    """Losses to 6 digits, and no metric lost or written twice."""
    monkeypatch.chdir(tmp_path)
    assert main(flags(stage, lesions, "whole")) == 0
    assert main(flags(stage, lesions, "broken", steps=3)) == 0
    assert main(flags(stage, lesions, "broken", "--ckpt_path=last")) == 0
    whole, broken = metrics("whole"), metrics("broken")
    assert [step for step, _ in broken] == [step for step, _ in whole] == list(range(STEPS))
    for (_, one), (_, other) in zip(whole, broken):
        assert one == pytest.approx(other, abs=1e-6)
    ours, theirs = (
        torch.load(f"runs/{n}/checkpoints/last.ckpt", weights_only=True)["state_dict"] for n in ("whole", "broken")
    )
    for name, weights in ours.items():
        torch.testing.assert_close(weights, theirs[name], msg=name)
    flags_of_test = [word for word in flags(stage, lesions, "whole") if "max_steps" not in word]
    for subcommand in ("validate", "test", "predict"):
        more = ["--ckpt_path=best", "--data.init_args.test_split=val"]
        assert main([subcommand, *flags_of_test[1:], *more]) == 0
    assert [step for step, _ in metrics("whole")] == list(range(STEPS)), "a test is no point of the run's curves"
    predicted = Path("runs/whole/predictions/predictions.jsonl").read_text().splitlines()
    masks = [Path("runs/whole/predictions", json.loads(line)["mask"]) for line in predicted]
    assert predicted and all(mask.is_file() for mask in masks)
    load = load_segmenter if stage == "segmenter" else load_model
    load("runs/whole/checkpoints/best.ckpt")


def test_first_steps_learn_relevance_alone_and_it_is_that_of_the_whole_loss(lesions, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(flags("sft", lesions, "whole", steps=1)) == 0
    assert main(flags("sft", lesions, "first", "--model.init_args.relevance_first=1", steps=2)) == 0
    whole, first = (
        [json.loads(line) for line in Path(f"runs/{name}/metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "first")
    )
    losses = [[line for line in lines if "train/loss" in line] for lines in (whole, first)]
    (both,), (alone, after) = losses
    assert alone["train/relevance_loss"] == pytest.approx(both["train/relevance_loss"], rel=1e-3)
    assert alone["train/loss"] == pytest.approx(5 * alone["train/relevance_loss"])
    assert not {"train/text_loss", "train/seg_loss"} & set(alone) and after["train/text_loss"] > 0


def test_first_steps_of_a_language_model_draw_masks_without_a_word(lesions, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reasoner = "--model.init_args.core_seg.reasoner"
    more = [f"{reasoner}.model={llama(tmp_path / 'llama')}", f"{reasoner}.notice=true", f"{reasoner}.lora_rank=2"]
    assert main(flags("sft", lesions, "first", *more, "--model.init_args.relevance_first=1", steps=2)) == 0
    lines = [json.loads(line) for line in Path("runs/first/metrics.jsonl").read_text().splitlines()]
    alone, after = (line for line in lines if "train/loss" in line)
    assert "train/text_loss" not in alone and after["train/text_loss"] > 0
    assert all(line[f"train/{name}_loss"] > 0 for line in (alone, after) for name in ("seg", "prompt", "relevance"))
    module = load_model("runs/first/checkpoints/last.ckpt")
    assert module.reasoner.heed.abs().max() > 0


def test_batches_that_are_accumulated_count_as_seen(lesions, tmp_path, monkeypatch, capsys):
    """Else each epoch would begin with what the last one showed, and the run not come to its end."""
    monkeypatch.chdir(tmp_path)
    batches, batch = [], MixtureSampler.batch
    watched = lambda sampler, number: batches.append(number) or batch(sampler, number)  # noqa: E731
    monkeypatch.setattr(MixtureSampler, "batch", watched)
    more = ["--trainer.accumulate_grad_batches=2", "--model.init_args.own_text_after=9"]
    assert main(flags("sft", lesions, "twice", *more, steps=2, per_epoch=4)) == 0
    assert main(flags("sft", lesions, "twice", *more, "--ckpt_path=last", steps=3, per_epoch=4)) == 0
    assert sorted(set(batches)) == list(range(max(batches) + 1)) and len(batches) == len(set(batches)) >= 6
    assert torch.load("runs/twice/checkpoints/last.ckpt", weights_only=True)["global_step"] == 3
    assert main(flags("sft", lesions, "odd", *more, per_epoch=3)) == 2
    assert "not a multiple of trainer.accumulate_grad_batches 2" in capsys.readouterr().err


def test_stage_1_killed_loses_only_the_steps_since_the_last_checkpoint(lesions, tmp_path, monkeypatch):
    """And does those again as they were."""
    monkeypatch.chdir(tmp_path)
    assert main(flags("sft", lesions, "whole", per_epoch=2)) == 0
    killed_at(3, flags("sft", lesions, "cut", per_epoch=2), "cut")
    assert torch.load("runs/cut/checkpoints/last.ckpt", weights_only=True)["global_step"] in (2, 4)
    assert main(flags("sft", lesions, "cut", "--ckpt_path=last", per_epoch=2)) == 0
    assert [step for step, _ in metrics("cut")] == list(range(STEPS))
    for (_, one), (_, other) in zip(metrics("whole"), metrics("cut")):
        assert one == pytest.approx(other, abs=1e-6)


def test_a_second_epoch_never_runs_an_encoder(lesions, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(flags("sft", lesions, "cached", "--model.init_args.views=1", steps=9)) == 0
    encoded = [
        json.loads(line)["train/encoded"]
        for line in Path("runs/cached/metrics.jsonl").read_text().splitlines()
        if "train/encoded" in line
    ]
    assert sum(encoded[:3]) > 0 and sum(encoded[3:]) == 0  # 3 steps of 2 images see all 6
    stored = list(Path("cache").rglob("*.safetensors"))
    assert len(stored) == 6  # one an image, however many queries
    assert main(flags("sft", lesions, "again", "--model.init_args.views=1", steps=3)) == 0
    assert len(list(Path("cache").rglob("*.safetensors"))) == 6


@pytest.mark.parametrize(
    "overlay", sorted((ROOT / "configs" / "tiny" / "ablations").glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_baseline_and_ablation_trains_and_answers(overlay, lesions, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(flags("sft", lesions, "run", "-c", str(overlay), steps=3)) == 0
    assert all(loss == loss for _, loss in metrics("run"))
    model = load_model("runs/run/checkpoints/last.ckpt")
    saved = model.config
    built = saved.adapter.kind, saved.adapter.state, saved.prompt
    assert (built == ("paper", "seg", "semantic")) == (overlay.stem in ("no_reasoning", "one_look"))
    assert saved.reasoner.notice == (overlay.stem in ("linear_adapter", "mean_state", "no_reasoning"))
    text = "<think> - </think><answer>The cyst are located at [[10,10,60,60]]. The mask is <seg>.</answer>"
    assert model.segment_text(model.open([np.zeros((64, 64, 3), np.uint8)], ["Segment."]), [text])[0].has_mask


def test_stage_1_goes_on_with_the_deep_layers_of_the_encoder(lesions, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(flags("sft", lesions, "first", steps=1)) == 0
    start = "runs/first/checkpoints/last.ckpt"
    part = f'[{{"manifest": "{lesions}", "per_batch": 4}}]'
    arguments = [
        "fit",
        "-c",
        str(ROOT / "configs" / "tiny" / "joint.yaml"),
        "--name=joint",
        "--trainer.accelerator=cpu",
    ]
    arguments += [f"--data.init_args.train={part}", f"--data.init_args.val={lesions}", "--data.init_args.num_workers=0"]
    arguments += [f"--model.init_args.start={start}", "--model.init_args.max_new_tokens=8", "--trainer.max_steps=3"]
    assert main([*arguments, "--model.init_args.cache=cache"]) == 2
    assert "cannot be cached" in capsys.readouterr().err
    assert main([*arguments, "--data.init_args.val_limit=2"]) == 0
    before, after = (load_model(path).segmenter.image_encoder for path in (start, "runs/joint/checkpoints/last.ckpt"))
    statistics = [name for name, _ in before.named_buffers()]
    assert statistics and all(torch.equal(before.get_buffer(name), after.get_buffer(name)) for name in statistics)
    same = {name for name, value in before.named_parameters() if torch.equal(value, after.get_parameter(name))}
    shallow = ("backbone.conv_stem", "backbone.bn1", "backbone.blocks.0.", "backbone.blocks.1.", "backbone.blocks.2.")
    assert {name for name, _ in before.named_parameters() if name.startswith(shallow)} == same


def test_stage_0_goes_on_from_a_release_whose_encoder_stays_as_it_is(lesions, tmp_path, monkeypatch):
    """Else the encoder that stage 1 was trained with would no longer be that of the boxes' segmenter."""
    monkeypatch.chdir(tmp_path)
    before = Segmenter(SegmenterConfig(image_size=64)).eval()
    save_release(before, "stage0", "Stage 0", "nothing", half=False)
    more = ["--model.init_args.segmenter=null", "--model.init_args.start=stage0"]
    arguments = [word for word in flags("segmenter", lesions, "on", *more) if "segmenter.image_size" not in word]
    assert main([*arguments, "--model.init_args.encoder_learning_rate=0"]) == 0
    after = load_segmenter("runs/on/checkpoints/last.ckpt")
    assert all(
        torch.equal(t, after.image_encoder.state_dict()[n]) for n, t in before.image_encoder.state_dict().items()
    )
    assert any(not torch.equal(p, q) for p, q in zip(before.mask_decoder.parameters(), after.mask_decoder.parameters()))
