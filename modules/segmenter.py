"""Stage 0: the small SAM is trained with true boxes, as MedSAM was, so that there is a segmenter to start from."""

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import torch
from monai.losses import DiceCELoss
from torch import Tensor

from lab.data.dataset import BoxPromptDataset
from lab.data.sample import Record, Sample, lesion_boxes
from lab.errors import LabError
from lab.model.build import segmenter_for
from lab.model.release import load_segmenter
from lab.model.segmenter import SegmenterConfig
from modules.optimisation import adamw_warmup_cosine
from modules.parallel import shares, totals
from modules.precision import bfloat16
from modules.scored import ScoredModule, plain_arguments


class SegmenterModule(ScoredModule):
    """Box prompts in, masks out; DiceCE on the decoder's logits (MedSAM: Ma et al. 2024).

    Args:
        segmenter: What to build; see `SegmenterConfig`. None takes that of `start`.
        start: Release, of whichever stage, or checkpoint of stage 0, whose segmenter training goes on from.
        learning_rate: Peak rate of AdamW.
        encoder_learning_rate: The same for the image encoder; 0 freezes it.
        weight_decay: AdamW's decay.
        warmup_steps: Optimiser steps of linear warm-up.
        total_steps: Where the cosine reaches zero; keep it equal to the trainer's `max_steps`.
        bf16_encoder: Run the image encoder in bfloat16 while training, where the hardware has it (1.5 times faster).
        box_jitter: Each side of a box is moved by up to this share of its length.
        whole_image: Share of draws whose box is the whole image and whose mask is all lesions.
        augmentation: Strength of `lab.data.augment.augment`; 0 is none, 1 the default.
    """

    stage = "segmenter"

    def __init__(
        self,
        segmenter: SegmenterConfig | None = None,
        start: str | None = None,
        learning_rate: float = 1e-3,
        encoder_learning_rate: float = 1e-3,
        weight_decay: float = 0.05,
        warmup_steps: int = 100,
        total_steps: int = 2000,
        bf16_encoder: bool = True,
        box_jitter: float = 0.1,
        whole_image: float = 0.3,
        augmentation: float = 1.0,
    ) -> None:
        super().__init__()
        arguments = plain_arguments(locals(), "segmenter")
        if (segmenter is None) == (start is None):
            raise LabError("stage 0 either builds a segmenter or goes on from one; give one of segmenter and start")
        self.segmenter = load_segmenter(start) if start else segmenter_for(segmenter)
        self.save_hyperparameters({"segmenter": asdict(self.segmenter.config), **arguments})
        if start is None:
            self.segmenter.load_pretrained()
        self.segmenter.to(memory_format=torch.channels_last)
        self.loss = DiceCELoss(sigmoid=True)
        if encoder_learning_rate == 0:
            self.segmenter.image_encoder.requires_grad_(False)
        self.train()

    def training_data(self, records: Sequence[Record]) -> BoxPromptDataset:
        size, h = self.segmenter.config, self.hparams
        mask_size = 4 * size.embedding_size
        return BoxPromptDataset(records, size.image_size, mask_size, h.box_jitter, h.whole_image, h.augmentation)

    def train(self, mode: bool = True) -> "SegmenterModule":
        """As `nn.Module.train`, but a frozen encoder keeps its statistics."""
        super().train(mode)
        self.segmenter.image_encoder.train(mode and self.hparams.encoder_learning_rate > 0)
        return self

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        with bfloat16(self.device, self.hparams.bf16_encoder):
            embeddings = self.segmenter.encode(batch["pixels"])
        mask_logits = self.segmenter.decode(embeddings.float(), self.segmenter.box_prompt(batch["boxes"]))
        part = shares({"rows": len(batch["target"])}, self.device)
        loss = part["rows"] * self.loss(mask_logits[:, None], batch["target"][:, None])
        self.log_dict(totals({"train/seg_loss": loss}, self.device), prog_bar=True)
        return loss

    def drawn(self, sample: Sample) -> np.ndarray:
        """The union of the masks in the true boxes."""
        return self.segmenter.segment_boxes(sample.image, lesion_boxes(sample.mask))

    def predict_step(self, sample: Sample, batch_idx: int) -> dict:
        return {"id": sample.record.id, "mask": self.drawn(sample)}

    def configure_optimizers(self) -> dict:
        h = self.hparams
        encoder = self.segmenter.image_encoder
        rest = [*self.segmenter.prompt_encoder.parameters(), *self.segmenter.mask_decoder.parameters()]
        parts = [(encoder.parameters(), h.encoder_learning_rate), (rest, h.learning_rate)]
        return adamw_warmup_cosine(parts, h.weight_decay, h.warmup_steps, h.total_steps)
