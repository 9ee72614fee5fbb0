"""What a run keeps: metrics that survive a resume, checkpoints, and a word on how to go on after an interruption."""

import json
import os
import signal
import sys
import threading
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import cv2
import lightning as L
import numpy as np
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException


class JsonlLogger(Logger):
    """Appends every logged set of metrics to a file: step, time (seconds since 1970) and the values.

    Lightning's CSVLogger starts its file anew when a run resumes; this one only drops what a resumed run does again.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    @property
    def name(self) -> str:
        return self.path.parent.name

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Kept in config_<stage>.yaml and in the checkpoints."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        metrics = {name: value for name, value in metrics.items() if name != "epoch"}  # one off after a resume
        line = json.dumps({"step": step, "time": round(time.time(), 2), **metrics})
        with self.path.open("a") as file:
            file.write(line + "\n")

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Drop lines of `step` and later, and a half-written last line: a run resumed there writes them again."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            if entry["step"] < step:
                kept.append(line + "\n")
        temporary = self.path.with_suffix(f".{os.getpid()}")
        temporary.write_text("".join(kept))
        temporary.replace(self.path)


class RunKeeper(L.Callback):
    """Rewinds the metrics at a resume, and saves `last.ckpt` when a run is interrupted.

    Ctrl-C and SIGUSR1, by which SLURM warns of a job's end, are turned into SIGTERM, which is heeded between two steps:
    what is saved then is a whole step, of however many accumulated batches, so that the resumed run equals an unbroken
    one. A second Ctrl-C stops at once and saves nothing. Of several processes any may be signalled: they agree before
    each step.
    """

    def __init__(self, folder: Path | str, resume_command: str) -> None:
        self.last, self.resume_command = Path(folder) / "checkpoints" / "last.ckpt", resume_command
        self.stopping = False

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        if threading.current_thread() is threading.main_thread():
            heeded = {signal.SIGINT: self._interrupt, signal.SIGUSR1: lambda *_: signal.raise_signal(signal.SIGTERM)}
            self.before = {number: signal.signal(number, handler) for number, handler in heeded.items()}

    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        if threading.current_thread() is threading.main_thread():
            for number, handler in self.before.items():
                signal.signal(number, handler)

    @rank_zero_only
    def _say(self, sentence: str) -> None:
        print(f"\n{sentence}", file=sys.stderr)

    def _interrupt(self, *_: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self._say("Stopping after this step; press Ctrl-C again to stop at once.")
        signal.raise_signal(signal.SIGTERM)

    def _stop(self, *_: Any) -> None:
        self.stopping = True

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        # Lightning's own handler would send a message from wherever the signal finds it, and stop within a step
        if trainer.world_size > 1 or trainer.accumulate_grad_batches > 1:
            signal.signal(signal.SIGTERM, self._stop)
        for logger in trainer.loggers:
            if isinstance(logger, JsonlLogger):
                logger.rewind(trainer.global_step)

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        begins = batch_idx % trainer.accumulate_grad_batches == 0
        if begins and trainer.strategy.reduce_boolean_decision(self.stopping, all=False):
            raise SIGTERMException
        # Lightning 2.6.6 counts one step too many in the logs after a resume from a checkpoint of an epoch's end
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, SIGTERMException) or trainer.state.fn != "fit":
            return  # after a bug, or in the middle of a step, the last regular checkpoint is the one to trust
        trainer.save_checkpoint(self.last)
        self._say(f"Stopped at step {trainer.global_step} and saved. Go on with: {self.resume_command}")


class PredictionFiles(L.Callback):
    """`core-seg predict` leaves `predictions/`: a mask PNG for each record, and a line about it."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder) / "predictions"

    def on_predict_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "predictions.jsonl").write_text("")

    def on_predict_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: dict, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        name = f"{batch_idx:06d}.png"
        cv2.imwrite(str(self.folder / name), outputs["mask"].astype(np.uint8) * 255)
        line = {key: value for key, value in outputs.items() if key != "mask"} | {"mask": name}
        with (self.folder / "predictions.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


class RunProgress(TQDMProgressBar):
    """Lightning's bar, with the minutes that are left of the whole run."""

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        super().on_train_start(trainer, module)
        self.start = time.monotonic(), trainer.global_step

    def get_metrics(self, trainer: L.Trainer, module: L.LightningModule) -> dict:
        metrics = super().get_metrics(trainer, module)
        metrics.pop("v_num", None)
        began, first = self.start
        done = trainer.global_step - first
        if done > 0 and trainer.max_steps > 0:
            minutes = (time.monotonic() - began) / done * (trainer.max_steps - trainer.global_step) / 60
            metrics["left"] = f"{minutes:.1f} min"
        return metrics


def checkpoints(folder: Path | str) -> list[ModelCheckpoint]:
    """`last.ckpt` after every epoch of `steps_per_epoch`, `best.ckpt` by validation mDice."""
    place = Path(folder) / "checkpoints"
    return [
        ModelCheckpoint(place, filename="last", save_on_train_epoch_end=True, enable_version_counter=False),
        ModelCheckpoint(place, filename="best", monitor="val/mDice", mode="max", enable_version_counter=False),
    ]
