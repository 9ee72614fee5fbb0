"""What stage 1 and stage 2 share: a CORE-Seg model on frozen, cached encoders, its data and its validation."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from lab.data.cache import FeatureCache
from lab.data.dataset import AnswerDataset
from lab.data.sample import Record, Sample
from lab.errors import LabError
from lab.model.core_seg import CoreSeg, Encoded, Prediction
from modules.optimisation import adamw_warmup_cosine
from modules.parallel import gathered, is_sharded, shard
from modules.scored import ScoredModule


class ReasoningModule(ScoredModule):
    """A stage that trains CORE-Seg; the stage calls `hold` and keeps `views`, `max_new_tokens` and the optimiser's
    settings in its hyper-parameters."""

    core_seg: CoreSeg

    def hold(self, core_seg: CoreSeg, cache: str | None, trains_encoders: bool = False) -> None:
        """Take the model, freeze its encoders, or their shallow layers alone, and open the cache of their outputs."""
        if cache and trains_encoders:
            raise LabError(f"the outputs of encoders that are trained cannot be cached in '{cache}'; set cache: null")
        self.core_seg, self.trains_encoders = core_seg, trains_encoders
        core_seg.freeze_encoders()
        if trains_encoders:
            core_seg.thaw_encoders()
        core_seg.segmenter.to(memory_format=torch.channels_last)
        encoders, dynamic = core_seg.encoders(), core_seg.config.reasoner.dynamic
        self.cache = FeatureCache(cache, encoders, core_seg.preprocessing, dynamic) if cache else None
        if self.hparams.gradient_checkpointing:
            core_seg.reasoner.checkpoint_gradients()

    def configure_model(self) -> None:
        """Shard the language model where the strategy spreads it over processes."""
        if self.device_mesh is not None and not is_sharded(self):
            shard(self.core_seg.reasoner.model.model.language_model, self.device_mesh["data_parallel"])

    def on_validation_start(self) -> None:
        """Answers differ in length, and processes in their number of records: the model is fetched once for all."""
        self.whole = gathered(self)
        self.whole.__enter__()

    def on_validation_end(self) -> None:
        self.whole.__exit__(None, None, None)

    on_test_start, on_test_end = on_validation_start, on_validation_end

    def training_data(self, records: Sequence[Record]) -> AnswerDataset:
        config, reasoner = self.core_seg.config.segmenter, self.core_seg.config.reasoner
        mask_size = 4 * config.embedding_size
        h = self.hparams
        return AnswerDataset(
            records,
            config.image_size,
            mask_size,
            reasoner.grid,
            reasoner.max_boxes,
            h.views,
            self.cache,
            h.get("reasoning", True),
        )

    def encode(self, batch: dict[str, list]) -> Encoded:
        """The encoders' outputs, each image once; frozen ones from the cache where it has them, else stored there."""
        rows, missing = list(batch["features"]), defaultdict(list)  # pixels: the rows that show them, for other queries
        reasoner, frames = self.core_seg.reasoner, batch["frame"]
        for row, (features, frame) in enumerate(zip(rows, frames)):
            if features is None:
                missing[batch["pixels"][row].numpy().tobytes(), reasoner.part(frame, frame.size)].append(row)
        if missing:
            pixels = torch.stack([batch["pixels"][same[0]] for same in missing.values()])
            with torch.set_grad_enabled(self.trains_encoders):
                computed = self.core_seg.encode(pixels.to(self.device), [frames[same[0]] for same in missing.values()])
            for place, same in enumerate(missing.values()):
                frame = frames[same[0]]
                own = computed.features[place, : reasoner.tokens_of(frame)]
                features = {"embeddings": computed.embeddings[place], "features": own}
                if not self.trains_encoders:
                    features = {name: tensor.half() for name, tensor in features.items()}  # as cached
                for row in same:
                    rows[row] = features
                if self.cache:
                    self.cache.store(batch["pixels"][same[0]], frame, features)
        self.log("train/encoded", float(len(missing)), on_step=True, reduce_fx="sum", sync_dist=True)
        embeddings, features = (
            pad_sequence([row[name].to(self.device).float() for row in rows], batch_first=True)
            for name in ("embeddings", "features")
        )
        return Encoded(embeddings, features, self.core_seg.shapes(frames))

    def predict_step(self, sample: Sample, batch_idx: int) -> dict:
        answer = self.ask(sample)
        said = {"id": sample.record.id, "text": answer.text, "valid": answer.answer.valid}
        return said | {"boxes": answer.boxes.tolist(), "mask": answer.mask}

    def ask(self, sample: Sample) -> Prediction:
        """The greedy answer to the record's query."""
        return self.core_seg.predict([sample.image], [sample.record.query], self.hparams.max_new_tokens)[0]

    def drawn(self, sample: Sample) -> np.ndarray | None:
        prediction = self.ask(sample)
        return prediction.mask if prediction.has_mask else None

    def configure_optimizers(self) -> dict:
        h = self.hparams
        encoders = {id(p): p for encoder in self.core_seg.encoders() for p in encoder.parameters()}  # some are shared
        rates = [(self.core_seg.reasoner, h.learning_rate)]
        rates += [
            (part, h.get("seg_learning_rate", h.learning_rate))
            for part in (self.core_seg.adapter, self.core_seg.segmenter)
        ]
        parts = [([p for p in part.parameters() if id(p) not in encoders], rate) for part, rate in rates]
        parts.append((encoders.values(), h.get("encoder_learning_rate", 0.0)))
        falls_from = h.get("relevance_first", 0)
        return adamw_warmup_cosine(parts, h.weight_decay, h.warmup_steps, h.total_steps, falls_from)
