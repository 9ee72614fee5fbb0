"""The command line. Nothing heavy is imported before the command that needs it is known."""

import os
import re
import sys
from argparse import ArgumentError
from collections.abc import Callable

from lab.errors import LabError

HELP = """\
core-seg: models that reason before they segment. Research use only, not a medical device.

  core-seg fit -c configs/tiny/segmenter.yaml        train; also validate, test, predict (Lightning's commands)
  core-seg fit -c configs/tiny/sft.yaml --ckpt_path last        go on where a run stopped
  core-seg estimate -c configs/paper/grpo.yaml --gpus 8x80GB     memory and time, before there is a GPU
  core-seg release runs/tiny-sft/checkpoints/best.ckpt releases/mine        what can be shared: safetensors
  core-seg merge releases/mine releases/merged       LoRA becomes part of the weights
  core-seg push releases/mine owner/name --dry_run true        to the Hugging Face hub
  core-seg segment scan.png --query "Locate and segment the polyp." --release releases/mine --out out/
  core-seg evaluate releases/mine --manifest manifest.jsonl --split test --out out/
  core-seg evaluate runs/tiny-segmenter/checkpoints/best.ckpt --manifest manifest.jsonl --split test --out out/
  core-seg compare out/sft out/grpo-0 out/grpo-1     image by image, with intervals
  core-seg curves runs/grpo-0 runs/grpo-1 --out curves.png      reward curves of runs
  core-seg data synthesize data/synthetic --n 1500        synthetic lesions; --kind reason: a query picks one
  core-seg data convert busi Dataset_BUSI_with_GT data/busi      a public set as it was unpacked
  core-seg data reason manifest.jsonl                reasoning for every record, from facts or by a model (--endpoint)
  core-seg data hard data/fresh/manifest.jsonl out/fresh        keep what a model finds hard
  core-seg data leave-out manifest.jsonl busi        train without a source, test on it alone
  core-seg data check manifest.jsonl                 all that is wrong with a data set, and what to do about it
  core-seg data stats manifest.jsonl card/           how it is distributed: a figure and a dataset card
  core-seg data pack manifest.jsonl packed/          a Parquet index and tar shards, for a million records
  core-seg data filter manifest.jsonl out/filter     keep what is hard for a U-Net that has not seen it
  core-seg data sheet sheet.png                      a contact sheet of the synthetic lesions
  core-seg app                                       the lab: releases/ and runs/ side by side, rewards, rollouts
  core-seg space out/space                           the folder to push to a Space on Hugging Face
  core-seg demo                                      all of it on a CPU in about 12 minutes

Each command takes --help.
"""
TRAINING = ("fit", "validate", "test", "predict")


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Returns:
        0 when it went well, 2 when the user can mend what was wrong (one sentence on stderr), 130 after Ctrl-C.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    os.environ.setdefault("HF_HUB_OFFLINE", "0" if arguments[:1] == ["push"] else "1")
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0
    run = command(arguments)
    if run is None:
        print(f"core-seg: no command '{' '.join(arguments[:2])}'; see core-seg --help", file=sys.stderr)
        return 2
    try:
        run()
    except KeyboardInterrupt:
        return 130
    except (LabError, OSError) as error:
        print(f"core-seg: {error}", file=sys.stderr)
        return 2
    except ArgumentError as error:
        words = " ".join(arguments[: 2 if arguments[0] == "data" else 1])
        print(f"core-seg {words}: {sentence(error)}; see core-seg {words} --help", file=sys.stderr)
        return 2
    return 0


def command(arguments: list[str]) -> Callable[[], None] | None:
    """What to call for these arguments; None for an unknown command."""
    if arguments[0] in TRAINING:
        from apps.training import run_training

        return lambda: run_training(arguments)
    if arguments[0] == "estimate":
        from apps.estimate import run_estimate

        return lambda: run_estimate(arguments[1:])
    from apps import commands

    return commands.find(arguments)


def sentence(error: ArgumentError) -> str:
    """What jsonargparse says over many lines, in one and without its types."""
    text = " ".join(str(error).split())
    text = re.sub(r"Does not validate against any of the Union subtypes Subtypes: \[.*?\] Errors: - ", "", text)
    text = re.sub(r" - Expected a <class 'NoneType'>.*", "", text)
    return re.sub(r"<class '([\w.]+)'>", r"\1", re.sub(r'Parser key "([^"]*)":', r"\1:", text))
