"""`rollouts/`: what was sampled and what it earned, and how a handful of validation images changes, as Parquet."""

import math
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
import torch
from lightning.pytorch.utilities import rank_zero_only
from pycocotools import mask as coco

from lab.data.dataset import boxes_to_name
from lab.data.facts import measure
from lab.data.images import load_sample
from lab.data.sample import Sample, evenly
from lab.evaluation.metrics import dice_iou
from modules.grpo import Grpo
from modules.parallel import gather, gathered


class RolloutFiles(L.Callback):
    """Writes `rollouts/step_*.parquet` (a row a completion) and `rollouts/followed_*.parquet` (a row an image).

    Columns of both: `step`, `id`, `query`, `completion`, `boxes` (xyxy, shares of width and height), `dice`,
    `reward_<name>`, `mask_size` (height, width) and `mask_rle` (COCO's run lengths). The former also have `view`
    (the way in which the image was seen), `slot`, `reward` and `advantage`. Masks of the former are in the mask
    decoder's cells, padding cut; of the latter in pixels of the image.

    Args:
        every: Optimiser steps between two files.
        follow: Validation images, spread evenly, asked before the first step, every so often, and at the end.
    """

    def __init__(self, every: int = 10, follow: int = 6) -> None:
        self.every, self.follow = every, follow

    def on_train_start(self, trainer: L.Trainer, module: Grpo) -> None:
        """Drop what a resumed run writes again, and ask the followed images before the first step."""
        self.rewind(trainer)
        self.followed = evenly(trainer.datamodule.val_records(), self.follow) if self.follow else []
        if trainer.global_step == 0:
            self.ask(trainer, module)

    @rank_zero_only
    def rewind(self, trainer: L.Trainer) -> None:
        for path in self.folder(trainer).glob("*_[0-9]*.parquet"):
            step = int(path.stem.rpartition("_")[2])
            if step >= trainer.global_step + path.stem.startswith("followed"):
                path.unlink()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: Grpo, outputs: Any, batch: dict[str, list], batch_idx: int
    ) -> None:
        before, after = module.step, trainer.global_step
        if -before % self.every < after - before:
            self.write(trainer, f"step_{before:06d}", gather(self.sampled(module)))
        if before // self.every < after // self.every or 0 < trainer.max_steps <= after:
            self.ask(trainer, module)

    def ask(self, trainer: L.Trainer, module: Grpo) -> None:
        """Each process asks a part of the followed images."""
        if self.follow:
            share = math.ceil(len(self.followed) / trainer.world_size)
            own = self.followed[trainer.global_rank * share :][:share]
            with gathered(module):
                rows = [self.asked(module, load_sample(record)) for record in own]
            self.write(trainer, f"followed_{trainer.global_step:06d}", gather(rows))

    def folder(self, trainer: L.Trainer) -> Path:
        return Path(trainer.loggers[0].save_dir) / "rollouts"

    @rank_zero_only
    def write(self, trainer: L.Trainer, name: str, rows: list[dict]) -> None:
        folder = self.folder(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{name}"
        pd.DataFrame(rows).to_parquet(temporary)
        temporary.replace(folder / f"{name}.parquet")

    def sampled(self, module: Grpo) -> list[dict]:
        rows = []
        for group in module.groups:
            item, frame = group.item, group.item["frame"]
            height, width = frame.filled(group.masks.shape[-1])
            for slot, (text, answer, mask) in enumerate(zip(group.texts, group.answers, group.masks.numpy())):
                rows.append(
                    {"step": module.step, "id": item["id"], "view": item["view"], "query": item["query"]}
                    | {"slot": slot, "completion": text, "boxes": answer.boxes_norm.tolist()}
                    | {"dice": float(group.dice[slot])}
                    | {f"reward_{name}": float(values[slot]) for name, values in group.rewards.items()}
                    | {"reward": float(group.total[slot]), "advantage": float(group.advantages[slot])}
                    | run_lengths(mask[:height, :width])
                )
        return rows

    def asked(self, module: Grpo, sample: Sample) -> dict:
        said = module.ask(sample)
        truth = boxes_to_name(sample.mask, module.core_seg.config.reasoner.max_boxes)
        masks = (torch.from_numpy(mask)[None] for mask in (said.mask, sample.mask))
        facts, has_mask = measure(sample.image, sample.mask), torch.tensor([said.has_mask])
        rewards = module.rewards.of([said.text], [said.answer], truth, facts, *masks, has_mask)
        return (
            {"step": module.global_step, "id": sample.record.id, "query": sample.record.query}
            | {"completion": said.text, "boxes": said.answer.boxes_norm.tolist()}
            | {"dice": dice_iou(said.mask, sample.mask)[0] if said.has_mask else 0.0}
            | {f"reward_{name}": float(values) for name, values in rewards.items()}
            | run_lengths(said.mask)
        )


def run_lengths(mask: np.ndarray) -> dict:
    """A mask (H, W) bool as `mask_size` and COCO's `mask_rle`; `read_mask` is the inverse."""
    encoded = coco.encode(np.asfortranarray(mask, np.uint8))
    return {"mask_size": list(encoded["size"]), "mask_rle": encoded["counts"].decode()}


def read_mask(row: dict) -> np.ndarray:
    """The mask (H, W) bool of a row."""
    return coco.decode({"size": list(row["mask_size"]), "counts": row["mask_rle"].encode()}).astype(bool)
