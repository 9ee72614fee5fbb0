"""Stage 2: RL-based reasoning exploration. GRPO on sampled completions, with DiceCE on their masks (CORE-Seg, 3.4)."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from monai.losses import DiceCELoss
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lab.errors import LabError
from lab.grpo.objective import LossType, Scale, group_advantages, policy_loss, teaches
from lab.grpo.policy import GroupPass, group_pass
from lab.grpo.rewards import (
    MATCH_IOU,
    MISS,
    SegmentReward,
    detect_rewards,
    dice_scores,
    faithful_rewards,
    format_rewards,
    segment_rewards,
)
from lab.model.answer import Answer, parse
from lab.model.decoding import Sampling, collect
from lab.model.release import load_model
from modules.reasoning import ReasoningModule


@dataclass
class Rewards:
    """What counts, and how much; the reward of a completion is the weighted sum."""

    format: float = 1.0
    """Weight of the share of the answer schema that is kept, 0..1."""
    detect: float = 1.0
    """Weight of mIoU(matched) x F1 of the boxes, 0..1."""
    segment: float = 1.0
    """Weight of the segment reward."""
    faithful: float = 0.0
    """Weight of the share of claims that the measured facts confirm, 0..1."""
    segment_kind: SegmentReward = "paper"
    """`paper`, `residual` or `dice`; see `lab.grpo.rewards.segment_rewards`."""
    giou_of: Literal["boxes", "areas"] = "boxes"
    """`paper`: GIoU of the boxes around the masks, or of the masks' pixels."""
    match_iou: float = MATCH_IOU
    """IoU above which a matched pair of boxes counts."""


@dataclass
class Rollout:
    """The completions of a batch and what they earned; B images, G completions each."""

    step: int
    """Optimiser steps before it."""
    batch: dict[str, list]
    completions: list[list[list[int]]]
    texts: list[str]
    """B * G."""
    answers: list[Answer]
    """B * G."""
    masks: Tensor
    """(B * G, h, w) bool over the padded square."""
    dice: Tensor
    """(B, G), 0 for an answer that is not valid."""
    rewards: dict[str, Tensor]
    """Each reward by itself, (B, G)."""
    total: Tensor
    """(B, G), their weighted sum."""
    advantages: Tensor
    """(B, G)."""


