"""Without these a GRPO run could not be believed: what it logs, what it keeps, and that stopping it costs nothing."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from apps.cli import main
from lab.data.images import Frame
from lab.data.manifest import read_manifest
from lab.data.reason import write_reason
from lab.errors import LabError
from lab.grpo.objective import group_advantages, policy_loss
from lab.grpo.rewards import binary_box_rewards
from lab.model.adapter import AdapterConfig
from lab.model.answer import Answer, parse, render
from lab.model.core_seg import CoreSeg
from lab.model.reasoner import ReasonerConfig
from lab.model.release import load_model, load_release, save_release
from modules.groups import Group, Rewards, as_mask
from modules.grpo import Grpo
from modules.rollouts import read_mask
from tests.modules.kill import killed_at
from tests.tiny_checkpoints import llama, qwen
from tests.tiny_model import tiny_config

ROOT = Path(__file__).parents[2]
STEPS, GROUP = 6, 8


@pytest.fixture(scope="module")
def lesions(tmp_path_factory):
    """Eight synthetic images that are asked about in two ways or more; the last two are for validation."""
    return write_reason(tmp_path_factory.mktemp("lesions"), 8, seed=9, fractions=(0.75, 0.25, 0.0), size=64)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A release of a model that has learnt nothing, but that writes tags often enough to be told apart by format."""
    torch.manual_seed(0)
    config, folder = tiny_config(), tmp_path_factory.mktemp("start")
    config.reasoner.notice = True
    model = CoreSeg(config)
    torch.nn.init.normal_(model.reasoner.mark, std=0.02)
    scene = model.open([np.zeros((64, 64, 3), np.uint8)], ["Segment the cyst."])
    encoded, prompts = scene.encoded, scene.prompts
    with torch.no_grad():
        opened = model.reasoner.prompt(prompts, model.see(encoded, prompts).visual)
        state = model.reasoner.model.model.language_model(inputs_embeds=opened.embeds).last_hidden_state[0, -1]
        tags = model.reasoner.tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
        model.reasoner.model.get_input_embeddings().weight[tags] = 6 * state / state.square().sum()
    save_release(model, folder, "t", "nothing", half=False)
    return folder


def flags(lesions, start, name, *more, steps=STEPS):
    part = f'[{{"manifest": "{lesions}", "per_batch": 2, "queries_per_image": 2}}]'
    model, data = "--model.init_args", "--data.init_args"
    return [
        *("fit", "-c", str(ROOT / "configs" / "tiny" / "grpo.yaml"), f"--name={name}", f"{model}.start={start}"),
        *(f"{model}.group_size={GROUP}", f"{model}.max_new_tokens=8", f"{model}.total_steps={STEPS}"),
        *(f"{model}.cache=cache", f"{model}.learning_rate=0.01", f"{model}.warmup_steps=1"),
        *(f"{data}.train={part}", f"{data}.val={lesions}", f"{data}.num_workers=0", f"{data}.steps_per_epoch=2"),
        *(f"--trainer.max_steps={steps}", "--trainer.check_val_every_n_epoch=3", "--trainer.accelerator=cpu"),
        "--trainer.callbacks=[{class_path: modules.rollouts.RolloutFiles, init_args: {every: 1, follow: 2}}]",
        *more,
    ]


