"""What a training step sees: records loaded, augmented, padded to the model's square and collated."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lab.data.augment import augment, view
from lab.data.cache import FeatureCache
from lab.data.facts import Facts, measure
from lab.data.images import Frame, load_sample
from lab.data.reasoning import write
from lab.data.sample import Record, Sample, lesion_boxes
from lab.model.answer import render

Draw = tuple[int, int]
"""Record index and item seed, as `MixtureSampler` draws them."""


def model_pixels(image: np.ndarray, size: int) -> Tensor:
    """(H, W, 3) uint8 RGB of any size to the padded square (size, size, 3) uint8 that the encoders take."""
    return torch.from_numpy(Frame(*image.shape[:2], size).image(image))


def soft_target(mask: np.ndarray, frame: Frame, cells: int) -> Tensor:
    """(H, W) bool to (cells, cells) float32 in [0, 1]: the share of each cell of the padded square that is lesion."""
    square = torch.from_numpy(frame.mask(mask))[None]
    return torch.nn.functional.adaptive_avg_pool2d(square, cells)[0]


class BoxPromptDataset(Dataset):
    """Stage 0: an image, a jittered true box around one lesion, and that lesion's mask (MedSAM, Ma et al. 2024).

    Some draws get the box of the whole image and the mask of all lesions instead, so that the encoder also has to learn
    what a lesion looks like, not only where its border runs.
    """

    def __init__(
        self,
        records: Sequence[Record],
        image_size: int,
        mask_size: int,
        jitter: float,
        whole_image: float,
        strength: float,
    ) -> None:
        self.records, self.image_size, self.mask_size = records, image_size, mask_size
        self.jitter, self.whole_image, self.strength = jitter, whole_image, strength

    def __getitem__(self, draws: Sequence[Draw]) -> dict[str, Tensor]:
        """A batch: `pixels` (B, S, S, 3) uint8, `boxes` (B, 4) xyxy in pixels of the square, `target` (B, h, w)."""
        items = [self.item(*draw) for draw in draws]
        return {key: torch.stack([item[key] for item in items]) for key in items[0]}

    def item(self, index: int, seed: int) -> dict[str, Tensor]:
        rng = np.random.default_rng(seed)
        sample = augment(load_sample(self.records[index]), rng, self.strength)
        frame = Frame(*sample.image.shape[:2], self.image_size)
        boxes, mask = lesion_boxes(sample.mask), sample.mask
        if len(boxes) == 0 or rng.random() < self.whole_image:
            box = np.array([[0, 0, frame.width, frame.height]], np.float32)
        else:
            box = boxes[[rng.integers(len(boxes))]]
            x1, y1, x2, y2 = box[0].astype(int)
            mask = np.zeros_like(mask)
            mask[y1:y2, x1:x2] = sample.mask[y1:y2, x1:x2]
            side = np.tile(box[0, 2:] - box[0, :2], 2)
            shift = rng.uniform(-self.jitter, self.jitter, 4) * np.maximum(side, 10)
            box = np.clip(box + shift, 0, [frame.width, frame.height] * 2).astype(np.float32)
        return {
            "pixels": torch.from_numpy(frame.image(sample.image)),
            "boxes": torch.from_numpy(np.asarray(frame.boxes_to_model(box), np.float32))[0],
            "target": soft_target(mask, frame, self.mask_size),
        }


class AnswerDataset(Dataset):
    """Stage 1: image, query, the answer that a reader of the mask would write, and the mask.

    Every image is seen in `views` fixed ways (`lab.data.augment.view`), so that frozen encoders run once for each and
    their features come from the cache after that.
    """

    def __init__(
        self,
        records: Sequence[Record],
        image_size: int,
        mask_size: int,
        grid: int,
        max_boxes: int,
        views: int,
        cache: FeatureCache | None,
        reasoning: bool = True,
    ) -> None:
        self.records, self.image_size, self.mask_size, self.reasoning = records, image_size, mask_size, reasoning
        self.grid, self.max_boxes, self.views, self.cache = grid, max_boxes, views, cache

    def __getitem__(self, draws: Sequence[Draw]) -> dict[str, list]:
        """Lists of B: `pixels` (S, S, 3) uint8, `features` (dict or None), `target` (h, w), `query`, `answer` and what
        rewards are measured against: `boxes_norm` (N, 4), `facts`, `frame`; `id` and `view` for the record; `draw`, the
        two numbers that randomness of this item alone is made from."""
        items = [self.item(*draw) for draw in draws]
        return {key: [item[key] for item in items] for key in items[0]}

    def item(self, index: int, seed: int) -> dict:
        rng = np.random.default_rng(seed)
        seen_as = int(rng.integers(self.views))
        sample = view(load_sample(self.records[index]), seen_as)
        frame = Frame(*sample.image.shape[:2], self.image_size)
        pixels = torch.from_numpy(frame.image(sample.image))
        facts, boxes_norm = measure(sample.image, sample.mask), boxes_to_name(sample.mask, self.max_boxes)
        return {
            "pixels": pixels,
            "features": self.cache.load(pixels, frame) if self.cache else None,
            "target": soft_target(sample.mask, frame, self.mask_size),
            "query": sample.record.query,
            "answer": true_answer(sample.record, facts, boxes_norm, self.grid, rng, self.reasoning),
            "boxes_norm": boxes_norm,
            "facts": facts,
            "frame": frame,
            "id": sample.record.id,
            "view": seen_as,
            "draw": (index, seed),
        }


def boxes_to_name(mask: np.ndarray, limit: int) -> np.ndarray:
    """The boxes that an answer lists: of the `limit` largest lesions, (N, 4) xyxy as shares of width and height."""
    height, width = mask.shape
    return lesion_boxes(mask, limit) / np.array([width, height] * 2, np.float32)


def true_answer(
    record: Record,
    facts: Facts,
    boxes_norm: np.ndarray,
    grid: int,
    rng: np.random.Generator,
    reasoning: bool = True,
) -> str:
    """The answer to learn: the record's own reasoning, or one written from the measured facts, or none, and the true
    boxes."""
    written = record.reasoning or write(facts, record.modality, record.anatomy, record.lesion, rng)
    return render(written if reasoning else "-", record.lesion, boxes_norm, grid)


class RecordDataset(Dataset):
    """Validation and test: whole samples, one at a time and untouched."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        return load_sample(self.records[index])
