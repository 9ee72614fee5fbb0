"""Every way in which a user's files or flags are wrong ends in one sentence that says what, where, and what to do.

The table is `CASES`: what is done, the command, and words of the sentence. Without it users would read tracebacks.
"""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from apps.cli import main
from lab.model.core_seg import CoreSeg
from lab.model.release import save_release
from tests.tiny_model import tiny_config

CONFIG = Path(__file__).parents[2] / "configs" / "tiny" / "segmenter.yaml"


def nothing() -> None:
    pass


def write(path: str, content: bytes | str):
    return lambda: Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())


def huge_png() -> None:
    Image.new("1", (20_000, 20_000)).save("x.png")


def cut_short() -> None:
    Path("x.png").write_bytes(Path("0.png").read_bytes()[:600])


def line(**changes):
    """Write a manifest whose second line has other fields; None deletes one."""

    def make() -> None:
        lines = [json.loads(text) for text in Path("manifest.jsonl").read_text().splitlines()]
        lines[1] = {name: value for name, value in (lines[1] | changes).items() if value is not None}
        Path("manifest.jsonl").write_text("".join(json.dumps(fields) + "\n" for fields in lines))

    return make


def empty_mask() -> None:
    mask = cv2.imread("0_mask.png", cv2.IMREAD_GRAYSCALE)
    cv2.imwrite("0_mask.png", np.zeros_like(mask))


def release_config(change):
    def make() -> None:
        path = Path("release/config.json")
        config = json.loads(path.read_text())
        change(config)
        path.write_text(json.dumps(config))

    return make


def pickled_checkpoint() -> None:
    torch.save({"state_dict": {}, "hyper_parameters": {"payload": Path("x")}}, "x.ckpt")


SEGMENT = "segment x.png --release release"
CHECK = "data check manifest.jsonl"
EVALUATE = "evaluate release --manifest manifest.jsonl"
PARTS = '--data.init_args.train=[{"manifest":"manifest.jsonl","per_batch":2}]'
FIT = f"fit -c {CONFIG} {PARTS} --data.init_args.val=manifest.jsonl"


CASES = {
    "no image": (nothing, SEGMENT, "'x.png'"),
    "empty image": (write("x.png", b""), SEGMENT, "0 bytes"),
    "text as image": (write("x.png", "hello"), SEGMENT, "not an image"),
    "html as image": (write("x.png", "<html><script>alert(1)</script>"), SEGMENT, "not an image"),
    "image cut short": (cut_short, SEGMENT, "damaged or cut short"),
    "400 megapixels": (huge_png, SEGMENT, "megapixels"),
    "no manifest": (nothing, "data check nowhere.jsonl", "check the path"),
    "empty manifest": (write("manifest.jsonl", ""), CHECK, "is empty"),
    "manifest of bytes": (write("manifest.jsonl", b"\xff\xfe\x00"), CHECK, "UTF-8"),
    "manifest not JSON": (write("manifest.jsonl", "{oops}\n"), CHECK, "line 1: not JSON"),
    "field missing": (line(mask=None), CHECK, "line 2: "),
    "size wrong": (line(width=9), CHECK, "9x"),
    "split unknown": (line(split="tset"), CHECK, "train, val or test"),
    "id twice": (line(id="made/0"), CHECK, "made/0"),
    "image gone": (line(image="gone.png"), CHECK, "gone.png"),
    "path leaves the folder": (line(image="../../etc/passwd"), CHECK, "folder"),
    "absolute path": (line(image="/etc/passwd"), CHECK, "folder"),
    "lesion without mask": (line(lesion="cyst"), EVALUATE, "'none' goes with 0"),
    "group on two sides": (line(group="made-0", split="test"), CHECK, "made-0"),
    "mask is empty after all": (empty_mask, CHECK, "line 1: lesion is 'benign cyst' but the mask is empty"),
    "nothing to swap": (nothing, f"{EVALUATE} --swapped", "no image is asked about twice"),
    "split without records": (nothing, f"{EVALUATE} --split=vla", "vla"),
    "no release": (nothing, "segment 0.png --release nowhere", "'nowhere' does not exist"),
    "release without weights": (lambda: Path("release/model.safetensors").unlink(), EVALUATE, "incomplete"),
    "release cut short": (write("release/model.safetensors", b"\x08\0\0\0\0\0\0\0{"), EVALUATE, "damaged"),
    "release of another": (release_config(lambda c: c.update(format="x")), EVALUATE, "not a release of this lab"),
    "release with a stranger's key": (
        release_config(lambda c: c["core_seg"].update(hook="os.system")),
        EVALUATE,
        "hook is not known",
    ),
    "release with wrong sizes": (
        release_config(lambda c: c["core_seg"]["adapter"].update(depth=1)),
        EVALUATE,
        "do not fit",
    ),
    "checkpoint with a pickle": (pickled_checkpoint, "release x.ckpt out", "read safely"),
    "gallery without pictures": (nothing, "release release out --gallery=.", "'.' has no worst.webp"),
    "not a checkpoint": (write("x.ckpt", "hello"), "release x.ckpt out", "x.ckpt"),
    "no config": (nothing, "fit -c nowhere.yaml", "nowhere.yaml"),
    "config not YAML": (write("c.yaml", "model: [\n"), "fit -c c.yaml", "line 2, column 1"),
    "unknown key": (nothing, f"{FIT} --model.init_args.learning_rat=1", "learning_rat"),
    "wrong type": (nothing, f"{FIT} --model.init_args.learning_rate=fast", "learning_rate"),
    "nothing to resume": (nothing, f"{FIT} --ckpt_path=last", "nothing to go on from"),
    "training manifest gone": (
        nothing,
        FIT.replace("manifest.jsonl", "gone.jsonl"),
        "gone.jsonl",
    ),
    "no start": (
        nothing,
        f"fit -c {CONFIG.with_name('grpo.yaml')} --model.init_args.start=nowhere",
        "'nowhere' does not exist",
    ),
    "no evaluation": (nothing, "compare nowhere elsewhere", "nowhere/cases.csv"),
    "no run": (nothing, "curves nowhere", "nowhere/metrics.jsonl"),
    "no such metric": (write("metrics.jsonl", '{"step": 0, "reward": 1}\n'), "curves . --metrics=rewrad", "rewrad"),
    "unknown command": (nothing, "fti", "no command 'fti'"),
    "unknown kind": (nothing, "data synthesize out --kind=hard", "'plain', 'reason', 'track'"),
    "unknown source": (nothing, "data leave-out manifest.jsonl nowhere", "no record is of source 'nowhere'"),
    "source is a path": (nothing, "data leave-out manifest.jsonl made --out=../a.jsonl", "not the name of a file"),
    "seed of the benchmark": (nothing, "data synthesize out --seed=1000", "kept for benchmarks"),
}


@pytest.fixture
def folder(tmp_path, manifest, monkeypatch):
    """An empty place with a valid manifest, and `release/`, a complete one of random weights."""
    monkeypatch.chdir(tmp_path)
    save_release(CoreSeg(tiny_config()), tmp_path / "release", "t", "nothing")
    return tmp_path


@pytest.mark.parametrize("name", CASES)
def test_bad_input_gets_one_sentence(name, folder, capsys):
    make, command, words = CASES[name]
    make()
    assert main(command.split()) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(("core-seg", "manifest.jsonl")) and words in said, said
    assert len(said) < 500 and "Traceback" not in said
