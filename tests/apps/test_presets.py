"""Without these a preset would stop at its first step on the GPUs that it was written for."""

import json
import os
import shutil
from functools import partial, wraps
from importlib import import_module
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from segment_anything import sam_model_registry

from apps.cli import main
from lab.data.reason import write_reason
from lab.model.adapter import PromptAdapter
from lab.model.core_seg import CoreSeg
from lab.model.release import load_model, load_release, save_release
from modules.grpo import Grpo
from modules.precision import has_bfloat16
from tests.tiny_checkpoints import IMAGE_SIZES, REASONERS, llama, qwen, sam2
from tests.tiny_model import tiny_config

ROOT = Path(__file__).parents[2]
PRESETS = ("tiny", "smol", "small", "paper")
CONFIGS = [
    path.relative_to(ROOT).as_posix() for name in PRESETS for path in sorted((ROOT / "configs" / name).rglob("*.yaml"))
]
ANSWER = "<think> a </think><answer>The cyst are located at [[10,10,60,60]]. The mask is <seg>.</answer>"
MODEL, DATA = "--model.init_args", "--data.init_args"


@pytest.fixture(scope="module")
def lesions(tmp_path_factory):
    """Eight synthetic images that are asked about in two ways or more; the last two are for validation. One is cut to a
    tall and one to a wide image, and so on."""
    manifest = write_reason(tmp_path_factory.mktemp("lesions"), 8, seed=9, fractions=(0.75, 0.25, 0.0), size=64)
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    for line in lines:
        line["width"], line["height"] = ((64, 64), (32, 64), (64, 48))[int(line["group"][-1]) % 3]
        for name in (line["image"], line["mask"]):
            path = manifest.parent / name
            pixels = np.asarray(Image.open(path))[: line["height"], : line["width"]]
            Image.fromarray(pixels).save(path)
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return manifest


@pytest.fixture
def medsam(monkeypatch, tmp_path):
    """A MedSAM file whose encoder takes a moment, in segment-anything's own format and at its 1024 px."""
    sizes = {"encoder_embed_dim": 32, "encoder_depth": 1, "encoder_num_heads": 2, "encoder_global_attn_indexes": []}
    small = partial(import_module("segment_anything.build_sam")._build_sam, **sizes)
    monkeypatch.setitem(sam_model_registry, "vit_b", lambda checkpoint=None: small(checkpoint=checkpoint))
    torch.save(sam_model_registry["vit_b"]().state_dict(), tmp_path / "medsam.pth")
    return str(tmp_path / "medsam.pth")


@pytest.fixture
def start(tmp_path):
    save_release(CoreSeg(tiny_config()), tmp_path / "start", "t", "nothing")
    save_release(CoreSeg(tiny_config()).segmenter, tmp_path / "stage0", "t", "nothing")
    return tmp_path / "start"


@pytest.mark.parametrize("config", CONFIGS)
def test_every_configuration_builds_its_model_and_trainer(config, medsam, start, tmp_path, monkeypatch):
    """All as written but for the paths of weights, and the runs that it starts from."""
    text = (ROOT / config).read_text()
    flags, base = [], ["-c", str(ROOT / "configs/tiny/sft.yaml")] if "ablations" in config else []
    if "start:" in text:
        flags.append(f"{MODEL}.start={start}")
    if "segmenter_checkpoint: r" in text or base:
        flags.append(f"{MODEL}.segmenter_checkpoint=null")
    if "encoder: releases" in text:
        flags.append(f"{MODEL}.encoder={start.parent / 'stage0'}")
    if "smol/sft" in config:
        flags.append(f"{MODEL}.core_seg.reasoner.model={llama(tmp_path / 'llama')}")
        flags.append(f"{MODEL}.core_seg.reasoner.first_layers=1")
    if "medsam" in text and "core_seg:" in text:
        name = "qwen" if "paper" in config else "idefics3"
        flags += [f"{MODEL}.core_seg.segmenter.weights={medsam}", f"{MODEL}.cache=null"]
        flags.append(f"{MODEL}.core_seg.reasoner.model={REASONERS[name](tmp_path / name)}")
        if name == "idefics3":
            flags.append(f"{MODEL}.core_seg.reasoner.image_size=128")
    fitted = []
    fit = wraps(L.Trainer.fit)(lambda trainer, model, **given: fitted.append((trainer, model)))
    monkeypatch.setattr(L.Trainer, "fit", fit)
    monkeypatch.chdir(tmp_path)
    assert main(["fit", *base, "-c", str(ROOT / config), "--trainer.accelerator=cpu", *flags]) == 0
    ((trainer, module),) = fitted
    if checkpoints := module.hparams.get("gradient_checkpointing"):
        assert module.core_seg.reasoner.language_model.is_gradient_checkpointing
    assert ("paper" in config) == bool(checkpoints)
    assert module.hparams.total_steps == trainer.max_steps * module.hparams.get("inner_steps", 1)


