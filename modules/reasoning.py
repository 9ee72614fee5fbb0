"""What stage 1 and stage 2 share: a CORE-Seg model on frozen, cached encoders, its data and its validation."""

from collections import defaultdict

import lightning as L
import torch

from lab.data.cache import FeatureCache
from lab.data.dataset import AnswerDataset
from lab.data.sample import Record, Sample
from lab.evaluation.metrics import dice_iou
from lab.model.core_seg import CoreSeg, Encoded, Prediction
from modules.optimisation import adamw_warmup_cosine


class ReasoningModule(L.LightningModule):
    """A stage that trains CORE-Seg; the stage calls `hold` and keeps `views`, `max_new_tokens` and the optimiser's
    settings in its hyper-parameters."""

    core_seg: CoreSeg

    def hold(self, core_seg: CoreSeg, cache: str | None) -> None:
        """Take the model, freeze its encoders and open the cache of their outputs."""
        self.core_seg = core_seg
        core_seg.freeze_encoders()
        core_seg.segmenter.to(memory_format=torch.channels_last)
        self.cache = FeatureCache(cache, core_seg.encoders()) if cache else None

    def training_data(self, records: list[Record]) -> AnswerDataset:
        config, reasoner = self.core_seg.config.segmenter, self.core_seg.config.reasoner
        mask_size = 4 * config.embedding_size
        return AnswerDataset(
            records, config.image_size, mask_size, reasoner.grid, reasoner.max_boxes, self.hparams.views, self.cache
        )

    @torch.no_grad()
    def encode(self, batch: dict[str, list]) -> Encoded:
        """The frozen encoders' outputs: from the cache where it has them, else computed and stored there."""
        rows, missing = list(batch["features"]), defaultdict(list)  # pixels: the rows that show them, for other queries
        for row, features in enumerate(rows):
            if features is None:
                missing[batch["pixels"][row].numpy().tobytes()].append(row)
        if missing:
            pixels = torch.stack([batch["pixels"][same[0]] for same in missing.values()])
            computed = self.core_seg.encode(pixels.to(self.device))
            for place, same in enumerate(missing.values()):
                features = {name: tensor[place].half() for name, tensor in computed._asdict().items()}  # as cached
                for row in same:
                    rows[row] = features
                if self.cache:
                    self.cache.store(batch["pixels"][same[0]], features)
        self.log("train/encoded", float(len(missing)), on_step=True)
        return Encoded(*(torch.stack([row[name].to(self.device).float() for row in rows]) for name in Encoded._fields))

    def validation_step(self, sample: Sample, batch_idx: int) -> None:
        self.log_scores("val", sample)

    def test_step(self, sample: Sample, batch_idx: int) -> None:
        self.log_scores("test", sample)

    def predict_step(self, sample: Sample, batch_idx: int) -> dict:
        answer = self.ask(sample)
        return {"id": sample.record.id, "text": answer.text, "boxes": answer.boxes.tolist(), "mask": answer.mask}

    def ask(self, sample: Sample) -> Prediction:
        """The greedy answer to the record's query."""
        return self.core_seg.predict([sample.image], [sample.record.query], self.hparams.max_new_tokens)[0]

    def log_scores(self, stage: str, sample: Sample) -> None:
        """Dice, IoU and failure (Dice 0 or an invalid answer) of the greedy answer."""
        prediction = self.ask(sample)
        dice, iou = dice_iou(prediction.mask, sample.mask) if prediction.has_mask else (0.0, 0.0)
        scores = {"mDice": dice, "mIoU": iou, "failure_rate": float(dice == 0)}
        named = {f"{stage}/{name}": score for name, score in scores.items()}
        self.log_dict(named, prog_bar=True, batch_size=1, sync_dist=True)

    def configure_optimizers(self) -> dict:
        h = self.hparams
        policy, rest = self.core_seg.reasoner.parameters(), (self.core_seg.adapter, self.core_seg.segmenter)
        parts = [(policy, h.learning_rate)]
        parts += [(part.parameters(), h.get("seg_learning_rate", h.learning_rate)) for part in rest]
        return adamw_warmup_cosine(parts, h.weight_decay, h.warmup_steps, h.total_steps)
