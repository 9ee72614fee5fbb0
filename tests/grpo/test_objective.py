"""Without these a run would optimise something else than its configuration names."""

import numpy as np
import pytest
import torch

from lab.grpo.objective import group_advantages, k3_kl, policy_loss, teaches

REWARDS = torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0], [0.0, 0.0, 9.0]])


def test_advantages_are_standardised_within_the_group():
    found = group_advantages(REWARDS).numpy()
    for group, row in zip(found[[0, 2]], REWARDS.numpy()[[0, 2]]):
        np.testing.assert_allclose(group, (row - row.mean()) / row.std(ddof=1), atol=1e-3)
    assert (found[1] == 0).all()
    assert teaches(REWARDS).tolist() == [True, False, True]


def test_the_other_scales():
    centred = REWARDS - REWARDS.mean(1, keepdim=True)
    torch.testing.assert_close(group_advantages(REWARDS, "none"), centred)
    torch.testing.assert_close(group_advantages(REWARDS, "batch"), centred / REWARDS.std(), atol=1e-3, rtol=1e-3)


def test_rounding_noise_is_not_amplified():
    assert (group_advantages(torch.tensor([[0.5, 0.5 + 1e-7, 0.5]])) == 0).all()


def test_k3_estimates_the_kl_divergence():
    torch.manual_seed(0)
    policy, reference = torch.randn(50).log_softmax(0), torch.randn(50).log_softmax(0)
    drawn = torch.multinomial(policy.exp(), 200_000, replacement=True)
    estimate = k3_kl(policy[drawn], reference[drawn])
    assert (estimate >= 0).all()
    exact = torch.nn.functional.kl_div(reference, policy, log_target=True, reduction="sum")
    assert float(estimate.mean()) == pytest.approx(float(exact), rel=0.05)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_the_loss_by_plain_loops(loss_type):
    """Token by token, as the papers write it."""
    rng = np.random.default_rng(0)
    new, old, reference = (rng.uniform(-3, -0.1, (3, 4)) for _ in range(3))
    advantages, lengths, beta, low, high = np.array([1.0, -0.5, 0.2]), [4, 2, 1], 0.1, 0.2, 0.3
    sums, total = [], 0.0
    for row, length in enumerate(lengths):
        losses = []
        for t in range(length):
            ratio = np.exp(new[row, t] - old[row, t])
            surrogate = min(ratio * advantages[row], np.clip(ratio, 1 - low, 1 + high) * advantages[row])
            gap = reference[row, t] - new[row, t]
            losses.append(-surrogate + beta * (np.exp(gap) - gap - 1))
        sums.append(sum(losses))
        total += sum(losses)
    expected = {
        "grpo": np.mean([s / length for s, length in zip(sums, lengths)]),
        "dapo": total / sum(lengths),
        "dr_grpo": total / (3 * 10),
    }[loss_type]
    mask = torch.tensor([[t < length for t in range(4)] for length in lengths]).float()
    tensors = [torch.tensor(values) for values in (new, old, advantages)]
    loss, metrics = policy_loss(*tensors, mask, torch.tensor(reference), beta, (low, high), loss_type, max_tokens=10)
    assert float(loss) == pytest.approx(expected)
    assert set(metrics) == {"kl", "clip_ratio/low_mean", "clip_ratio/high_mean"}


def test_the_first_inner_step_is_the_policy_gradient():
    """With the sampling policy itself the ratio is 1: the gradient is advantage x grad log-prob, and nothing clips."""
    log_probs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    loss, metrics = policy_loss(log_probs, log_probs.detach(), torch.tensor([0.8]), torch.ones(1, 2))
    loss.backward()
    torch.testing.assert_close(log_probs.grad, torch.full((1, 2), -0.4))
    assert metrics["clip_ratio/low_mean"] == metrics["clip_ratio/high_mean"] == 0
