"""`core-seg fit | validate | test | predict`: LightningCLI, with a run folder that everything else reads."""

import inspect
import logging
import shlex
import warnings
from dataclasses import asdict
from pathlib import Path

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lab.baselines.unet import UNetConfig
from lab.errors import LabError
from lab.memory import keep_freed_memory
from lab.model.core_seg import CoreSegConfig
from lab.model.release import read_checkpoint
from lab.model.segmenter import SegmenterConfig
from modules.callbacks import JsonlLogger, PredictionFiles, RunKeeper, RunProgress, checkpoints
from modules.groups import Rewards
from modules.parallel import rank
from modules.strategies import check_strategy, register

CONFIGURATIONS = {"core_seg": CoreSegConfig, "segmenter": SegmenterConfig, "unet": UNetConfig, "rewards": Rewards}
"""Hyper-parameters that are dataclasses of their own."""
PLACES = {"cache", "encoder", "language_checkpoint", "segmenter_checkpoint", "start"}
"""Hyper-parameters that say where something lies; they may change between a run and its resumption."""


class LabCLI(LightningCLI):
    """LightningCLI whose run lives in `runs/NAME/` and resumes there."""

    folder: Path
    typed: list[str]

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--name", type=str, default="", help="Folder of the run under runs/; default: of the config."
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: list[str]) -> None:
        self.typed = args
        self.config = parser.parse_args(args)  # Lightning's own warns of arguments that are given, as ours always are
        self.any_seed = isinstance(self.config[self.config.subcommand].seed_everything, bool)  # Lightning picks one

    def _parse_ckpt_path(self) -> None:
        """Lightning would let a checkpoint's hyper-parameters silently beat the flags; see `check_hyperparameters`."""

    def before_instantiate_classes(self) -> None:
        settings = self.config[self.subcommand]
        settings.name = settings.name or default_name(settings.config)
        self.folder = Path("runs") / settings.name
        settings.weights_only = True
        check_strategy(settings.trainer.strategy)
        if path := settings.ckpt_path:
            path = self.folder / "checkpoints" / f"{path}.ckpt" if path in ("last", "best") else Path(path)
            if not path.is_file():
                raise LabError(f"nothing to go on from: '{path}' does not exist; check --ckpt_path and --name")
            settings.ckpt_path = str(path)
        elif self.subcommand != "fit":
            raise LabError(f"core-seg {self.subcommand} needs a trained model; add --ckpt_path best, last or a path")
        elif (self.folder / "checkpoints" / "last.ckpt").exists():
            raise LabError(
                f"run '{self.folder}' already has a checkpoint; resume it with --ckpt_path last, or give another --name"
            )

    def instantiate_trainer(self, **kwargs) -> L.Trainer:
        callbacks = [RunKeeper(self.folder, resume_command(self.typed)), RunProgress(), PredictionFiles(self.folder)]
        callbacks += checkpoints(self.folder)
        given = self._get(self.config_init, "trainer", default={}).get("callbacks") or []
        if self.subcommand == "fit":
            tensorboard = TensorBoardLogger(self.folder, name="", version="tensorboard")
            logger = [JsonlLogger(self.folder / "metrics.jsonl"), tensorboard]
        else:  # all that it logs is of step 0, and no point of the run's curves
            logger = [JsonlLogger(self.folder / f"metrics_{self.subcommand}.jsonl")]
        trainer = super().instantiate_trainer(logger=logger, callbacks=[*given, *callbacks], **kwargs)
        if self.subcommand == "fit" and trainer.world_size > 1 and self.any_seed:
            raise LabError("several processes need one seed to start from one model; give --seed_everything a number")
        return trainer

    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        if path := self.config[self.subcommand].ckpt_path:
            check_hyperparameters(self.model, Path(path))


