"""One lab for all of its tests: releases of random weights, two GRPO runs of three steps, and their evaluations."""

import shutil

import pytest
import torch
from playwright.sync_api import sync_playwright

from apps.cli import main
from apps.lab.library import Library
from apps.lab.page import launch
from lab.data.reason import write_reason
from lab.model.core_seg import CoreSeg
from lab.model.release import save_release
from tests.modules.test_grpo import flags
from tests.tiny_model import tiny_config

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """Address of a lab over two releases of random weights and two GRPO runs of 3 steps, and the folder of the runs."""
    folder = tmp_path_factory.mktemp("lab")
    manifest = write_reason(folder / "data", 8, seed=9, fractions=(0.75, 0.25, 0.0), size=64)
    for seed, name in enumerate(("tiny-sft", "tiny-grpo")):
        torch.manual_seed(seed)
        save_release(CoreSeg(tiny_config()), folder / "releases" / name, name, "nothing")
    patch = pytest.MonkeyPatch()
    patch.chdir(folder)
    for seed in (0, 1):
        more = [f"--model.init_args.seed={seed}"]
        assert main(flags(manifest, folder / "releases" / "tiny-sft", f"run-{seed}", *more, steps=3)) == 0
        release = folder / "releases" / ("tiny-sft", "tiny-grpo")[seed]
        evaluation = ["evaluate", str(release), f"--manifest={manifest}", "--split=train", f"--out=out/{release.name}"]
        assert main(evaluation) == 0
    patch.undo()
    library = Library(folder / "releases", folder / "runs", manifest, [folder / "out"])
    return launch(library, 0, block=False), folder


@pytest.fixture(scope="module")  # not longer: while it runs, no other test can start an event loop
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def public(lab):
    """Address of a lab for strangers over the same releases."""
    return launch(Library(lab[1] / "releases"), 0, public=True, block=False)
