"""A group of completions of one image, and what they earn (CORE-Seg, 3.4)."""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lab.data.facts import Facts
from lab.grpo.objective import teaches
from lab.grpo.rewards import (
    MATCH_IOU,
    SegmentReward,
    binary_box_rewards,
    detect_rewards,
    dice_scores,
    faithful_rewards,
    format_rewards,
    segment_rewards,
)
from lab.model.answer import Answer
from lab.model.decoding import Prompt


@dataclass
class Rewards:
    """What counts, and how much; the reward of a completion is the weighted sum."""

    format: float = 1.0
    """Weight of the share of the answer schema that is kept, 0..1."""
    detect: float = 1.0
    """Weight of the box reward, 0..1."""
    segment: float = 1.0
    """Weight of the segment reward."""
    faithful: float = 0.0
    """Weight of the share of claims that the measured facts confirm, 0..1."""
    segment_kind: SegmentReward = "paper"
    """`paper`, `residual`, `dice` or `iou2`; see `lab.grpo.rewards.segment_rewards`."""
    giou_of: Literal["boxes", "areas"] = "boxes"
    """`paper`: GIoU of the boxes around the masks, or of the masks' pixels."""
    detect_kind: Literal["matched", "binary"] = "matched"
    """`matched`: mIoU(matched) x F1 of the boxes; `binary`: Seg-Zero's, a baseline."""
    match_iou: float = MATCH_IOU
    """`matched`: IoU above which a matched pair of boxes counts."""

    def of(
        self,
        texts: list[str],
        answers: list[Answer],
        boxes_norm: np.ndarray,
        facts: Facts,
        masks: Tensor,
        truth: Tensor,
        has_mask: Tensor,
    ) -> dict[str, Tensor]:
        """Each reward by itself, (G,), of G completions about one image.

        Args:
            texts: The completions.
            answers: What is read in them.
            boxes_norm: (N, 4), the true boxes as shares of width and height.
            facts: Measured on the true mask.
            masks: (G, h, w) bool, what was drawn.
            truth: (G, h, w) bool.
            has_mask: (G,) bool, whether the mask counts.
        """
        boxes = [boxes_norm] * len(texts)
        if self.detect_kind == "binary":
            detect = binary_box_rewards(answers, boxes)
        else:
            detect = detect_rewards(answers, boxes, self.match_iou)
        return {
            "format": format_rewards(texts),
            "detect": detect,
            "segment": segment_rewards(masks, truth, has_mask, self.segment_kind, self.giou_of),
            "faithful": faithful_rewards(answers, [facts] * len(texts)),
        }


@dataclass
class Group:
    """An image, the G completions that were sampled for it, and what they earned."""

    item: dict
    """What the batch holds of the image."""
    embedding: Tensor
    """(1, C, h, w) of the segmenter."""
    gist: Tensor | None
    """(1, D), see `Seen.gist`."""
    prompt: Prompt
    """Of the image and its query alone; where the model notices, with the marks of the policy that sampled."""
    reference_prompt: Prompt
    """The same, with the marks of the model of the start."""
    completions: list[list[int]]
    texts: list[str]
    answers: list[Answer]
    draws: list[bool]
    """Whether the answer is valid and has a `<seg>`, or boxes where the model draws from those."""
    token_share: float = 0.0
    """Of the batch's completion tokens."""
    policy_share: float = 0.0
    """What the image's policy loss counts for in the batch's."""
    seg_share: float = 0.0
    """The same of its DiceCE."""
    masks: Tensor | None = None
    """(G, h, w) bool over the padded square; this and all below once scored."""
    dice: Tensor | None = None
    """(G,), 0 for an answer that is not valid."""
    rewards: dict[str, Tensor] | None = None
    """Each reward by itself, (G,)."""
    total: Tensor | None = None
    """(G,), their weighted sum."""
    advantages: Tensor | None = None
    """(G,)."""
    teaches: bool = True
    """Whether its rewards differ at all; where they do not it is passed over, its DiceCE and KL too (ours)."""
    old_log_probs: Tensor | None = None
    """(G, T) of the policy that sampled; this and all below from the first inner step on."""
    reference: Tensor | None = None
    """(G, T) of the model of the start."""

    @property
    def tokens(self) -> int:
        return sum(map(len, self.completions))

    @property
    def has_mask(self) -> Tensor:
        """(G,) bool: whether the answer is valid, and draws a mask or says that it is empty."""
        return torch.tensor([a.valid and (draws or a.says_empty) for a, draws in zip(self.answers, self.draws)])

    @property
    def truth(self) -> Tensor:
        """(G, h, w) bool, the true mask for each completion."""
        return as_mask(self.item["target"]).expand(len(self.texts), -1, -1)

    def idle(self) -> "Group":
        """One like it that counts for nothing: for a process with fewer groups than another, which on a sharded model
        has to make as many passes."""
        shares = {"token_share": 0.0, "policy_share": 0.0, "seg_share": 0.0}
        return replace(self, teaches=False, advantages=torch.zeros(len(self.texts)), **shares)

    @torch.no_grad()
    def score(self, mask_logits: dict[int, Tensor], weights: Rewards) -> None:
        """Every reward of every completion.

        Args:
            mask_logits: By the number of the completion that drew them, (h, w) over the padded square.
            weights: What counts.
        """
        item, truth = self.item, self.truth
        self.masks = torch.zeros_like(truth, memory_format=torch.contiguous_format)
        height, width = item["frame"].filled(truth.shape[-1])
        for slot, logits in mask_logits.items():
            if not self.answers[slot].says_empty:
                self.masks[slot, :height, :width] = (logits[:height, :width] > 0).cpu()
        boxes = np.asarray(item["boxes_norm"])  # the loader makes tensors
        self.rewards = weights.of(self.texts, self.answers, boxes, item["facts"], self.masks, truth, self.has_mask)
        self.total = sum(getattr(weights, name) * values for name, values in self.rewards.items())
        self.teaches = bool(teaches(self.total[None]))
        self.dice = self.has_mask * dice_scores(self.masks, truth)


def as_mask(target: Tensor) -> Tensor:
    """A soft target (h, w) as bool; a lesion too small to fill half a cell keeps its fullest ones."""
    return target > min(0.5, float(target.max()) / 2)