@pytest.mark.parametrize(
    ("preset", "name", "seen_by"),
    [
        ("paper", "qwen", "medsam"),
        ("small", "fastvlm", "sam2"),
        ("small", "idefics3", "small"),
        ("smol", "llama", "small"),
    ],
)
def test_a_preset_trains_both_stages_and_its_model_travels(
    preset, name, seen_by, medsam, lesions, tmp_path, monkeypatch, capsys
):
    """SFT, GRPO, release, merge and a dry push; at the end the checkpoints that it began with are gone."""
    monkeypatch.chdir(tmp_path)
    images = 3 if name == "qwen" else 1
    part = f'[{{"manifest": "{lesions}", "per_batch": {2 * images}, "queries_per_image": 2}}]'
    flags = [f"{DATA}.train={part}", f"{DATA}.val={lesions}", f"{DATA}.num_workers=0", f"{DATA}.steps_per_epoch=1"]
    flags += [f"{MODEL}.total_steps=1", "--trainer.max_steps=1", "--trainer.accelerator=cpu", f"{MODEL}.warmup_steps=0"]
    flags += ["--trainer.check_val_every_n_epoch=9", f"{MODEL}.max_new_tokens=6", f"{MODEL}.views=1"]
    flags += ["--trainer.devices=1"]
    core, in_bfloat16 = f"{MODEL}.core_seg", []
    adapt = PromptAdapter.forward
    watched = lambda adapter, states: in_bfloat16.append(torch.is_autocast_enabled("cpu")) or adapt(adapter, states)  # noqa: E731
    monkeypatch.setattr(PromptAdapter, "forward", watched)
    see, shapes = CoreSeg.see, []
    monkeypatch.setattr(CoreSeg, "see", lambda model, *asked: shapes.append(asked[0].shapes) or see(model, *asked))
    sft = [f"{core}.reasoner.model={REASONERS[name](tmp_path / 'vlm')}", f"{core}.adapter.slots=2"]
    sft += [
        f"{core}.reasoner.image_size={IMAGE_SIZES[name]}",
        f"{core}.reasoner.lora_rank=2",
        f"{core}.reasoner.scene_dim=32",
        f"{MODEL}.segmenter_checkpoint=null",
    ]
    if name == "llama":
        sft += [f"{core}.reasoner.first_layers=1", f"{MODEL}.relevance_first=0"]
    sizes = {"architecture": seen_by, "image_size": 64, "embed_dim": 32, "weights": "random", "pixel_range": "imagenet"}
    sizes = {"weights": medsam} if seen_by == "medsam" else sizes
    if seen_by == "sam2":
        sizes["weights"] = sam2(tmp_path / "sam2")
    sft += [f"{core}.segmenter.{key}={value}" for key, value in sizes.items()]
    assert main(["fit", "-c", str(ROOT / f"configs/{preset}/sft.yaml"), *flags, *sft]) == 0

    answer_in_every_group(monkeypatch)
    more = [f"{MODEL}.inner_steps=2", f"{MODEL}.group_size=2", f"{MODEL}.lora_rank=2", f"{MODEL}.learning_rate=0.01"]
    more += ["--trainer.callbacks=[{class_path: modules.rollouts.RolloutFiles, init_args: {every: 1, follow: 0}}]"]
    more += [f"{MODEL}.rewards.detect_kind={'binary' if preset == 'smol' else 'matched'}"]
    assert main(["fit", "-c", str(ROOT / f"configs/{preset}/grpo.yaml"), *flags, *more]) == 0
    here = has_bfloat16(torch.device("cpu"))
    assert len(in_bfloat16) >= 3 and set(in_bfloat16) == {here}, "bf16 is not honoured"
    of_both_stages = [len(rows.unique(dim=0)) for rows in shapes if len(rows) == 2 * images]
    looks = 3 if preset == "smol" else 2  # where it looks twice, the reference looks too
    assert len(of_both_stages) == looks and all((number > 1) == (name == "qwen") for number in of_both_stages)
    policy = f"runs/{preset}-grpo/checkpoints/last.ckpt"
    after = load_model(policy)
    loras = [p for n, p in after.named_parameters() if "lora_B" in n]
    assert loras and all(p.abs().max() > 0 for p in loras), "stage 2 learnt nothing"

    base = ["--reasoner", str(tmp_path / "vlm"), "--segmenter", sizes["weights"]]
    for command in (
        ["release", policy, "release"],
        ["merge", policy, "merged"],
        ["release", policy, "adapter", "--adapter", "true"],
        ["merge", "adapter", "again", *base],
    ):
        assert main(command) == 0
    from_release = torch.load(policy, weights_only=True)
    from_release["hyper_parameters"]["core_seg"]["reasoner"]["model"] = "release/reasoner"
    torch.save(from_release, "from_release.ckpt")
    assert main(["release", "from_release.ckpt", "no", "--adapter", "true"]) == 2
    assert "started from the release 'release'" in capsys.readouterr().err
    image = [np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)]
    drawn = after.segment_text(after.open(image, ["Segment the cyst."]), [ANSWER])[0].probability
    for left in ("vlm", "sam2", "runs", "medsam.pth"):
        path = tmp_path / left
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for folder in ("release", "merged", "again"):
        model = load_release(folder)
        again = model.segment_text(model.open(image, ["Segment the cyst."]), [ANSWER])[0].probability
        np.testing.assert_allclose(again, drawn, atol=0.02)  # both are stored in half precision
    capsys.readouterr()
    assert main(["push", "merged", "someone/core-seg", "--dry_run", "true"]) == 0
    listed = capsys.readouterr().out
    assert ("found before it wrote" in Path("merged/README.md").read_text()) == (preset == "smol")
    for file in ("model.safetensors", "config.json", "README.md", "reasoner/config.json", "reasoner/tokenizer.json"):
        assert file in listed
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def answer_in_every_group(monkeypatch):
    """A group holds one valid answer and noise, so that random weights have something to learn from; what the model
    itself writes is sampled all the same."""
    sample = Grpo.sample

    def with_answer(module, batch):
        ids = [module.core_seg.reasoner.completion_ids(text) for text in (ANSWER, "noise")]
        monkeypatch.setattr("modules.grpo.collect", lambda steps, images, size: (list(steps), [ids] * images)[1])
        return sample(module, batch)

    monkeypatch.setattr(Grpo, "sample", with_answer)