class Grpo(ReasoningModule):
    """Sample a group of completions an image, score each, and make the better ones likelier.

    Args:
        start: Release folder, or checkpoint of stage 1, that the policy starts from and is held near to.
        lora_rank: Rank of the LoRA that is trained on the language model; switched off, it is the reference.
        cache: Folder for the frozen encoders' outputs; None runs the encoders every time.
        views: Fixed ways in which every image is seen; 1 as it is, 2 also mirrored, more also augmented.
        rewards: Weights and kinds; see `Rewards`.
        group_size: Completions an image (G).
        temperature: Of the sampling.
        top_p: Likeliest tokens that together reach this probability are sampled from; 1 is all.
        top_k: This many of the likeliest tokens are sampled from; 0 is all.
        max_new_tokens: Where a completion is cut.
        scale: Standard deviation that advantages are divided by: of the `group`, the `batch`, or `none`.
        loss_type: `grpo`, `dr_grpo` or `dapo`; see `lab.grpo.objective.policy_loss`.
        beta: Weight of the KL penalty (k3) to the model of the start.
        clip_low: How far the ratio may fall below 1.
        clip_high: How far it may rise above 1.
        inner_steps: Optimiser steps on each batch of completions.
        seg_weight: Of DiceCE on the masks of the completions.
        learning_rate: Peak rate of AdamW.
        weight_decay: AdamW's decay.
        warmup_steps: Optimiser steps of linear warm-up.
        total_steps: Where the cosine reaches zero; keep it equal to the trainer's `max_steps`.
        clip_norm: Gradients are scaled down to this norm.
        seed: Of the sampling, with the step.
    """

    stage = "grpo"

    def __init__(
        self,
        start: str,
        lora_rank: int = 16,
        cache: str | None = None,
        views: int = 2,
        rewards: Rewards | None = None,
        group_size: int = 8,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        max_new_tokens: int = 200,
        scale: Scale = "group",
        loss_type: LossType = "grpo",
        beta: float = 0.04,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        inner_steps: int = 1,
        seg_weight: float = 1.0,
        learning_rate: float = 1e-4,
        weight_decay: float = 0.0,
        warmup_steps: int = 10,
        total_steps: int = 300,
        clip_norm: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        rewards = rewards or Rewards()
        arguments = {name: value for name, value in locals().items() if name not in ("self", "rewards", "__class__")}
        if group_size < 2 or temperature <= 0 or not 0 < top_p <= 1:
            raise LabError(
                f"group_size {group_size}, temperature {temperature}, top_p {top_p}: a group is 2 or more completions "
                "that can differ; set group_size >= 2, temperature > 0 and 0 < top_p <= 1"
            )
        model = load_model(Path(start))
        model.reasoner.requires_grad_(False)
        model.reasoner.add_lora(lora_rank)
        self.save_hyperparameters({"core_seg": asdict(model.config), "rewards": asdict(rewards), **arguments})
        self.hold(model, cache)
        self.rewards = rewards
        self.register_buffer("num_tokens", torch.zeros((), dtype=torch.long))
        self.dice_ce = DiceCELoss(sigmoid=True)
        self.automatic_optimization = False  # one batch of completions may serve several optimiser steps

    def training_step(self, batch: dict[str, list], batch_idx: int) -> None:
        reasoner, h = self.core_seg.reasoner, self.hparams
        encoded = self.encode(batch)
        visual = self.core_seg.see(encoded)
        prompts = [reasoner.prompt_ids(query) for query in batch["query"]]
        sampling = Sampling(h.temperature, h.top_p, h.top_k, seed=h.seed * 1_000_003 + self.global_step)
        written = reasoner.decode(prompts, visual, h.group_size, h.max_new_tokens, sampling)
        completions, _ = collect(written, len(prompts), h.group_size)
        opened = [reasoner.prompt([ids], row[None]) for ids, row in zip(prompts, visual)]

        def run() -> list[GroupPass]:
            return [group_pass(reasoner, *group, h.temperature) for group in zip(opened, completions)]

        with torch.no_grad(), reasoner.reference():
            reference = flat(run(), "log_probs") if h.beta else None
        for inner_step in range(h.inner_steps):
            passes = run()
            mask_logits = [self.masks(embedding, group) for embedding, group in zip(encoded.embeddings, passes)]
            if inner_step == 0:
                old_log_probs = flat(passes, "log_probs").detach()
                self.rollout = self.score(batch, completions, mask_logits)
                taught = teaches(self.rollout.total).tolist()
                self.log_rollout(self.rollout, passes, taught)
            loss, metrics = policy_loss(
                flat([group if teaching else group.detached() for group, teaching in zip(passes, taught)], "log_probs"),
                old_log_probs,
                self.rollout.advantages.flatten(),
                flat(passes, "mask"),
                reference,
                h.beta,
                (h.clip_low, h.clip_high),
                h.loss_type,
                h.max_new_tokens,
            )
            seg_loss = self.seg_loss(batch, mask_logits, taught)
            self.log_dict({"train/policy_loss": loss, "train/seg_loss": seg_loss} | metrics)
            if any(taught):
                self.manual_backward(loss + h.seg_weight * seg_loss)
            self.update()

    def masks(self, embedding: Tensor, group: GroupPass) -> dict[int, Tensor]:
        """Mask logits (h, w) over the padded square, by the number of the completion that drew them."""
        embeddings = embedding.expand(len(group.seg_rows), -1, -1, -1)
        drawn = self.core_seg.masks(embeddings, self.core_seg.adapter(group.seg_states))
        return dict(zip(group.seg_rows.tolist(), drawn))

    @torch.no_grad()
    def score(
        self, batch: dict[str, list], completions: list[list[list[int]]], mask_logits: list[dict[int, Tensor]]
    ) -> Rollout:
        """Every reward of every completion."""
        size, grid, weights = self.hparams.group_size, self.core_seg.config.reasoner.grid, self.rewards
        texts = [self.core_seg.reasoner.decode_text(completion) for group in completions for completion in group]
        answers = [parse(text, grid) for text in texts]
        truth = torch.stack([as_mask(target) for target in batch["target"]]).repeat_interleave(size, 0)
        masks = torch.zeros_like(truth)
        for image, (drawn, frame) in enumerate(zip(mask_logits, batch["frame"])):
            height, width = (round(side * truth.shape[-1] / frame.size) for side in frame.inner)
            for slot, logits in drawn.items():
                if not answers[image * size + slot].says_empty:
                    masks[image * size + slot, :height, :width] = (logits[:height, :width] > 0).cpu()
        drew = torch.tensor([slot in drawn for drawn in mask_logits for slot in range(size)])
        empty = torch.tensor([answer.says_empty for answer in answers])
        has_mask = torch.tensor([answer.valid for answer in answers]) & (drew | empty)
        each = [image for image in range(len(completions)) for _ in range(size)]
        rewards = {
            "format": format_rewards(texts),
            "detect": detect_rewards(answers, [batch["boxes_norm"][image] for image in each], weights.match_iou),
            "segment": segment_rewards(masks, truth, has_mask, weights.segment_kind, weights.giou_of),
            "faithful": faithful_rewards(answers, [batch["facts"][image] for image in each]),
        }
        rewards = {name: values.view(-1, size) for name, values in rewards.items()}
        total = sum(getattr(weights, name) * values for name, values in rewards.items())
        dice = (has_mask * dice_scores(masks, truth)).view(-1, size)
        advantages = group_advantages(total, self.hparams.scale).to(self.device)
        return Rollout(self.global_step, batch, completions, texts, answers, masks, dice, rewards, total, advantages)

    def seg_loss(self, batch: dict[str, list], mask_logits: list[dict[int, Tensor]], taught: list[bool]) -> Tensor:
        """DiceCE on the masks of valid answers, of the groups that teach something; zero where none was drawn."""
        size = self.hparams.group_size
        drawn = [
            (logits, batch["target"][image])
            for image, group in enumerate(mask_logits)
            for slot, logits in group.items()
            if taught[image] and self.rollout.answers[image * size + slot].valid
        ]
        if not drawn:
            return torch.zeros((), device=self.device)
        logits, targets = (torch.stack(rows).to(self.device) for rows in zip(*drawn))
        return self.dice_ce(logits[:, None].float(), targets[:, None])

    def update(self) -> None:
        """One optimiser step on the gradients that there are."""
        optimizer = self.optimizers()
        self.clip_gradients(optimizer, self.hparams.clip_norm, "norm")
        optimizer.step()
        optimizer.zero_grad()
        self.lr_schedulers().step()

    def log_rollout(self, rollout: Rollout, passes: list[GroupPass], taught: list[bool]) -> None:
        """Metrics by trl's names and definitions, and the lab's own: `reward_group_std` is the mean deviation within
        groups, `rewards/<name>/frac_zero_std` the share of groups in which that reward alone tells nothing apart."""
        mask = flat(passes, "mask")
        lengths = mask.sum(1)
        unfinished = [c[-1] != self.core_seg.reasoner.eos_id for group in rollout.completions for c in group]
        prompts = [len(self.core_seg.reasoner.prompt_ids(query)) for query in rollout.batch["query"]]
        self.num_tokens += int(lengths.sum()) + self.hparams.group_size * sum(prompts)
        values = {
            "reward": rollout.total.mean(),
            "reward_std": rollout.total.std(),
            "reward_group_std": rollout.total.std(1).mean(),
            "frac_reward_zero_std": 1 - torch.tensor(taught).float().mean(),
            "entropy": (flat(passes, "entropy") * mask).sum() / mask.sum(),
            "completions/mean_length": lengths.mean(),
            "completions/min_length": lengths.min(),
            "completions/max_length": lengths.max(),
            "completions/clipped_ratio": torch.tensor(unfinished).float().mean(),
            "num_tokens": self.num_tokens.float(),
            "dice": rollout.dice.mean(),
            "hit_rate": (rollout.dice >= MISS).float().mean(),
            "failure_rate": (rollout.dice == 0).float().mean(),
            "claims/faithful": rollout.rewards["faithful"].mean(),
        }
        for name, rewards in rollout.rewards.items():
            values |= {f"rewards/{name}/mean": rewards.mean(), f"rewards/{name}/std": rewards.std()}
            values[f"rewards/{name}/frac_zero_std"] = 1 - teaches(rewards).float().mean()
        shown = ("reward", "dice", "failure_rate")
        self.log_dict({name: values.pop(name) for name in shown}, prog_bar=True, sync_dist=True)
        self.log_dict(values, sync_dist=True)


def flat(passes: list[GroupPass], field: str) -> Tensor:
    """A (G, T) field of the passes of B images as one (B * G, T), padded with zeros."""
    return pad_sequence([row for group in passes for row in getattr(group, field)], batch_first=True)


def as_mask(target: Tensor) -> Tensor:
    """A soft target (h, w) as bool; a lesion too small to fill half a cell keeps its fullest ones."""
    return target > min(0.5, float(target.max()) / 2)
