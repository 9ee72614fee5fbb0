"""Without these a run on several processes could hang for ever, lose its work at a signal, or not cross a network."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.modules.ranks import TWO, Ranks

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture
def flags(tmp_path, manifest, monkeypatch) -> list[str]:
    """Arguments that train `Tiny` on two processes for 60 steps of 0.05 s, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    part = json.dumps([{"manifest": str(manifest), "per_batch": 2}])
    return [
        *("fit", "--name=run", "--model=tests.apps.tiny.Tiny", "--data=modules.data.Lesions", "--model.seconds=0.05"),
        *(f"--data.train={part}", f"--data.val={manifest}", "--data.steps_per_epoch=20", "--data.num_workers=1"),
        *("--trainer.max_steps=60", "--trainer.log_every_n_steps=1", "--trainer.strategy=ddp", *TWO),
    ]


def reached(step: int, seconds: float = 120) -> None:
    """Wait until the metrics of a step are written."""
    written, end = Path("runs/run/metrics.jsonl"), time.monotonic() + seconds
    while not (written.is_file() and f'"step": {step},' in written.read_text()):
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize("told", [[0], [1], [0, 1]])
def test_a_signal_to_any_process_stops_both_between_two_steps(flags, number, told):
    """SLURM tells all, a user one, torchrun its children: each must save once and say how to go on."""
    ranks = Ranks(flags)
    reached(23)
    for rank in told:
        os.kill(ranks.processes[rank].pid, number)
    codes, printed = ranks.wait()
    assert codes == [130, 0], "\n".join(printed)
    saved = torch.load("runs/run/checkpoints/last.ckpt", weights_only=True)["global_step"]
    assert 23 < saved < 60
    assert f"Stopped at step {saved} and saved. Go on with: core-seg fit" in printed[0]
    assert "Stopped at" not in printed[1]


@pytest.mark.parametrize("dies", [0, 1])
def test_a_process_that_dies_ends_the_run(flags, dies):
    ranks = Ranks(flags)
    reached(3)
    ranks.processes[dies].kill()
    codes, printed = ranks.wait(60)
    assert codes[dies] == -signal.SIGKILL and codes[1 - dies] == 2, "\n".join(printed)
    assert "another process of this run has died" in printed[1 - dies]
    assert "Traceback" not in printed[1 - dies]


def test_one_command_starts_two_processes_and_ends_when_one_dies(flags):
    """As a user types it; Lightning starts the second process."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "lab", *flags, "--trainer.max_steps=2000"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    reached(3, 300)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    second = [c for c in children if b"lab.__main__" in Path(f"/proc/{c}/cmdline").read_bytes()]
    assert len(second) == 1
    os.kill(int(second[0]), signal.SIGKILL)
    _, printed = process.communicate(timeout=60)
    ours, lightnings = "another process of this run has died", "Child process with PID"  # who notices first, says so
    assert process.returncode in (2, -signal.SIGKILL) and (ours in printed or lightnings in printed), printed


def why_not_two_nodes() -> str | None:
    """What keeps this machine from making network namespaces; None if nothing does."""
    try:
        made = subprocess.run(["ip", "netns", "add", "core-seg-try"], capture_output=True, text=True)
    except FileNotFoundError:
        return "the program ip is not installed"
    if made.returncode:
        return f"ip netns add: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", "core-seg-try"])
    return None


@pytest.mark.skipif(bool(why_not_two_nodes()), reason=f"no network namespaces here: {why_not_two_nodes()}")
def test_two_nodes_train_over_a_network(manifest, tmp_path):
    """torchrun on each of two network namespaces; `docs/results/two_nodes.txt` is what it printed."""
    script = [str(ROOT / "tests" / "two_nodes.sh"), str(manifest), str(tmp_path / "out")]
    ran = subprocess.run(script, capture_output=True, text=True, env=os.environ | {"PYTHON": sys.executable})
    assert ran.returncode == 0, ran.stdout + ran.stderr
    lines = [json.loads(line) for line in Path(tmp_path / "out/runs/two-nodes/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/seg_loss" in line] == [0, 1, 2, 3]
