"""How hard each record is for a plain U-Net that has not seen it: K folds by group, one file of errors a fold."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from tqdm import tqdm

from lab.data.dataset import BoxPromptDataset, model_pixels
from lab.data.images import Frame, load_sample
from lab.data.mixture import MixtureSampler, Part
from lab.data.sample import Record
from lab.errors import LabError
from lab.evaluation.metrics import dice_iou
from lab.model.segmenter import normalise


@dataclass(frozen=True)
class Settings:
    """Of the cross-validation; a record's error means little without them."""

    folds: int
    steps: int
    """Optimiser steps a fold."""
    size: int
    """Side of the padded square in pixels; a multiple of 8."""
    batch_size: int
    seed: int
    """Of the folds, the weights, and what is drawn."""


def cross_validated(records: Sequence[Record], settings: Settings, folder: Path) -> pd.DataFrame:
    """The error of every record under the model of the other folds; what is in the folder already is not done again.

    Args:
        records: All that are to be scored.
        settings: Those of the files in the folder, if any.
        folder: For `fold-K.csv` and `settings.json`.

    Returns:
        `id`, `source`, `split`, `fold` and `error`, 1 - Dice at the size of the image, in the order of the records.

    Raises:
        LabError: Fewer groups than folds, or a folder of other records or settings.
    """
    folds = group_folds(records, settings.folds, settings.seed)
    stamp = asdict(settings) | {"records": [[record.id, int(fold)] for record, fold in zip(records, folds)]}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "settings.json"
    if not path.exists():
        path.write_text(json.dumps(stamp) + "\n")
    elif json.loads(path.read_text()) != stamp:
        raise LabError(f"'{folder}' holds the scores of other records or settings; give another folder")
    frames = []
    with tqdm(total=settings.folds * settings.steps, desc="U-Nets", unit="step") as bar:
        for fold in range(settings.folds):
            scores = folder / f"fold-{fold}.csv"
            if not scores.is_file():
                seen = [record for record, other in zip(records, folds) if other != fold]
                unet = train(seen, settings, fold, bar)
                held_out = [record for record, other in zip(records, folds) if other == fold]
                unfinished = scores.with_suffix(".unfinished")
                score(unet, held_out, settings.size).assign(fold=fold).to_csv(unfinished, index=False)
                unfinished.replace(scores)
            bar.update(settings.steps * (fold + 1) - bar.n)
            frames.append(pd.read_csv(scores))
    return pd.concat(frames).set_index("id").loc[[record.id for record in records]].reset_index()


def group_folds(records: Sequence[Record], folds: int, seed: int) -> np.ndarray:
    """(N,) int: the fold of each record; a group is in one fold, and folds have about as many records of each source.

    Raises:
        LabError: When there are fewer groups than folds.
    """
    sizes: dict[tuple[str, str], int] = defaultdict(int)
    for record in records:
        sizes[record.source, record.group] += 1
    if len({group for _, group in sizes}) < folds:
        raise LabError(f"{len(sizes)} groups do not make {folds} folds; lower --folds")
    fold_of: dict[str, int] = {}
    held: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(folds, int))
    total = np.zeros(folds, int)
    names = sorted(sizes)
    for place in np.random.default_rng(seed).permutation(len(names)):
        source, group = names[place]
        fold = fold_of.setdefault(group, int(np.lexsort((total, held[source]))[0]))
        held[source][fold] += sizes[source, group]
        total[fold] += sizes[source, group]
    return np.array([fold_of[record.group] for record in records])


def train(records: Sequence[Record], settings: Settings, fold: int, bar: tqdm) -> UNet:
    """A small MONAI U-Net, trained from scratch with DiceCE on every record's own mask; it reads no query."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed * settings.folds + fold)
        unet = UNet(2, 3, 1, channels=(16, 32, 64, 128), strides=(2, 2, 2), num_res_units=1, norm="batch")
    unet.to(memory_format=torch.channels_last)
    data = BoxPromptDataset(records, settings.size, settings.size, jitter=0.0, whole_image=1.0, strength=1.0)
    part = Part("the records", settings.batch_size, balance=0.5)
    sampler = MixtureSampler([(part, records)], settings.steps, settings.seed, lambda: 0)
    loss = DiceCELoss(sigmoid=True)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=settings.steps)
    for draws in sampler:
        batch = data[draws]
        seg_loss = loss(unet(normalise(batch["pixels"])), batch["target"][:, None])
        optimizer.zero_grad()
        seg_loss.backward()
        optimizer.step()
        schedule.step()
        bar.update()
        bar.set_postfix(fold=fold, loss=f"{seg_loss.item():.3f}")
    return unet.eval()


@torch.no_grad()
def score(unet: UNet, records: Sequence[Record], size: int) -> pd.DataFrame:
    """`id`, `source`, `split` and `error` of records; both masks empty is no error."""
    rows = []
    for record in tqdm(records, desc="scoring", unit="image", leave=False):
        sample = load_sample(record)
        logits = unet(normalise(model_pixels(sample.image, size)[None]))[:, 0]
        drawn = Frame(*sample.mask.shape, size).logits_to_original(logits)[0].numpy() > 0
        rows.append([record.id, record.source, record.split, round(1 - dice_iou(drawn, sample.mask)[0], 6)])
    return pd.DataFrame(rows, columns=["id", "source", "split", "error"])
