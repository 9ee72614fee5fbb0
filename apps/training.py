"""`core-seg fit | validate | test | predict`: LightningCLI, with a run folder that everything else reads."""

import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger

from lab.errors import LabError
from modules.callbacks import JsonlLogger, RunKeeper, RunProgress, checkpoints

PLACES = {"cache", "segmenter_checkpoint"}
"""Hyper-parameters that say where something lies; they may change between a run and its resumption."""


class LabCLI(LightningCLI):
    """LightningCLI whose run lives in `runs/NAME/` and resumes there."""

    folder: Path

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--name", type=str, default="", help="Folder of the run under runs/; default: of the config."
        )

    def _parse_ckpt_path(self) -> None:
        """Lightning would let a checkpoint's hyper-parameters silently beat the flags; see `check_hyperparameters`."""

    def before_instantiate_classes(self) -> None:
        self.folder = Path("runs") / self.config[self.subcommand]["name"]

    def instantiate_trainer(self, **kwargs) -> L.Trainer:
        again = f"core-seg {' '.join(a for a in sys.argv[1:] if a != 'last' and not a.startswith('--ckpt_path'))}"
        callbacks = [RunKeeper(self.folder, f"{again} --ckpt_path last"), RunProgress(), *checkpoints(self.folder)]
        given = self._get(self.config_init, "trainer", default={}).get("callbacks") or []
        logger = [JsonlLogger(self.folder), TensorBoardLogger(self.folder, name="", version="tensorboard")]
        return super().instantiate_trainer(logger=logger, callbacks=[*given, *callbacks], **kwargs)

    def before_fit(self) -> None:
        path = self.config.fit.ckpt_path
        if path:
            check_hyperparameters(self.model, Path(path))
        elif (self.folder / "checkpoints" / "last.ckpt").exists():
            raise LabError(
                f"run '{self.folder}' already has a checkpoint; resume it with --ckpt_path last, or give another --name"
            )


def check_hyperparameters(model: L.LightningModule, path: Path) -> None:
    """Refuse to resume with other hyper-parameters than the checkpoint's, which would be followed in part only.

    Raises:
        LabError: Naming each hyper-parameter with both values.
    """
    saved = flat(torch.load(path, weights_only=True, map_location="cpu").get("hyper_parameters", {}))
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
    """
    subcommand, *rest = arguments
    name = option(rest, "--name") or default_name(option(rest, "-c") or option(rest, "--config"))
    last = Path("runs") / name / "checkpoints" / "last.ckpt"
    if option(rest, "--ckpt_path") == "last" and not last.is_file():
        raise LabError(f"nothing to resume: '{last}' does not exist; leave out --ckpt_path to start")
    rest = [f"--ckpt_path={last}" if a == "--ckpt_path=last" else a for a in rest]
    rest = [str(last) if a == "last" and b == "--ckpt_path" else a for b, a in zip(["", *rest], rest)]
    path = option(rest, "--ckpt_path")
    if path and not Path(path).is_file():
        raise LabError(f"checkpoint '{path}' does not exist; check --ckpt_path")
    if not ({"-h", "--help", "--print_config"} & {a.split("=")[0] for a in rest}):
        rest += [f"--name={name}", "--weights_only=true"]
    LabCLI(
        args=[subcommand, *rest],
        subclass_mode_model=True,
        subclass_mode_data=True,
        model_class=L.LightningModule,
        datamodule_class=L.LightningDataModule,
        save_config_callback=SaveConfigCallback,
        save_config_kwargs={"config_filename": f"config_{subcommand}.yaml", "overwrite": True},
        trainer_defaults={"use_distributed_sampler": False, "num_sanity_val_steps": 0, "max_epochs": -1},
        seed_everything_default=0,
    )


def option(arguments: list[str], name: str) -> str:
    """The last value given to an option as `--name value` or `--name=value`; empty when it is not given."""
    value = ""
    for place, argument in enumerate(arguments):
        if argument == name and place + 1 < len(arguments):
            value = arguments[place + 1]
        elif argument.startswith(f"{name}="):
            value = argument.partition("=")[2]
    return value


def default_name(config: str) -> str:
    """configs/tiny/sft.yaml gives tiny-sft."""
    path = Path(config)
    return "-".join(part for part in (path.parent.name, path.stem) if part) or "run"
