"""Without these a run on several processes would learn something else than a run on one, or hang, or lose its work."""

import json
import os
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from apps.cli import main
from lab.data.reason import write_reason
from lab.model.core_seg import CoreSeg
from lab.model.reasoner import ReasonerConfig
from lab.model.release import load_model, save_release
from tests.modules.ranks import TWO, Ranks
from tests.tiny_checkpoints import qwen
from tests.tiny_model import tiny_config

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "tiny"
MODEL, DATA = "--model.init_args", "--data.init_args"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def lesions(tmp_path_factory):
    """Eight synthetic images that are asked about in two ways or more; the last two are for validation."""
    return write_reason(tmp_path_factory.mktemp("lesions"), 8, seed=9, fractions=(0.75, 0.25, 0.0), size=64)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A release of a model that has learnt nothing, but that often writes tags, `<seg>` and the end of its answer."""
    torch.manual_seed(0)
    config, folder = tiny_config(layers=2), tmp_path_factory.mktemp("start")
    config.reasoner.notice = True
    model = CoreSeg(config)
    torch.nn.init.normal_(model.reasoner.mark, std=0.02)
    scene = model.open([np.zeros((64, 64, 3), np.uint8)], ["Segment the cyst."])
    with torch.no_grad():
        opened = model.reasoner.prompt(scene.prompts, scene.seen.visual)
        state = model.reasoner.model.model.language_model(inputs_embeds=opened.embeds).last_hidden_state[0, -1]
        tags = model.reasoner.tokenizer.convert_tokens_to_ids(["<think>", "</think>", "<seg>", "<eos>"])
        model.reasoner.model.get_input_embeddings().weight[tags] = 12 * state / state.square().sum()
    save_release(model, folder, "t", "nothing", half=False)
    return folder


def flags(stage: str, lesions: Path, start: Path, name: str, *more: str) -> list[str]:
    """Arguments that train for 4 steps in epochs of 2 on 2 images of 2 queries each, and validate on 5 records."""
    part = f'[{{"manifest": "{lesions}", "per_batch": 4, "queries_per_image": 2}}]'
    arguments = ["fit", "-c", str(CONFIGS / f"{stage}.yaml"), f"--name={name}", f"{DATA}.train={part}"]
    arguments += [f"{DATA}.val={lesions}", f"{DATA}.val_limit=5", f"{DATA}.num_workers=0", f"{DATA}.steps_per_epoch=2"]
    arguments += ["--trainer.max_steps=4", "--trainer.check_val_every_n_epoch=1", "--trainer.log_every_n_steps=1"]
    arguments += ["--trainer.accelerator=cpu", f"{MODEL}.total_steps=8", f"{MODEL}.warmup_steps=1"]
    if stage == "unet":
        return [*arguments, f"{MODEL}.unet.image_size=64", f"{MODEL}.encoder=null", *more]
    arguments += [f"{MODEL}.start={start}", f"{MODEL}.cache=null", f"{MODEL}.max_new_tokens=8", f"{MODEL}.bf16=false"]
    if stage == "sft":
        arguments += [f"{MODEL}.core_seg=null", f"{MODEL}.segmenter_checkpoint=null", f"{MODEL}.own_text=1"]
        arguments += [f"{MODEL}.own_text_after=3", f"{MODEL}.decoder_after=2", f"{MODEL}.relevance_first=1"]
        return [*arguments, "--model.class_path=tests.modules.told.ToldSft", *more]
    arguments += ["--model.class_path=tests.modules.told.ToldGrpo", f"{MODEL}.group_size=4"]
    callback = "[{class_path: modules.rollouts.RolloutFiles, init_args: {every: 1, follow: 3}}]"
    return [*arguments, f"--trainer.callbacks={callback}", *more]


def metrics(run: str) -> list[dict]:
    lines = [json.loads(line) for line in Path(f"runs/{run}/metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in ("time", "train/encoded")} for line in lines]


def checkpoint(run: str) -> dict:
    return torch.load(f"runs/{run}/checkpoints/last.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def alone(lesions, start, tmp_path_factory):
    """A folder with what one process makes of both stages."""
    before, folder = Path.cwd(), tmp_path_factory.mktemp("alone")
    os.chdir(folder)
    for stage in ("sft", "grpo"):
        assert main(flags(stage, lesions, start, f"{stage}-alone")) == 0
    if find_spec("deepspeed"):
        assert main(flags("sft", lesions, start, "sft-alone-deepspeed", *needs("deepspeed"))) == 0
    os.chdir(before)
    return folder


def needs(strategy: str) -> list[str]:
    """Flags with which either all or no parameters of a group have a gradient in stage 1: else ZeRO does otherwise."""
    if strategy != "deepspeed":
        return []
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed; .ci/run installs it", exc_type=ImportError)
    return [f"{MODEL}.own_text_after=9", f"{MODEL}.relevance_first=0"]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "deepspeed"])
@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_two_processes_do_what_one_does(stage, strategy, lesions, start, alone):
    """Losses, rewards and every other metric; weights; what is sampled; and the checkpoint is a model like any other.

    Some steps learn from sampled text, of another length on each process; five records are validated on by two."""
    more = needs(strategy) if stage == "sft" else []
    os.chdir(alone)
    one, two = f"{stage}-alone-{strategy}" if more else f"{stage}-alone", f"{stage}-{strategy}"
    Ranks(flags(stage, lesions, start, two, f"--trainer.strategy={strategy}", *TWO, *more)).finish()
    assert len(metrics(one)) == len(metrics(two)) > 4
    gaps = []
    for left, right in zip(metrics(one), metrics(two)):
        assert left == pytest.approx(right, rel=1e-4, abs=1e-5)
        gaps += [abs(left[name] - right[name]) / max(1, abs(left[name])) for name in left if "loss" in name]
    weights = checkpoint(one)["state_dict"], checkpoint(two)["state_dict"]
    assert weights[0].keys() == weights[1].keys()
    apart = max(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[0])
    untrained = load_model(start).state_dict()
    moved = max(
        float((value - untrained[name]).abs().max())
        for name, value in load_model(f"runs/{one}/checkpoints/last.ckpt").state_dict().items()
        if name in untrained
    )
    print(f"{stage} {strategy}: losses {max(gaps):.1e}, weights {apart:.1e}, of a change of {moved:.1e}")
    assert apart < 2e-4 < 5e-4 < moved
    load_model(f"runs/{two}/checkpoints/last.ckpt")
    if stage == "sft":
        assert more or any(line.get("train/own_seg_loss") for line in metrics(one)), "no mask was learnt from own text"
        return
    assert any(line.get("train/seg_loss") for line in metrics(one)), "no mask was learnt from"
    files = [sorted(path.name for path in Path(f"runs/{run}/rollouts").iterdir()) for run in (one, two)]
    assert files[0] == files[1] and len(files[0]) == 4 + 5
    for name in files[0]:
        left, right = (pd.read_parquet(f"runs/{run}/rollouts/{name}") for run in (one, two))
        assert left.completion.tolist() == right.completion.tolist() and left.id.tolist() == right.id.tolist()


def test_processes_with_fewer_groups_than_others_hold_up_none(lesions, start, alone):
    """Of a batch with one question about one image and two about the other; and advantages are each group's own."""
    os.chdir(alone)
    parts = [{"manifest": str(lesions), "per_batch": n, "queries_per_image": n} for n in (1, 2)]
    more = [f"{DATA}.train={json.dumps(parts)}", f"{MODEL}.scale=batch", f"{MODEL}.beta=0.04"]
    assert main(flags("grpo", lesions, start, "uneven-alone", *more)) == 0
    for strategy in ("ddp", "fsdp2"):
        run = f"uneven-{strategy}"
        Ranks(flags("grpo", lesions, start, run, f"--trainer.strategy={strategy}", *TWO, *more)).finish()
        for left, right in zip(metrics("uneven-alone"), metrics(run), strict=True):
            assert left == pytest.approx(right, rel=1e-4, abs=1e-5)