def check_hyperparameters(model: L.LightningModule, path: Path) -> None:
    """Refuse to go on with other hyper-parameters than the checkpoint's, which would be followed in part only.

    One that the checkpoint does not have yet counts as its default: so the run did before there was a choice.

    Raises:
        LabError: Naming each hyper-parameter with both values; or for a file that is not a checkpoint of ours.
    """
    saved = defaults(model) | flat(read_checkpoint(path)["hyper_parameters"])
    here = flat(dict(model.hparams))
    differing = [
        f"{name} is {here.get(name)} here and {saved.get(name)} in the checkpoint"
        for name in sorted(saved.keys() | here.keys())
        if saved.get(name) != here.get(name) and name not in PLACES
    ]
    if differing:
        raise LabError(
            f"cannot resume '{path}': {'; '.join(differing)}; drop the flag or start a run with another --name"
        )


def defaults(model: L.LightningModule) -> dict:
    """Values of the hyper-parameters that have one when nobody sets them, names as in `flat`."""
    parameters = inspect.signature(type(model).__init__).parameters.values()
    known = {parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty}
    return known | flat({name: asdict(kind()) for name, kind in CONFIGURATIONS.items() if name in model.hparams})


def flat(tree: dict, prefix: str = "") -> dict:
    """Nested dictionaries as one, keys joined by dots."""
    items: dict = {}
    for name, value in tree.items():
        items |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return items


def run_training(arguments: list[str]) -> None:
    """Run a LightningCLI subcommand.

    Args:
        arguments: As typed after `core-seg`.

    Raises:
        ArgumentError: For flags and configurations that do not parse.
        LabError: For what else a user can mend.
        KeyboardInterrupt: After an interruption that has been seen to.
    """
    subcommand = arguments[0]
    keep_freed_memory()
    register()
    warnings.filterwarnings("ignore", message=".*LeafSpec")  # Lightning's, of its own code
    told = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    told.addFilter(lambda record: "Tip: For" not in record.getMessage())  # advertisements
    try:
        LabCLI(
            args=arguments,
            subclass_mode_model=True,
            subclass_mode_data=True,
            model_class=L.LightningModule,
            datamodule_class=L.LightningDataModule,
            save_config_callback=SaveConfigCallback,
            save_config_kwargs={"config_filename": f"config_{subcommand}.yaml", "overwrite": True},
            trainer_defaults={"use_distributed_sampler": False, "num_sanity_val_steps": 0, "max_epochs": -1},
            parser_kwargs={"prog": "core-seg", "exit_on_error": False, subcommand: {"exit_on_error": False}},
            seed_everything_default=0,
        )
    except MisconfigurationException as error:
        raise LabError(f"{' '.join(str(error).split())}; change the configuration") from None
    except SIGTERMException:
        if rank() > 0:
            return  # the first process says so
        raise KeyboardInterrupt from None
    except RuntimeError as error:
        if not lost_process(error):
            raise
        raise LabError(
            "another process of this run has died (its own message is above, or it was killed); the run has ended. "
            f"Go on from the last checkpoint with: {resume_command(arguments)}"
        ) from None
    except ValueError as error:
        if behind := lab_error(error):
            raise behind from None
        raise


def lost_process(error: RuntimeError) -> bool:
    """Whether what failed is a message to or from another process, by the words of gloo and NCCL."""
    words = ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL", "Broken pipe")
    return isinstance(error, torch.distributed.DistError) or any(word in str(error) for word in words)


def lab_error(error: BaseException | None) -> LabError | None:
    """The LabError that a module raised while jsonargparse built it, which comes out wrapped in errors of its own."""
    while error and not isinstance(error, LabError):
        error = error.__cause__ or error.__context__
    return error


def resume_command(typed: list[str]) -> str:
    """What to type to go on with a run that was started with these arguments."""
    kept = [
        word
        for before, word in zip(["", *typed], typed)
        if before != "--ckpt_path" and word.partition("=")[0] != "--ckpt_path"
    ]
    return f"core-seg {shlex.join(kept)} --ckpt_path last"


def default_name(configs: list | None) -> str:
    """configs/tiny/sft.yaml gives tiny-sft."""
    path = Path(str(configs[-1])) if configs else Path("run")
    return "-".join(part for part in (path.parent.name, path.stem) if part)
