"""Without these the paper's language model would lose its 3-d positions (M-RoPE), or sample from another policy."""

import json

import numpy as np
import pytest
import torch

from lab.grpo.policy import group_pass
from lab.model.core_seg import CoreSeg, CoreSegConfig
from lab.model.decoding import Sampling, collect, token_log_probs
from lab.model.qwen import QwenReasoner
from lab.model.reasoner import ReasonerConfig
from lab.model.segmenter import SegmenterConfig
from tests.tiny_checkpoints import qwen, written

QUERIES = ["Segment the cyst.", "Locate and segment the larger of the dark ones in this image."]
IMAGE_SIZE = 112


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Random weights in the real format: config, safetensors, tokenizer, image processor."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("qwen")
    qwen(folder)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "qwen2_5_vl"
    return folder


@pytest.fixture(scope="module")
def model(checkpoint):
    segmenter = SegmenterConfig(image_size=64, embed_dim=32, weights="random")
    reasoner = ReasonerConfig(str(checkpoint), image_size=IMAGE_SIZE)
    return CoreSeg(CoreSegConfig(segmenter, reasoner)).eval()


@pytest.fixture(scope="module")
def inputs(model):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (64, 64, 3), dtype=np.uint8) for _ in QUERIES]
    scene = model.open(images, QUERIES)
    encoded, prompts = scene.encoded, scene.prompts
    with torch.no_grad():
        return encoded, prompts, model.see(encoded, prompts).visual


def test_greedy_decoding_equals_hugging_face_generate(model, inputs):
    """HF's own: from pixels, with its own positions, one prompt at a time."""
    encoded, prompts, visual = inputs
    assert isinstance(model.reasoner, QwenReasoner)
    reasoner = model.reasoner
    ours = reasoner.generate(prompts, visual, 16)
    rng = np.random.default_rng(0)
    for row, prompt in enumerate(prompts):
        pixels = torch.from_numpy(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).permute(2, 0, 1)
        larger = torch.nn.functional.interpolate(pixels[None].float(), IMAGE_SIZE, mode="area").round().to(torch.uint8)
        seen = reasoner.image_processor(list(larger), do_resize=False, return_tensors="pt")
        ids = torch.tensor([prompt])
        theirs = written(reasoner, prompt, 16, mm_token_type_ids=(ids == reasoner.image_id).int(), **seen)
        assert ours[row] == theirs[: len(ours[row])]
    assert len({tuple(row) for row in ours}) > 1 and len(set(ours[0])) > 2


def test_positions_have_three_dimensions(model, inputs):
    _, prompts, visual = inputs
    time, row, column = model.reasoner.prompt(prompts[:1], visual[:1]).positions[:, 0]
    shows = torch.tensor(prompts[0]) == model.reasoner.image_id
    side = IMAGE_SIZE // 28
    assert (time[shows] == time[shows][0]).all()
    assert (row[shows] - row[shows][0]).tolist() == [r for r in range(side) for _ in range(side)]
    assert (column[shows] - column[shows][0]).tolist() == [c for _ in range(side) for c in range(side)]


def test_sampled_log_probs_equal_those_of_a_plain_forward_and_of_the_training_pass(model, inputs):
    encoded, prompts, visual = inputs
    reasoner = model.reasoner
    steps = list(reasoner.decode(prompts, visual, 3, 10, Sampling(1.0, seed=1)))
    tokens = collect(steps, len(prompts), 3)
    log_probs = collect([step._replace(tokens=step.log_probs) for step in steps], len(prompts), 3)
    for image, prompt in enumerate(prompts):
        one = type(encoded)(*(field[[image]] for field in encoded))
        trained = group_pass(reasoner, reasoner.prompt([prompt], visual[[image]]), tokens[image], 1.0)
        for slot, completion in enumerate(tokens[image]):
            logits = model(one, [prompt], [completion]).logits.float()
            plain = token_log_probs(logits, 1.0, reasoner.forbidden).gather(1, torch.tensor(completion)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(log_probs[image][slot]), plain, atol=1e-4, rtol=0)
            torch.testing.assert_close(trained.log_probs[slot, : len(completion)], plain, atol=1e-4, rtol=0)
