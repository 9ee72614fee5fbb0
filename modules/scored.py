"""What every stage does on validation and test: draw the mask of a whole sample and log its scores."""

import lightning as L
import numpy as np

from lab.data.sample import Sample
from lab.evaluation.metrics import dice_iou


class ScoredModule(L.LightningModule):
    """A stage that draws masks; it says how in `drawn`."""

    def drawn(self, sample: Sample) -> np.ndarray | None:
        """The mask (H, W) bool of a sample; None where the answer is invalid."""
        raise NotImplementedError

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
