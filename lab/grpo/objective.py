"""Group-relative policy optimisation (GRPO, Shao et al. 2024) on padded completions, in trl's words and definitions."""

from typing import Literal

import torch
from torch import Tensor

Scale = Literal["none", "group", "batch"]
LossType = Literal["grpo", "dr_grpo", "dapo"]
SPREAD = 1e-4
"""Standard deviation of a group's rewards below which they count as equal: there is nothing to learn from."""


def group_advantages(rewards: Tensor, scale: Scale = "group") -> Tensor:
    """Rewards (B, G) less their group's mean, over a standard deviation.

    Args:
        rewards: (B, G), G completions for each of B prompts.
        scale: Of the `group` (GRPO), of the whole `batch`, or `none` (Dr. GRPO, Liu et al. 2025).

    Returns:
        (B, G); zeros in groups whose rewards are all equal.
    """
    advantages = rewards - rewards.mean(1, keepdim=True)
    if scale != "none":
        spread = rewards.std() if scale == "batch" else rewards.std(1, keepdim=True)
        advantages = advantages / (spread + SPREAD)
    return advantages * teaches(rewards)[:, None]


def teaches(rewards: Tensor) -> Tensor:
    """(B,) bool: whether the rewards (B, G) of a group differ at all."""
    return rewards.std(1) > SPREAD


def k3_kl(log_probs: Tensor, reference: Tensor) -> Tensor:
    """Per-token estimate of KL(policy, reference), at least 0: k3 of Schulman 2020, `exp(r) - r - 1`."""
    log_ratio = reference - log_probs
    return log_ratio.exp() - log_ratio - 1


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    reference: Tensor | None = None,
    beta: float = 0.0,
    clip: tuple[float, float] = (0.2, 0.2),
    loss_type: LossType = "grpo",
    max_tokens: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate with a KL penalty.

    Args:
        log_probs: (N, T) of the policy that is trained.
        old_log_probs: (N, T) of the policy that sampled.
        advantages: (N,).
        mask: (N, T), 1 for tokens of the completion.
        reference: (N, T) of the reference; needed when `beta` is not 0.
        beta: Weight of the KL penalty.
        clip: How far the ratio may fall below and rise above 1.
        loss_type: `grpo`: mean over a completion, then over completions; `dapo`: mean over all tokens (Yu et al. 2025);
            `dr_grpo`: sum over tokens / (completions x `max_tokens`).
        max_tokens: Longest completion allowed, for `dr_grpo`; default T.

    Returns:
        The loss, and `kl`, `clip_ratio/low_mean`, `clip_ratio/high_mean` as means over all tokens.
    """
    ratio = (log_probs - old_log_probs).exp()
    weights = advantages[:, None]
    clipped = ratio.clamp(1 - clip[0], 1 + clip[1])
    losses = -torch.minimum(ratio * weights, clipped * weights)
    metrics = {
        "clip_ratio/low_mean": ((ratio < 1 - clip[0]) & (weights < 0)).float(),
        "clip_ratio/high_mean": ((ratio > 1 + clip[1]) & (weights > 0)).float(),
    }
    if reference is not None:
        metrics["kl"] = k3_kl(log_probs, reference)
        losses = losses + beta * metrics["kl"]
    mask = mask.to(losses)
    if loss_type == "grpo":
        loss = ((losses * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()
    elif loss_type == "dapo":
        loss = (losses * mask).sum() / mask.sum().clamp(min=1)
    else:
        loss = (losses * mask).sum() / (len(mask) * (max_tokens or mask.shape[1]))
    return loss, {name: (value * mask).sum().detach() / mask.sum() for name, value in metrics.items()}
