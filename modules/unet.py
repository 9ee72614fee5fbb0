"""The reference without language, trained on the same records as CORE-Seg: DiceCE on the mask of each record."""

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import torch
from monai.losses import DiceCELoss
from torch import Tensor

from lab.baselines.unet import UNet, UNetConfig
from lab.data.dataset import BoxPromptDataset
from lab.data.sample import Record, Sample
from lab.model.release import load_segmenter
from modules.optimisation import adamw_warmup_cosine
from modules.parallel import shares, totals
from modules.scored import ScoredModule, plain_arguments


class UNetModule(ScoredModule):
    """Images in, masks out; what a record asks for is its target, though the U-Net cannot read it.

    Args:
        unet: What to build; see `UNetConfig`.
        encoder: Release or checkpoint of any stage, whose image encoder it starts from, so that all saw the same.
        learning_rate: Peak rate of AdamW.
        encoder_learning_rate: The same for the encoder.
        weight_decay: AdamW's decay.
        warmup_steps: Optimiser steps of linear warm-up.
        total_steps: Where the cosine reaches zero; keep it equal to the trainer's `max_steps`.
        augmentation: Strength of `lab.data.augment.augment`; 0 is none, 1 the default.
    """

    stage = "unet"

    def __init__(
        self,
        unet: UNetConfig,
        encoder: str | None = None,
        learning_rate: float = 1e-3,
        encoder_learning_rate: float = 3e-4,
        weight_decay: float = 0.05,
        warmup_steps: int = 100,
        total_steps: int = 2000,
        augmentation: float = 1.0,
    ) -> None:
        super().__init__()
        arguments = plain_arguments(locals(), "unet")
        self.save_hyperparameters({"unet": asdict(unet), **arguments})
        self.unet = UNet(unet)
        if encoder is not None:
            self.unet.backbone.load_state_dict(load_segmenter(encoder).image_encoder.backbone.state_dict())
        self.unet.to(memory_format=torch.channels_last)
        self.loss = DiceCELoss(sigmoid=True)

    def training_data(self, records: Sequence[Record]) -> BoxPromptDataset:
        size = self.unet.config.image_size
        return BoxPromptDataset(records, size, size // 2, 0.0, 1.0, self.hparams.augmentation)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        part = shares({"rows": len(batch["target"])}, self.device)
        loss = part["rows"] * self.loss(self.unet(batch["pixels"])[:, None], batch["target"][:, None])
        self.log_dict(totals({"train/seg_loss": loss}, self.device), prog_bar=True)
        return loss

    def drawn(self, sample: Sample) -> np.ndarray:
        (prediction,) = self.unet.predict([sample.image], [sample.record.query])
        return prediction.mask

    def predict_step(self, sample: Sample, batch_idx: int) -> dict:
        return {"id": sample.record.id, "mask": self.drawn(sample)}

    def configure_optimizers(self) -> dict:
        h, net = self.hparams, self.unet
        rest = [*net.decoder.parameters(), *net.head.parameters()]
        parts = [(net.backbone.parameters(), h.encoder_learning_rate), (rest, h.learning_rate)]
        return adamw_warmup_cosine(parts, h.weight_decay, h.warmup_steps, h.total_steps)