def test_a_push_uploads_what_was_listed_and_nothing_else(start, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda api, *a, **k: calls.append((a, k)))
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", lambda api, **k: calls.append(k))
    assert main(["push", str(start), "someone/core-seg", "--dry_run", "true"]) == 0
    assert not calls and "would upload" in capsys.readouterr().out
    assert main(["push", str(start), "someone/core-seg"]) == 0
    (created, uploaded) = calls
    assert created == (("someone/core-seg",), {"private": True, "exist_ok": True})
    present = {path.relative_to(start).as_posix() for path in start.rglob("*") if path.is_file()}
    assert set(uploaded["allow_patterns"]) == present and uploaded["folder_path"] == start


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "last.ckpt").write_bytes(b"pickle"), "holds 'last.ckpt', which is no part of a release"),
        (lambda d: (d / "tokenizer" / "patient.png").write_bytes(b"x"), "holds 'tokenizer/patient.png', which is no"),
        (lambda d: (d / "README.md").unlink(), "has no card"),
        (lambda d: (d / "tokenizer" / "tokenizer.json").write_text("{}"), "tokenizer.json is damaged or was changed"),
        (lambda d: (d / "tokenizer" / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda d: shutil.rmtree(d), "does not exist"),
    ],
)
def test_what_is_not_a_sound_release_is_not_pushed(damage, message, start, capsys):
    damage(start)
    assert main(["push", str(start), "someone/core-seg", "--dry_run", "true"]) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1


def test_commands_say_what_cannot_be_done(start, tmp_path, capsys):
    assert main(["push", str(start), "not a name", "--dry_run", "true"]) == 2
    assert "'not a name' is not the name of a repository" in capsys.readouterr().err
    assert main(["merge", str(start), str(tmp_path / "out")]) == 2
    assert "has no LoRA to merge" in capsys.readouterr().err
    assert main(["merge", qwen(tmp_path / "qwen"), str(tmp_path / "out")]) == 2
    assert "is not a release of this lab" in capsys.readouterr().err
