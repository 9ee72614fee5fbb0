"""What every stage does on validation and test: draw the mask of a whole sample and log its scores."""

import lightning as L
import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from torch.optim import Optimizer

from lab.data.sample import Sample
from lab.evaluation.metrics import dice_iou
from modules.parallel import average_statistics, clip_gradients, gather, sum_gradients
from modules.precision import has_bfloat16


def plain_arguments(given: dict, part: str) -> dict:
    """What a module keeps as hyper-parameters of its `locals()`: all but itself and the configuration `part`, which is
    kept as plain values."""
    return {name: value for name, value in given.items() if name not in ("self", part, "__class__")}


class ScoredModule(L.LightningModule):
    """A stage that draws masks; it says how in `drawn`. On several processes its loss is a share, see `parallel`."""

    def drawn(self, sample: Sample) -> np.ndarray | None:
        """The mask (H, W) bool of a sample; None where the answer is invalid."""
        raise NotImplementedError

    def on_fit_start(self) -> None:
        wanted = self.hparams.get("bf16") or self.hparams.get("bf16_encoder")
        if wanted and not has_bfloat16(self.device):
            rank_zero_info("This hardware has no bfloat16 (AVX-512 BF16 on a CPU): training in float32.")

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

    def on_validation_epoch_start(self) -> None:
        self.scores: list[dict[str, float]] = []

    def validation_step(self, sample: Sample, batch_idx: int) -> None:
        self.scores.append(self.scored(sample))

    def on_validation_epoch_end(self) -> None:
        self.log_scores("val")

    on_test_epoch_start, test_step = on_validation_epoch_start, validation_step

    def on_test_epoch_end(self) -> None:
        self.log_scores("test")

    def scored(self, sample: Sample) -> dict[str, float]:
        """Dice, IoU and failure (Dice 0 or an invalid answer)."""
        mask = self.drawn(sample)
        dice, iou = (0.0, 0.0) if mask is None else dice_iou(mask, sample.mask)
        return {"mDice": dice, "mIoU": iou, "failure_rate": float(dice == 0)}

    def log_scores(self, stage: str) -> None:
        """Means over the records of all processes; Lightning 2.6.6 errs where these differ in number."""
        scores = gather(self.scores)
        means = {f"{stage}/{name}": float(np.mean([score[name] for score in scores])) for name in scores[0]}
        self.log_dict(means, prog_bar=True)
