"""The manifests that a run trains and validates on, as Lightning data loaders."""

import signal
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from lab.data.dataset import RecordDataset
from lab.data.manifest import read_manifest
from lab.data.mixture import MixtureSampler, Part
from lab.data.packed import PackedRecords
from lab.data.sample import Record, Sample, evenly
from lab.errors import LabError


class Lesions(L.LightningDataModule):
    """Training batches mixed from several manifests; validation and test records one at a time.

    The module that is trained says what an item is: `module.training_data(records)` gives the dataset.

    Args:
        train: Manifests to train on and their share of a batch; see `Part`.
        val: Manifest to validate on.
        val_split: Its split.
        test: Manifest to test on; None takes `val`.
        test_split: Its split.
        val_limit: Validate on this many records, spread evenly over the manifest; 0 takes all.
        steps_per_epoch: Batches between two checkpoints; Lightning calls this an epoch.
        num_workers: Processes that load and augment.
        seed: Order of the records, and the augmentation of each draw.
    """

    def __init__(
        self,
        train: list[Part],
        val: str,
        val_split: str = "val",
        test: str | None = None,
        test_split: str = "test",
        val_limit: int = 0,
        steps_per_epoch: int = 100,
        num_workers: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.train, self.val, self.val_split = train, val, val_split
        self.test, self.test_split = test or val, test_split
        self.val_limit, self.steps_per_epoch = val_limit, steps_per_epoch
        self.num_workers, self.seed = num_workers, seed

    def train_dataloader(self) -> DataLoader:
        parts = [(part, split_of(part.manifest, part.split)) for part in self.train]
        dataset: Dataset = self.trainer.lightning_module.training_data(ConcatDataset([records for _, records in parts]))
        inner_steps = self.trainer.lightning_module.hparams.get("inner_steps", 1)  # of the optimiser, for each batch
        together = self.trainer.accumulate_grad_batches  # batches, for each step of the optimiser
        if self.steps_per_epoch % together:
            raise LabError(
                f"steps_per_epoch {self.steps_per_epoch} is not a multiple of trainer.accumulate_grad_batches "
                f"{together}; change one of them"
            )
        done = lambda: self.trainer.global_step * together // inner_steps  # noqa: E731
        rank, world = self.trainer.global_rank, self.trainer.world_size
        sampler = MixtureSampler(parts, self.steps_per_epoch, self.seed, done, rank, world)
        return self._loader(dataset, sampler=sampler)

    def val_records(self) -> Sequence[Record]:
        """What is validated on, by all processes together."""
        return evenly(split_of(self.val, self.val_split), self.val_limit)

    def val_dataloader(self) -> DataLoader:
        return self._loader(RecordDataset(self._share(self.val_records())))

    def test_dataloader(self) -> DataLoader:
        return self._loader(RecordDataset(self._share(split_of(self.test, self.test_split))))

    def predict_dataloader(self) -> DataLoader:
        if self.trainer.world_size > 1:
            raise LabError("core-seg predict numbers its files in one process; add --trainer.devices 1")
        return self.test_dataloader()

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Samples and lists of what belongs to an image stay as they are: the model moves the tensors that it needs."""
        of_lists = isinstance(batch, dict) and any(isinstance(value, list) for value in batch.values())
        if isinstance(batch, Sample) or of_lists:
            return batch
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def _share(self, records: Sequence[Record]) -> Sequence[Record]:
        """Of records that are scored one at a time, those of this process; the numbers may differ by one."""
        rank, world = self.trainer.global_rank, self.trainer.world_size
        if len(records) < world:
            raise LabError(f"{len(records)} records cannot be scored by {world} processes; take fewer processes")
        return records[rank::world]

    def _loader(self, dataset: Dataset, **kwargs) -> DataLoader:
        workers = {"num_workers": self.num_workers, "persistent_workers": self.num_workers > 0}
        return DataLoader(dataset, batch_size=None, worker_init_fn=leave_signals, **workers, **kwargs)


def leave_signals(worker: int) -> None:
    """Signals reach all processes of a job; the one that trains heeds them, while those that load go on for it."""
    for heeded in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(heeded, signal.SIG_IGN)


def split_of(manifest: str, split: str) -> Sequence[Record]:
    """The records of one split.

    Raises:
        LabError: When it has none.
    """
    records = read_manifest(manifest)
    packed = isinstance(records, PackedRecords)
    records = records.of_split(split) if packed else [record for record in records if record.split == split]
    if not len(records):
        raise LabError(f"{manifest}: no record has split '{split}'; name another split or another manifest")
    return records
