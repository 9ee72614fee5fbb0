"""A LightningModule of two weights, trained on `modules.data.Lesions` in milliseconds; what is tested is the house."""

import time

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lab.data.images import load_sample
from lab.data.sample import Record, Sample


class MeanDataset(Dataset):
    """Mean brightness of an image, with noise from the seed of the draw."""

    def __init__(self, records: list[Record]) -> None:
        self.means = [load_sample(record).image.mean() / 255 for record in records]

    def __getitem__(self, draws: list[tuple[int, int]]) -> Tensor:
        return torch.tensor([[self.means[i] + np.random.default_rng(seed).random()] for i, seed in draws]).float()


class Tiny(L.LightningModule):
    """A line through the brightness; `seconds` is how long a step takes."""

    def __init__(self, learning_rate: float = 0.05, seconds: float = 0.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(1, 1)

    def training_data(self, records: list[Record]) -> Dataset:
        return MeanDataset(records)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        time.sleep(self.hparams.seconds)
        loss = (self.layer(batch) - 2 * batch - 1).square().mean()
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, sample: Sample, batch_idx: int) -> None:
        time.sleep(self.hparams.seconds)
        self.log("val/mDice", 1 / (1 + self.layer.weight.square().sum()), batch_size=1)

    test_step = validation_step

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.learning_rate)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step / 10))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
