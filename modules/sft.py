"""Stage 1: CoT-based semantic alignment. Text cross-entropy plus DiceCE on the mask (CORE-Seg, section 3.3)."""

from copy import deepcopy
from dataclasses import asdict

import numpy as np
import torch
from monai.losses import DiceCELoss
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import masks_to_boxes

from lab.data.images import Frame
from lab.errors import LabError
from lab.model.core_seg import CoreSeg, CoreSegConfig, Output
from lab.model.decoding import Sampling
from lab.model.release import load_model, load_segmenter
from modules.parallel import gathered, shares, totals
from modules.precision import bfloat16
from modules.reasoning import ReasoningModule
from modules.scored import plain_arguments


class Sft(ReasoningModule):
    """Teacher forcing on (image, query, reasoning, answer).

    Args:
        core_seg: What to build; see `CoreSegConfig`. None takes that of `start`.
        start: Release folder, or checkpoint of stage 1, whose weights training goes on from.
        segmenter_checkpoint: Checkpoint or release of stage 0; None keeps the segmenter's own weights.
        language_checkpoint: Checkpoint of stage 1 or release whose reasoner is taken, without adapter and segmenter; a
            backbone that both see through stays the segmenter's.
        cache: Folder for the frozen encoders' outputs; None runs the encoders every time.
        views: Fixed ways in which every image is seen; 1 as it is, 2 also mirrored, more also augmented.
        reasoning: False has "-" written in place of the reasoning (an ablation).
        text_weight: Of the cross-entropy.
        seg_weight: Of DiceCE.
        dice_share: Of Dice in DiceCE.
        ce_share: Of cross-entropy in DiceCE.
        relevance_weight: Of the cross-entropy by which each visual token learns whether it shows what is asked for:
            one `<seg>` token alone is too thin a signal for a small model to learn to follow the query.
        relevance_first: First steps that learn from the prompts alone, in a fraction of the time, before the cosine
            begins: relevance, and where the first look tells the adapter what it found, the mask. A pretrained language
            model learns to follow the query slowly, and to write at once.
        prompt_weight: Of the distance from the adapter's first two prompt tokens to the prompt of the box around the
            true mask, which stage 0 taught the mask decoder to follow: else it learns to ignore what says nothing yet.
        decoder_after: First step that trains the mask decoder too, for the same reason.
        own_text: Share of steps whose masks are learnt from the model's own sampled answer, not the true one:
            under the true answer the `<seg>` state can read the boxes off the text, and need not heed the query.
        own_text_after: First step that may be such a step.
        blind: Share of rows, on all other steps, whose `<seg>` token sees image and query but not the answer.
        learning_rate: Peak rate of AdamW.
        encoder_learning_rate: The same for the image encoders, see `CoreSeg.thaw_encoders`; 0 freezes them, as in the
            paper.
        weight_decay: AdamW's decay.
        warmup_steps: Optimiser steps of linear warm-up.
        total_steps: Where the cosine reaches zero; keep it equal to the trainer's `max_steps`.
        max_new_tokens: Where a sampled answer is cut.
        bf16: Train with bfloat16 autocast where the hardware has it (2 times faster); weights and losses stay float32.
        gradient_checkpointing: Compute the language model's activations twice instead of keeping them.
    """

    stage = "sft"

    def __init__(
        self,
        core_seg: CoreSegConfig | None = None,
        start: str | None = None,
        segmenter_checkpoint: str | None = None,
        language_checkpoint: str | None = None,
        cache: str | None = None,
        views: int = 2,
        reasoning: bool = True,
        text_weight: float = 1.0,
        seg_weight: float = 1.0,
        dice_share: float = 1.0,
        ce_share: float = 1.0,
        relevance_weight: float = 5.0,
        relevance_first: int = 0,
        prompt_weight: float = 2.0,
        decoder_after: int = 1000,
        own_text: float = 0.5,
        own_text_after: int = 1500,
        blind: float = 0.5,
        learning_rate: float = 1e-3,
        encoder_learning_rate: float = 0.0,
        weight_decay: float = 0.05,
        warmup_steps: int = 100,
        total_steps: int = 3000,
        max_new_tokens: int = 200,
        bf16: bool = True,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        arguments = plain_arguments(locals(), "core_seg")
        if (core_seg is None) == (start is None):
            raise LabError("stage 1 either builds a model or goes on from one; give one of core_seg and start")
        model = load_model(start) if start else CoreSeg(core_seg)
        self.save_hyperparameters({"core_seg": asdict(model.config), **arguments})
        if language_checkpoint is not None:
            taken = load_model(language_checkpoint).reasoner
            if model.reasoner.config.notice and not taken.config.notice:
                taken.add_notice()
            if taken.config != model.reasoner.config:
                raise LabError(
                    f"the reasoner of '{language_checkpoint}' is another: {taken.config}; make core_seg.reasoner so"
                )
            own = deepcopy(model.segmenter.state_dict()) if model.one_backbone else None
            model.reasoner.load_state_dict(taken.state_dict())
            if own is not None:
                model.segmenter.load_state_dict(own)
        if segmenter_checkpoint is not None:
            model.segmenter.load_state_dict(load_segmenter(segmenter_checkpoint).state_dict())
        elif start is None:
            model.segmenter.load_pretrained()
        self.hold(model, cache, encoder_learning_rate > 0)
        self.loss = DiceCELoss(sigmoid=True, lambda_dice=dice_share, lambda_ce=ce_share)

    def training_step(self, batch: dict[str, list], batch_idx: int) -> Tensor:
        encoded = self.encode(batch)
        reasoner = self.core_seg.reasoner
        prompts = [reasoner.prompt_ids(query, frame) for query, frame in zip(batch["query"], batch["frame"])]
        self.core_seg.segmenter.mask_decoder.requires_grad_(self.global_step >= self.hparams.decoder_after)
        if self.global_step < self.hparams.relevance_first:
            shown = [row for row, target in enumerate(batch["target"]) if target.any()]
            with self.autocast():
                output = self.core_seg.glance(encoded, prompts, shown)
            loss = self.losses_of(output, batch)
        elif self.learns_from_own_text():
            sampling = Sampling(temperature=1.0, seed=self.global_step, rows=batch["draw"])
            with self.autocast(), gathered(self):
                seen, most = self.core_seg.see(encoded, prompts), self.hparams.max_new_tokens
                own = reasoner.generate(prompts, seen.visual, most, sampling, encoded.shapes)
            with self.autocast():
                output = self.core_seg(encoded, prompts, own, seen=seen)
            part = shares({"seg": len(output.mask_rows)}, self.device)
            drawn = part["seg"] * self.seg_loss(output, batch["target"])
            self.log_dict(totals({"train/own_seg_loss": drawn}, self.device), prog_bar=True)
            loss = self.hparams.seg_weight * drawn
        else:
            completions = [reasoner.completion_ids(answer) for answer in batch["answer"]]
            with self.autocast():
                output = self.core_seg(encoded, prompts, completions, self.blind_rows(batch["draw"]))
            labels = torch.tensor([token for completion in completions for token in completion], device=self.device)
            loss = self.losses_of(output, batch, labels)
        self.log_dict(totals({"train/loss": loss}, self.device))
        return loss

    def losses_of(self, output: Output, batch: dict[str, list], labels: Tensor | None = None) -> Tensor:
        """The weighted sum of a pass's losses, logged each by itself; without labels, of a pass over prompts alone."""
        drawn = output.mask_rows.tolist()
        shown = sum(bool(batch["target"][row].any()) for row in drawn)
        counts = {"text": 0 if labels is None else len(labels), "seg": len(drawn), "prompt": shown}
        counts["relevance"] = len(batch["query"])
        losses = {"relevance": self.relevance_loss(output.relevance_logits, batch["target"], batch["frame"])}
        if labels is not None:
            losses["text"] = F.cross_entropy(output.logits.float(), labels)
        if labels is not None or self.core_seg.draws_at_a_glance:
            losses["seg"] = self.seg_loss(output, batch["target"])
            losses["prompt"] = self.prompt_loss(output, batch["target"])
        part = shares(counts, self.device)
        losses = {name: part[name] * value for name, value in losses.items()}
        named = {f"train/{name}_loss": value for name, value in losses.items()}
        self.log_dict(totals(named, self.device), prog_bar=True)
        return sum(self.hparams[f"{name}_weight"] * value for name, value in losses.items())

    def autocast(self) -> torch.autocast:
        return bfloat16(self.device, self.hparams.bf16)

    def learns_from_own_text(self) -> bool:
        """Decided by the step alone, so that a resumed run decides the same."""
        if self.global_step < self.hparams.own_text_after:
            return False
        generator = torch.Generator().manual_seed(self.global_step)
        return torch.rand(1, generator=generator).item() < self.hparams.own_text

    def blind_rows(self, draws: list[tuple[int, int]]) -> list[bool]:
        """Decided by the step and the row alone, whichever process has it."""
        return [np.random.default_rng((self.global_step, *draw)).random() < self.hparams.blind for draw in draws]

    def seg_loss(self, output: Output, targets: list[Tensor]) -> Tensor:
        """DiceCE over the rows that drew a mask; zero, with a gradient path, where none did."""
        if len(output.mask_rows) == 0:
            return 0.0 * output.logits.sum()
        target = torch.stack([targets[row] for row in output.mask_rows.tolist()]).to(self.device)
        return self.loss(output.mask_logits[:, None].float(), target[:, None])

    def relevance_loss(self, logits: Tensor, targets: list[Tensor], frames: list[Frame]) -> Tensor:
        """Cross-entropy of what each visual token says of itself (B, grid_tokens): does it show any of the queried
        lesion?

        All images count the same, however many visual tokens they have.
        """
        logits, reasoner, shown = logits.float(), self.core_seg.reasoner, []
        for target, frame in zip(targets, frames):
            height, width = reasoner.part(frame, len(target))
            seen = target[None, :height, :width].to(self.device)
            shown.append(F.adaptive_max_pool2d(seen, reasoner.shape(frame)).flatten())
        weights = [torch.full_like(row, logits.shape[1] / len(row)) for row in shown]
        shows, weight = (pad_sequence(rows, batch_first=True) for rows in (shown, weights))
        return F.binary_cross_entropy_with_logits(logits, shows, weight)

    def prompt_loss(self, output: Output, targets: list[Tensor]) -> Tensor:
        """Mean squared distance to the prompt of a box, over the rows that drew a mask where there is something."""
        segmenter = self.core_seg.segmenter
        drawn = [(prompt, targets[row] > 0) for prompt, row in zip(output.prompt_tokens, output.mask_rows.tolist())]
        drawn = [(prompt, shown) for prompt, shown in drawn if shown.any()]
        if not drawn:
            return 0.0 * output.logits.sum()
        cell = segmenter.config.image_size / targets[0].shape[-1]
        boxes = masks_to_boxes(torch.stack([shown for _, shown in drawn]).to(self.device))
        boxes[:, 2:] += 1  # it names the last cell, not its end
        box_tokens = segmenter.box_prompt(boxes * cell)
        prompts = torch.stack([prompt[: box_tokens.shape[1]] for prompt, _ in drawn]).float()
        return F.mse_loss(prompts, box_tokens[:, : prompts.shape[1]])
