"""`core-seg fit`: what a run leaves, and that stopping one costs nothing."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from apps.cli import main
from apps.training import default_name, defaults, resume_command
from lab.model.segmenter import SegmenterConfig
from modules.segmenter import SegmenterModule
from tests.apps.tiny import Tiny

ROOT = Path(__file__).parents[2]
STEPS = 25


@pytest.fixture
def flags(tmp_path, manifest) -> list[str]:
    """Arguments that train `Tiny` for 25 steps in epochs of 10, in an empty folder."""
    os.chdir(tmp_path)
    part = json.dumps([{"manifest": str(manifest), "per_batch": 2}])
    return [
        "--model=tests.apps.tiny.Tiny",
        "--data=modules.data.Lesions",
        f"--data.train={part}",
        f"--data.val={manifest}",
        "--data.steps_per_epoch=10",
        "--data.num_workers=1",
        f"--trainer.max_steps={STEPS}",
        "--trainer.accelerator=cpu",
        "--trainer.log_every_n_steps=1",
    ]


def losses(folder: Path) -> list[tuple[int, float]]:
    """(step, training loss) of every line that has one, in the order of the file."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["train/loss"]) for line in lines if "train/loss" in line]


def start(flags: list[str]) -> subprocess.Popen:
    """core-seg in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lab", *flags]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def wait_until(condition: Callable[[], bool], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_run_leaves_what_everything_else_reads(flags, tmp_path, capsys):
    """A run could not be inspected, resumed or shared."""
    assert main(["fit", *flags, "--name=a"]) == 0
    run = tmp_path / "runs" / "a"
    assert "max_steps: 25" in (run / "config_fit.yaml").read_text()
    assert [step for step, _ in losses(run)] == list(range(STEPS))
    assert list((run / "tensorboard").glob("events*"))
    for name in ("last", "best"):
        checkpoint = torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)
        assert checkpoint["hyper_parameters"]["learning_rate"] == 0.05
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == STEPS

    assert main(["test", *flags, "--name=a", "--ckpt_path=best"]) == 0
    assert "max_steps: 25" in (run / "config_fit.yaml").read_text() and (run / "config_test.yaml").is_file()

    # other ways to go on from here, none of which may pass silently
    assert main(["fit", *flags, "--name=a"]) == 2
    assert "already has a checkpoint; resume it with --ckpt_path last" in capsys.readouterr().err
    assert main(["fit", *flags, "--name=a", "--ckpt_path=last", "--model.learning_rate=0.5"]) == 2
    assert "learning_rate is 0.5 here and 0.05 in the checkpoint" in capsys.readouterr().err
    assert main(["fit", *flags, "--name=b", "--ckpt_path=last"]) == 2
    assert "'runs/b/checkpoints/last.ckpt' does not exist" in capsys.readouterr().err
    assert main(["validate", *flags, "--name=a"]) == 2
    assert "needs a trained model; add --ckpt_path" in capsys.readouterr().err


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL])
def test_a_stopped_run_goes_on_as_if_it_had_not_been_stopped(flags, tmp_path, how):
    """Ctrl-C, a cluster's SIGTERM or a crash would lose work, or make a run that no one can reproduce."""
    runs = tmp_path / "runs"
    assert main(["fit", *flags, "--name=whole"]) == 0
    process = start(["fit", *flags, "--name=cut", "--model.seconds=0.05"])
    metrics = runs / "cut" / "metrics.jsonl"
    wait_until(lambda: metrics.is_file() and '"step": 13,' in metrics.read_text())
    process.send_signal(how)
    _, printed = process.communicate(timeout=60)
    saved = torch.load(runs / "cut" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    if how == signal.SIGKILL:
        assert saved == 10  # the end of the first epoch
    else:
        assert process.returncode == 130 and saved >= 13
        assert f"Stopped at step {saved} and saved. Go on with: core-seg fit" in printed
    assert not re.search("Warning|Tip:|deprecated|not recommended", printed)  # nothing that no reader can mend

    assert main(["fit", *flags, "--name=cut", "--model.seconds=0.05", "--ckpt_path=last"]) == 0
    whole, cut = losses(runs / "whole"), losses(runs / "cut")
    assert [step for step, _ in cut] == list(range(STEPS))
    assert [round(loss, 6) for _, loss in cut] == [round(loss, 6) for _, loss in whole]
    ends = [torch.load(runs / name / "checkpoints" / "last.ckpt", weights_only=True) for name in ("whole", "cut")]
    assert ends[0]["global_step"] == ends[1]["global_step"] == STEPS
    assert all(torch.equal(ends[0]["state_dict"][name], ends[1]["state_dict"][name]) for name in ends[0]["state_dict"])


def test_a_stop_waits_for_all_batches_of_a_step(flags, tmp_path, monkeypatch):
    """The gradients of half a step would be lost, and every step after it made of other batches."""
    flags += ["--trainer.accumulate_grad_batches=2", "--trainer.max_steps=8"]
    assert main(["fit", *flags, "--name=whole"]) == 0
    step = Tiny.training_step

    def told(module, batch, batch_idx):
        if batch_idx == 4:
            signal.raise_signal(signal.SIGTERM)
        return step(module, batch, batch_idx)

    with monkeypatch.context() as changed:
        changed.setattr(Tiny, "training_step", told)
        assert main(["fit", *flags, "--name=cut"]) == 130
    assert main(["fit", *flags, "--name=cut", "--ckpt_path=last"]) == 0
    whole, cut = losses(tmp_path / "runs" / "whole"), losses(tmp_path / "runs" / "cut")
    assert whole == cut and len(whole) == 8


def test_the_sentence_after_an_interruption_can_be_pasted():
    """The command it names would resume from somewhere else, or break in the shell."""
    typed = ["fit", "-c", "my configs/sft.yaml", "--ckpt_path", "last", '--data.train=[{"a": 1}]', "--ckpt_path=x.ckpt"]
    expected = "core-seg fit -c 'my configs/sft.yaml' '--data.train=[{\"a\": 1}]' --ckpt_path last"
    assert resume_command(typed) == expected


def test_a_run_is_named_after_its_configuration():
    assert default_name(["configs/tiny/sft.yaml"]) == "tiny-sft"
    assert default_name(None) == "run"


def test_a_checkpoint_from_before_a_setting_existed_goes_on(flags, tmp_path, capsys):
    """An update of the lab would make every run of before unusable; a flag that disagrees is still an error."""
    assert main(["fit", *flags, "--name=old", "--trainer.max_steps=10"]) == 0
    path = tmp_path / "runs" / "old" / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["hyper_parameters"]["learning_rate"]  # whose default is 0.05
    torch.save(checkpoint, path)
    assert main(["fit", *flags, "--name=old", "--ckpt_path=last", "--model.learning_rate=0.5"]) == 2
    assert "learning_rate is 0.5 here and 0.05 in the checkpoint" in capsys.readouterr().err
    assert main(["fit", *flags, "--name=old", "--ckpt_path=last"]) == 0


def test_settings_of_the_model_count_as_their_defaults_too():
    """As `core_seg.corroborate`, which checkpoints of before do not have."""
    model = SegmenterModule(SegmenterConfig(image_size=64, embed_dim=32, weights="random"))
    known = defaults(model)
    assert known["segmenter.embed_dim"] == 128 and known["box_jitter"] == 0.1
