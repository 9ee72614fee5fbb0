"""Without these a rollout, the training pass and the plain model would be three different policies."""

import numpy as np
import pytest
import torch

from lab.grpo.policy import group_pass
from lab.model.core_seg import CoreSeg
from lab.model.decoding import Sampling, collect, token_log_probs, truncate
from tests.tiny_model import tiny_config

QUERIES = ["Segment the cyst.", "Locate and segment the larger of the dark ones in this image.", "Find it."]
G = 4


@pytest.fixture(scope="module", params=[False, True], ids=["one look", "notice"])
def model(request):
    torch.manual_seed(0)
    config = tiny_config(2)
    config.reasoner.notice = request.param
    core_seg = CoreSeg(config).eval()
    if request.param:
        torch.nn.init.normal_(core_seg.reasoner.mark, std=0.1)
    bias = torch.zeros(len(core_seg.reasoner.tokenizer))
    bias[core_seg.reasoner.eos_id] = 4.0  # likely, so that completions end at different times and leave the batch
    core_seg.reasoner.model.lm_head.register_forward_hook(lambda module, given, logits: logits + bias)
    return core_seg


@pytest.fixture(scope="module")
def inputs(model):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (64, 64, 3), dtype=np.uint8) for _ in QUERIES]
    scene = model.open(images, QUERIES)
    encoded, prompts = scene.encoded, scene.prompts
    with torch.no_grad():
        return encoded, prompts, model.see(encoded, prompts).visual


def sample(model, inputs, **sampling):
    _, prompts, visual = inputs
    sampling = Sampling(**{"temperature": 1.0, "seed": 5} | sampling)
    steps = list(model.reasoner.decode(prompts, visual, G, 12, sampling))
    return collect(steps, len(prompts), G), collect([s._replace(tokens=s.log_probs) for s in steps], len(prompts), G)


def plain_log_probs(model, inputs, image, completion, temperature=1.0):
    """A full forward over one prompt and one completion, unpadded."""
    encoded, prompts, _ = inputs
    one = type(encoded)(*(field[[image]] for field in encoded))
    logits = model(one, [prompts[image]], [completion]).logits
    every = token_log_probs(logits.float(), temperature, model.reasoner.forbidden)
    return every.gather(1, torch.tensor(completion)[:, None])[:, 0]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_log_probs_equal_those_of_a_plain_forward(model, inputs, temperature):
    tokens, log_probs = sample(model, inputs, temperature=temperature)
    assert len({len(completion) for group in tokens for completion in group}) > 2
    for image, group in enumerate(tokens):
        for completion, found in zip(group, log_probs[image]):
            expected = plain_log_probs(model, inputs, image, completion, temperature)
            torch.testing.assert_close(torch.tensor(found), expected, atol=1e-4, rtol=0)


def test_a_completion_of_a_group_is_what_greedy_decoding_alone_writes(model, inputs):
    _, prompts, visual = inputs
    together = collect(model.reasoner.decode(prompts, visual, G, 12, Sampling()), len(prompts), G)
    for image, group in enumerate(together):
        (alone,) = model.reasoner.generate([prompts[image]], visual[[image]], 12)
        assert group == [alone] * G


def test_the_same_seed_samples_the_same(model, inputs):
    assert sample(model, inputs)[0] == sample(model, inputs)[0] != sample(model, inputs, seed=4)[0]


def test_top_k_and_top_p_keep_the_likeliest():
    log_probs = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    kept = lambda **sampling: torch.isfinite(truncate(log_probs, Sampling(**sampling))).tolist()  # noqa: E731
    assert kept() == [True] * 4
    assert kept(top_k=2) == [True, True, False, False]
    assert kept(top_p=0.7) == [True, True, False, False]
    assert kept(top_p=0.01) == [True, False, False, False]
    assert kept(top_k=3, top_p=0.9) == [True, True, True, False]


def test_the_shared_pass_and_its_gradients_equal_an_unshared_one(model, inputs):
    """Log-probs, `<seg>` states and every gradient, against one plain pass for each completion."""
    encoded, prompts, _ = inputs
    tokens, _ = sample(model, inputs)
    completions = [tokens[1][0], [*tokens[1][1][:3], model.reasoner.seg_id, 5, model.reasoner.seg_id], tokens[1][2]]
    weights = torch.tensor([0.7, -1.0, 0.3])
    model.zero_grad()
    image = type(encoded)(*(field[[1]] for field in encoded))
    visual = model.see(image, [prompts[1]]).visual
    shared = group_pass(model.reasoner, model.reasoner.prompt([prompts[1]], visual), completions, 1.0)
    ((shared.log_probs.sum(1) * weights).sum() + shared.seg_states.square().sum()).backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.zero_grad()
    rows = [plain_log_probs(model, inputs, 1, completion) for completion in completions]
    state = model.reasoner(
        torch.tensor([prompts[1] + completions[1][:4]]),
        torch.ones(1, len(prompts[1]) + 4, dtype=torch.long),
        model.see(image, [prompts[1]]).visual,
        torch.tensor([[0] * len(prompts[1]) + [1] * 4]),
    )[0, -1]
    (sum(w * row.sum() for w, row in zip(weights, rows)) + state.square().sum()).backward()
    for found, expected, mask in zip(shared.log_probs, rows, shared.mask):
        torch.testing.assert_close(found[mask > 0], expected, atol=1e-4, rtol=0)
        assert (found[mask == 0] == 0).all()
    assert shared.seg_rows.tolist() == [1]
    torch.testing.assert_close(shared.seg_states[0], state, atol=1e-4, rtol=1e-4)
    theirs = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    unused = {name for name in theirs if name not in ours}
    assert all((theirs[name] == 0).all() for name in unused), unused
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], atol=1e-3, rtol=1e-3, msg=name)


def test_queries_read_the_completion_and_the_shared_pass_gives_them_the_same_states(inputs):
    """The LENS baseline: what the mask decoder is given must not depend on which pass it came from."""
    encoded, prompts, _ = inputs
    torch.manual_seed(0)
    config = tiny_config()
    config.adapter.kind, config.adapter.queries = "queries", 5
    model = CoreSeg(config).eval()
    reasoner, image = model.reasoner, type(encoded)(*(field[[1]] for field in encoded))
    completions = [[7, 9, reasoner.seg_id, reasoner.eos_id], [7, reasoner.seg_id, 8, 8, 8, reasoner.eos_id], [7, 7]]
    prompt = reasoner.prompt([prompts[1]], model.see(image, [prompts[1]]).visual)
    shared = group_pass(reasoner, prompt, completions, 1.0, model.queries)
    assert shared.seg_rows.tolist() == [0, 1] and shared.seg_states.shape == (2, 5, 64)
    assert shared.mask.sum(1).tolist() == [4, 6, 2]
    for row, completion in enumerate(completions[:2]):
        alone = model(image, [prompts[1]], [completion])
        torch.testing.assert_close(model.adapter(shared.seg_states)[row], alone.prompt_tokens[0], atol=1e-4, rtol=1e-4)
        every = token_log_probs(alone.logits, 1.0, reasoner.forbidden)
        said = every.gather(1, torch.tensor(completion)[:, None])[:, 0]
        torch.testing.assert_close(shared.log_probs[row][: len(completion)], said, atol=1e-4, rtol=0)
    other = model(image, [prompts[1]], [[9, 9, reasoner.seg_id, reasoner.eos_id]])
    assert (other.prompt_tokens[0] - model.adapter(shared.seg_states)[0]).abs().max() > 1e-3