def metrics(run):
    lines = [json.loads(line) for line in Path(f"runs/{run}/metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("time", "train/encoded")} for line in lines if "reward" in line]


def same_runs(one, other):
    assert [line["step"] for line in metrics(one)] == [line["step"] for line in metrics(other)]
    for left, right in zip(metrics(one), metrics(other)):
        assert left == pytest.approx(right, abs=1e-5)
    names = [sorted(path.name for path in Path(f"runs/{run}/rollouts").iterdir()) for run in (one, other)]
    assert names[0] == names[1]
    for name in names[0]:
        left, right = (pd.read_parquet(f"runs/{run}/rollouts/{name}") for run in (one, other))
        assert left.completion.tolist() == right.completion.tolist() and left.dice.tolist() == right.dice.tolist()


@pytest.mark.parametrize("inner_steps", [1, 2])
def test_a_resumed_run_equals_an_unbroken_one(lesions, start, inner_steps, tmp_path, monkeypatch):
    """Curves, sampling and rollouts go on without a gap; the checkpoint is a model like any other."""
    monkeypatch.chdir(tmp_path)
    more = [f"--model.init_args.inner_steps={inner_steps}"]
    assert main(flags(lesions, start, "whole", *more)) == 0
    assert main(flags(lesions, start, "broken", *more, steps=2)) == 0
    assert main(flags(lesions, start, "broken", *more, "--ckpt_path=last")) == 0
    same_runs("whole", "broken")
    assert [line["step"] for line in metrics("whole")] == list(range(0, STEPS, inner_steps))
    assert metrics("whole")[-1]["num_tokens"] > metrics("whole")[0]["num_tokens"] > 0

    rows = pd.read_parquet("runs/whole/rollouts/step_000000.parquet")
    assert len(rows) == 2 * GROUP and set(rows.slot) == set(range(GROUP))
    assert any(line["frac_reward_zero_std"] < 1 for line in metrics("whole")), "nothing was learnt from"
    parts = rows.reward_format + rows.reward_detect + rows.reward_segment
    assert rows.reward.tolist() == pytest.approx(parts.tolist())
    assert read_mask(rows.iloc[0]).shape == tuple(rows.iloc[0].mask_size)
    followed = pd.read_parquet(sorted(Path("runs/whole/rollouts").glob("followed_*"))[-1])
    records = {record.id: record for record in read_manifest(lesions)}
    assert len(followed) == 2
    for row in followed.to_dict("records"):
        assert read_mask(row).shape == (records[row["id"]].height, records[row["id"]].width)

    model = load_model("runs/whole/checkpoints/last.ckpt")
    save_release(model, tmp_path / "release", "t", "nothing", half=False)
    again = load_release(tmp_path / "release")
    assert all(torch.equal(one, other) for one, other in zip(model.state_dict().values(), again.state_dict().values()))


def test_a_killed_run_loses_and_repeats_no_step(lesions, start, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(flags(lesions, start, "whole")) == 0
    killed_at(3, flags(lesions, start, "cut"), "cut")
    assert main(flags(lesions, start, "cut", "--ckpt_path=last")) == 0
    same_runs("whole", "cut")


@pytest.fixture
def grpo(start):
    module = Grpo(str(start), rewards=Rewards(), group_size=3, max_new_tokens=6)
    module.log = module.log_dict = lambda *args, **kwargs: None
    return module


@pytest.fixture
def batch(grpo, lesions):
    records = [record for record in read_manifest(lesions) if record.split == "train"]
    return grpo.training_data(records)[[(0, 0), (1, 1)]]


def texts_to_group(grpo, texts):
    return [grpo.core_seg.reasoner.completion_ids(text) for text in texts]


def test_rewards_are_those_of_the_answers(grpo, batch, monkeypatch):
    """The true answer earns full format and detect; noise nothing; an empty answer to a lesion no segment reward."""
    true = batch["answer"][0]
    empty = "<think> a </think><answer>No such lesion is found. The mask is empty.</answer>"
    groups = [texts_to_group(grpo, [true, "noise", empty])] * 2
    full = (as_mask(batch["target"][0]) * 2.0) - 1
    monkeypatch.setattr("modules.grpo.collect", lambda *sampled: groups)
    group = grpo.sample(batch)[0]
    assert group.draws == [True, False, False] and group.seg_share == 0.5
    group.score({0: full}, grpo.rewards)
    assert group.rewards["format"].tolist() == [1, 0, 1]
    assert group.rewards["detect"][0] > 0.8 and group.rewards["detect"][1:].tolist() == [0, 0]
    assert group.rewards["segment"].tolist() == pytest.approx([3, -1, -1])
    assert group.rewards["faithful"][0] == 1
    assert group.dice.tolist() == [1, 0, 0]
    assert group.teaches and float(group_advantages(group.total[None])[0].argmax()) == 0


def test_a_group_of_equal_rewards_costs_no_backward(grpo, batch, monkeypatch):
    calls = []
    monkeypatch.setattr(grpo, "manual_backward", lambda loss: calls.append(loss))
    monkeypatch.setattr(grpo, "update", lambda: None)
    score = Group.score
    monkeypatch.setattr(Group, "score", lambda *scored: equal(score, *scored))
    grpo.training_step(batch, 0)
    assert not calls


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_by_group_the_gradients_are_those_of_the_whole_batch(grpo, batch, loss_type, scale, monkeypatch):
    """One loss over all completions at once, as the papers write it, against the sum of the groups' shares."""
    grpo.hparams.loss_type, grpo.hparams.scale = loss_type, scale
    true, filler = batch["answer"], ["noise", "<think> a </think><answer>noise", "<think> a longer noise </think>"]
    groups = [texts_to_group(grpo, [true[0], *filler[:2]]), texts_to_group(grpo, [true[0], true[1], filler[2]])]
    monkeypatch.setattr("modules.grpo.collect", lambda *sampled: groups)
    monkeypatch.setattr(grpo, "manual_backward", lambda loss: loss.backward())
    monkeypatch.setattr(grpo, "update", lambda: None)
    for name, parameter in grpo.core_seg.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)  # else the policy is the reference and the KL zero
    grpo.training_step(batch, 0)
    found = {name: p.grad.clone() for name, p in grpo.named_parameters() if p.grad is not None}

    grpo.zero_grad()
    looked = [grpo.look(group) for group in grpo.groups]
    flat = lambda rows: pad_sequence([row for group in rows for row in group], batch_first=True)  # noqa: E731
    log_probs, mask = flat([read.log_probs for read, _ in looked]), flat([read.mask for read, _ in looked])
    advantages = group_advantages(torch.stack([group.total for group in grpo.groups]), scale).flatten()
    reference = flat([group.reference for group in grpo.groups])
    loss, _ = policy_loss(
        log_probs,
        log_probs.detach(),
        advantages,
        mask,
        reference,
        0.04,
        (0.2, 0.2),
        loss_type,
        grpo.hparams.max_new_tokens,
    )
    drawn = [
        (logits, group.item["target"])
        for group, (_, masks) in zip(grpo.groups, looked)
        for slot, logits in masks.items()
        if group.draws[slot]
    ]
    assert len(drawn) == 3 and all(group.teaches for group in grpo.groups)
    logits, targets = (torch.stack(rows)[:, None] for rows in zip(*drawn))
    (loss + grpo.dice_ce(logits, targets)).backward()
    expected = {name: p.grad for name, p in grpo.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys() and any("lora" in name for name in found)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-3, msg=name)


def equal(score, group, mask_logits, weights):
    score(group, mask_logits, weights)
    group.teaches = False


def test_the_reference_is_the_model_of_the_start(grpo, start):
    """And LoRA is trained again afterwards."""
    torch.manual_seed(1)
    for name, parameter in grpo.core_seg.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    ids = torch.tensor([[5, 6, 7]])
    embeds = grpo.core_seg.reasoner.model.get_input_embeddings()(ids)
    run = lambda model: model.reasoner.model.model.language_model(inputs_embeds=embeds).last_hidden_state  # noqa: E731
    original = run(load_release(start))
    with grpo.core_seg.reasoner.reference():
        assert torch.equal(run(grpo.core_seg), original)
    assert not torch.allclose(run(grpo.core_seg), original)
    trained = {name for name, p in grpo.core_seg.named_parameters() if p.requires_grad}
    assert any("lora_A" in name for name in trained)
    assert all("lora" in name or name.startswith(("adapter", "segmenter.mask_decoder")) for name in trained)


def test_the_reference_notices_what_the_start_would_notice(grpo, batch, start):
    """Else the penalty lets the first look, which no other loss holds, drift with LoRA."""
    for name, parameter in grpo.core_seg.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model, encoded = load_release(start), grpo.encode(batch)
    prompts = [model.reasoner.prompt_ids(query, frame) for query, frame in zip(batch["query"], batch["frame"])]
    visual = model.see(encoded, prompts).visual
    for row, group in enumerate(grpo.sample(batch)):
        expected = model.reasoner.prompt([prompts[row]], visual[[row]], encoded.shapes[[row]]).embeds
        torch.testing.assert_close(group.reference_prompt.embeds, expected)
        assert not torch.allclose(group.prompt.embeds, expected)


def test_stage_2_draws_the_masks_that_a_language_model_would_draw(lesions, tmp_path, monkeypatch):
    """Its passes are its own, and what the first look tells the adapter could be left out of them."""
    config, folder = tiny_config(), tmp_path / "start"
    size, channels = config.reasoner.image_size, config.segmenter.embed_dim
    config.reasoner = ReasonerConfig(llama(tmp_path / "llama"), image_size=size, scene_dim=channels, notice=True)
    model = CoreSeg(config)
    torch.nn.init.normal_(model.reasoner.heed)
    save_release(model, folder, "t", "nothing", half=False)
    grpo = Grpo(str(folder), group_size=2, bf16=False)
    grpo.log = grpo.log_dict = lambda *args, **kwargs: None
    records = [record for record in read_manifest(lesions) if record.split == "train"]
    batch = grpo.training_data(records)[[(0, 0), (1, 1)]]
    model = load_release(folder)
    said = [model.reasoner.completion_ids(answer) for answer in batch["answer"]]
    monkeypatch.setattr("modules.grpo.collect", lambda *sampled: [[one] for one in said])
    groups, encoded = grpo.sample(batch), grpo.encode(batch)
    prompts = [model.reasoner.prompt_ids(query, frame) for query, frame in zip(batch["query"], batch["frame"])]
    output = model(encoded, prompts, said)
    drawn = [grpo.look(groups[row])[1][0] for row in output.mask_rows.tolist()]
    assert len(drawn) > 0 and output.mask_logits.std() > 0
    torch.testing.assert_close(torch.stack(drawn), output.mask_logits, atol=1e-3, rtol=1e-3)
    bare = [grpo.look(replace(groups[row], gist=None))[1][0] for row in output.mask_rows.tolist()]
    assert not torch.allclose(torch.stack(bare), output.mask_logits, atol=1e-2)


def test_a_start_that_has_lora_keeps_what_it_learnt(start, tmp_path):
    """As after stage 1 with LoRA, or after another stage 2."""
    first = Grpo(str(start), group_size=2).core_seg
    for name, parameter in first.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    save_release(first, tmp_path, "t", "nothing", half=False)
    again = Grpo(str(tmp_path), group_size=2, lora_rank=4).core_seg
    embeds = first.reasoner.model.get_input_embeddings()(torch.tensor([[5, 6, 7]]))
    states = [
        model.reasoner.model.model.language_model(inputs_embeds=embeds).last_hidden_state for model in (first, again)
    ]
    torch.testing.assert_close(*states, atol=1e-4, rtol=1e-4)
    assert {p.shape[0] for name, p in again.named_parameters() if "lora_A" in name} == {4}


def test_lora_beside_bfloat16_is_trained_further_and_its_start_is_the_reference(tmp_path):
    """Made part of such weights, half of a small change would be rounded away, in the policy and in the reference."""
    torch.manual_seed(0)
    tiny = tiny_config()
    reasoner = ReasonerConfig(qwen(tmp_path / "qwen"), image_size=56, scene_dim=32, dtype="bfloat16", lora_rank=4)
    stage_1 = CoreSeg(replace(tiny, reasoner=reasoner)).eval()
    learnt = {n: p for n, p in stage_1.reasoner.model.named_parameters() if p.requires_grad}
    for parameter in learnt.values():
        torch.nn.init.normal_(parameter, std=0.02)
    save_release(stage_1, tmp_path / "release", "t", "nothing", half=False)
    with pytest.raises(LabError, match="set lora_rank to 4, not 16"):
        Grpo(str(tmp_path / "release"), seg_weight=0.0)
    policy = Grpo(str(tmp_path / "release"), lora_rank=4).core_seg.eval()
    embeds = torch.randn(1, 5, stage_1.reasoner.hidden_size, dtype=torch.bfloat16)

    def states(model):
        with torch.no_grad():
            return model.reasoner.language_model(inputs_embeds=embeds).last_hidden_state

    assert torch.equal(states(policy), states(stage_1))
    trained = {n: p for n, p in policy.reasoner.named_parameters() if p.requires_grad}
    assert (
        trained.keys() == {f"model.{n}" for n in learnt} and policy.state_dict().keys() == stage_1.state_dict().keys()
    )
    for parameter in trained.values():
        parameter.data += 0.02
    moved = states(policy)
    assert not torch.equal(moved, states(stage_1))
    with policy.reasoner.reference():
        assert torch.equal(states(policy), states(stage_1))
        assert all(torch.equal(trained[f"model.{n}"], p) for n, p in learnt.items())
    assert torch.equal(states(policy), moved)


@pytest.mark.parametrize("setting", [{"group_size": 1}, {"temperature": 0.0}, {"top_p": 0.0}])
def test_groups_that_cannot_differ_are_refused(start, setting):
    with pytest.raises(LabError, match="a group is 2 or more completions that can differ"):
        Grpo(str(start), **setting)


def test_masks_that_are_rewarded_are_those_that_the_model_draws(tmp_path, monkeypatch):
    """Of a model that draws from boxes they are not the adapter's, and DiceCE cannot reach what drew them."""
    torch.manual_seed(0)
    model = CoreSeg(replace(tiny_config(), prompt="boxes", threshold=0.5)).eval()
    save_release(model, tmp_path / "boxes", "t", "nothing", half=False)
    with pytest.raises(LabError, match="the boxes in its answers, .* set seg_weight to 0"):
        Grpo(str(tmp_path / "boxes"))
    save_release(
        CoreSeg(replace(tiny_config(), adapter=AdapterConfig(state="mean"))), tmp_path / "mean", "t", "nothing"
    )
    with pytest.raises(LabError, match="the mean over its answers"):
        Grpo(str(tmp_path / "mean"), rewards=Rewards(segment=0.0), seg_weight=0.0)

    grpo = Grpo(str(tmp_path / "boxes"), seg_weight=0.0)
    image = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    boxes = [np.array([[0.1, 0.2, 0.5, 0.9]]), np.array([[0.6, 0.6, 0.9, 0.9], [0.1, 0.1, 0.3, 0.3]]), np.zeros((0, 4))]
    texts = [render("It is dark.", "cyst", each, 100) for each in boxes]
    scene = model.open([image] * 3, ["Segment the cyst."] * 3)
    said = [model.reasoner.completion_ids(text) for text in texts]
    frame, answers = Frame(48, 64, 64), [parse(text, 100) for text in texts]
    seen = model.reasoner.prompt(scene.prompts[:1], scene.seen.visual[:1], scene.encoded.shapes[:1])
    of_image = ({"frame": frame}, scene.encoded.embeddings[:1], None, seen, seen)
    group = Group(*of_image, said, texts, answers, [True, True, False])
    drawn, predictions = grpo.look(group)[1], model.segment_text(scene, texts)
    assert drawn.keys() == {0, 1} and not drawn[0].requires_grad
    for slot, logits in drawn.items():
        own = torch.from_numpy(predictions[slot].probability)
        torch.testing.assert_close(frame.logits_to_original(logits[None])[0].sigmoid(), own, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(drawn[0], drawn[1], atol=1e-2)

    texts[2] = texts[0].replace(texts[0][texts[0].index("[[") : texts[0].index("]]")], "[[5,5,5,5")  # draws nothing
    said[2] = model.reasoner.completion_ids(texts[2])
    assert parse(texts[2], 100).valid and not model.segment_text(scene, texts)[2].has_mask
    monkeypatch.setattr("modules.grpo.collect", lambda *_: [said])
    monkeypatch.setattr(grpo, "log", lambda *_, **__: None)
    pixels = torch.from_numpy(frame.image(image))[None]
    batch = {"query": ["Segment the cyst."], "frame": [frame], "pixels": pixels, "features": [None], "draw": [0]}
    assert grpo.sample(batch)[0].has_mask.tolist() == [True, True, False]


def test_followed_images_are_rewarded_as_samples_are(grpo):
    """One column would hold two quantities."""
    answer = Answer(True, "", "", np.array([[0.1, 0.1, 0.5, 0.5]], np.float32))
    mask = torch.ones(1, 4, 4, dtype=torch.bool)
    given = ([""], [answer], answer.boxes_norm, None, mask, mask, torch.tensor([True]))
    kinds = [Rewards(detect_kind=kind).of(*given)["detect"].item() for kind in ("matched", "binary")]
    assert kinds == [1.0, binary_box_rewards([answer], [answer.boxes_norm]).item()]