def test_lora_beside_bfloat16_is_sharded_and_held_near_to_its_start(lesions, tmp_path, monkeypatch):
    """Stage 2 trains stage 1's LoRA further: each process puts back its own part of the start."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    reasoner = ReasonerConfig(qwen(tmp_path / "qwen"), image_size=56, scene_dim=32, dtype="bfloat16", lora_rank=4)
    model = CoreSeg(replace(tiny_config(), reasoner=reasoner))
    for name, parameter in model.reasoner.model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    scene = model.open([np.zeros((64, 64, 3), np.uint8)], ["Segment the cyst."])
    with torch.no_grad():  # it often writes tags, so that rewards for format differ
        embeds = model.reasoner.prompt(scene.prompts, scene.seen.visual, scene.encoded.shapes).embeds
        state = model.reasoner.language_model(inputs_embeds=embeds.bfloat16()).last_hidden_state[0, -1].float()
        tags = model.reasoner.tokenizer.encode("<think>a</think>", add_special_tokens=False)
        weight = 14 * state / state.square().sum()
        model.reasoner.model.lm_head.base.weight[[*tags, model.reasoner.eos_id]] = weight.bfloat16()
    save_release(model, tmp_path / "start", "t", "nothing", half=False)
    more = [f"{MODEL}.lora_rank=4", f"{MODEL}.learning_rate=0.01", f"{MODEL}.beta=0.1", f"{MODEL}.max_new_tokens=16"]
    more += [f"{MODEL}.group_size=8", "--trainer.max_steps=2"]
    assert main([*flags("grpo", lesions, tmp_path / "start", "one", *more), "--trainer.callbacks=[]"]) == 0
    two = flags("grpo", lesions, tmp_path / "start", "two", "--trainer.strategy=fsdp2", *TWO, *more)
    Ranks([*two, "--trainer.callbacks=[]"]).finish()
    (alone, spread) = ([line for line in metrics(run) if "kl" in line] for run in ("one", "two"))
    assert alone[0]["kl"] == spread[0]["kl"] == 0 < alone[1]["kl"]  # of the start itself, and of what moved from it
    assert alone[1]["kl"] == pytest.approx(spread[1]["kl"], rel=0.25)  # bfloat16 rounds otherwise on two processes
    assert [line["reward"] for line in alone] == pytest.approx([line["reward"] for line in spread], abs=0.05)


@pytest.mark.parametrize("strategy", ["fsdp2", "deepspeed"])
def test_a_sharded_run_goes_on_sharded_or_in_one_process(strategy, lesions, start, alone):
    """Else a checkpoint of many GPUs would be of no use on fewer, or lose what the optimiser knew."""
    more = needs(strategy)
    os.chdir(alone)
    whole, cut, fewer = f"sft-alone-{strategy}" if more else "sft-alone", f"cut-{strategy}", f"fewer-{strategy}"
    sharded = flags("sft", lesions, start, cut, f"--trainer.strategy={strategy}", *TWO, *more)
    Ranks([*sharded, "--trainer.max_steps=2"]).finish()
    shutil.copytree(f"runs/{cut}", f"runs/{fewer}")
    Ranks([*sharded, "--ckpt_path=last"]).finish()
    assert main(flags("sft", lesions, start, fewer, "--ckpt_path=last", *more)) == 0
    for run in (cut, fewer):
        assert [line["step"] for line in metrics(run)] == [line["step"] for line in metrics(whole)]
        for left, right in zip(metrics(whole), metrics(run)):
            assert left == pytest.approx(right, rel=1e-4, abs=1e-5)
        left, right = checkpoint(whole), checkpoint(run)
        for name, value in left["state_dict"].items():
            torch.testing.assert_close(value, right["state_dict"][name], atol=2e-4, rtol=0, msg=name)


def test_the_u_net_trains_on_two_processes(lesions, start, tmp_path, monkeypatch):
    """And its batch norms' statistics are of the records of both."""
    monkeypatch.chdir(tmp_path)
    printed = Ranks(flags("unet", lesions, start, "unet", "--trainer.strategy=ddp", *TWO)).finish()
    assert [line["step"] for line in metrics("unet") if "train/seg_loss" in line] == [0, 1, 2, 3]
    assert sum("val/mDice" in line for line in metrics("unet")) == 2
    assert "Params" in printed[0] and "Params" not in printed[1] and "it/s" not in printed[1]


def test_processes_that_would_start_from_different_models_are_refused(lesions, start, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    more = ["--trainer.strategy=ddp", *TWO, "--seed_everything=true"]
    codes, printed = Ranks(flags("sft", lesions, start, "no", *more)).wait()
    assert codes == [2, 2] and "give --seed_everything a number" in printed[0]


@pytest.mark.parametrize(
    "strategy, sentence",
    [
        ("deepspeed", "deepspeed==0.19.8, or take fsdp2"),
        ("fsdp", "take one of auto, ddp, fsdp2, deepspeed"),
    ],
)
def test_a_strategy_that_cannot_work_here_is_refused(strategy, sentence, lesions, start, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("modules.strategies.find_spec", lambda name: None)
    assert main(flags("sft", lesions, start, "no", f"--trainer.strategy={strategy}")) == 2
    assert sentence in capsys.readouterr().err
