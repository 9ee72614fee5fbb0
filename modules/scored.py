"""What every stage does on validation and test: draw the mask of a whole sample and log its scores."""

import lightning as L
import numpy as np
from torch.optim import Optimizer

from lab.data.sample import Sample
from lab.evaluation.metrics import dice_iou
from modules.parallel import average_statistics, clip_gradients, sum_gradients


class ScoredModule(L.LightningModule):
    """A stage that draws masks; it says how in `drawn`. On several processes its loss is a share, see `parallel`."""

    def drawn(self, sample: Sample) -> np.ndarray | None:
        """The mask (H, W) bool of a sample; None where the answer is invalid."""
        raise NotImplementedError

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        if self.automatic_optimization:
            sum_gradients(self.parameters())
            average_statistics(self)

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        if gradient_clip_val and gradient_clip_algorithm != "value":
            clip_gradients(self.parameters(), gradient_clip_val)
        else:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def validation_step(self, sample: Sample, batch_idx: int) -> None:
        self.log_scores("val", sample)

    def test_step(self, sample: Sample, batch_idx: int) -> None:
        self.log_scores("test", sample)

    def log_scores(self, stage: str, sample: Sample) -> None:
        """Dice, IoU and failure (Dice 0 or an invalid answer)."""
        mask = self.drawn(sample)
        dice, iou = (0.0, 0.0) if mask is None else dice_iou(mask, sample.mask)
        scores = {"mDice": dice, "mIoU": iou, "failure_rate": float(dice == 0)}
        named = {f"{stage}/{name}": score for name, score in scores.items()}
        self.log_dict(named, prog_bar=True, batch_size=1, sync_dist=True)
