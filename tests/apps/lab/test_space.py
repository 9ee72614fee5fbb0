"""Without these a Space would be pushed that does not start, or that shows what should have stayed at home."""

import multiprocessing
import os
import pickle
import re
import runpy
import subprocess
import sys
import sysconfig
import time
import tomllib
import urllib.request
from importlib.metadata import distribution, distributions, requires
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from apps.cli import main
from apps.lab.asking import Asker
from apps.lab.library import Library
from lab.model.core_seg import CoreSeg
from lab.model.decoding import Sampling
from lab.model.release import save_release
from tests.apps.lab.conftest import CHROMIUM
from tests.tiny_model import tiny_config

ROOT = Path(__file__).parents[3]
TEXT = "<think> A cyst. </think><answer>The cyst are located at [[5,5,60,60]]. The mask is <seg>.</answer>"
BUILD = """
import sys
sys.path[:0] = {paths}
from pathlib import Path
from apps.lab.library import Library
from apps.lab.page import build
build(Library(Path({folder!r}) / "releases"), public=True)
print("BUILT", *sys.modules, *(module.__file__ for name, module in sys.modules.items() if name.startswith("lab")))
"""


@pytest.fixture(scope="module")
def releases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("releases")
    save_release(CoreSeg(tiny_config()), folder / "tiny-sft", "t", "nothing")
    (folder / "tiny-sft" / "patient.png").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def space(releases, tmp_path_factory):
    folder = tmp_path_factory.mktemp("space") / "out"
    assert main(["space", str(folder), "--releases", str(releases)]) == 0
    return folder


def pins(path):
    """Name to requirement."""
    lines = [line.partition("#")[0].strip() for line in path.read_text().splitlines()]
    return {canonicalize_name(Requirement(line).name): line for line in lines if line}


def with_dependencies(names):
    """Packages with all that they need and that is installed, by name."""
    found, new = set(), {canonicalize_name(name) for name in names}
    while new:
        found |= new
        needed = [Requirement(line) for name in new for line in requires(name) or ()]
        needed = {canonicalize_name(r.name) for r in needed if not r.marker or r.marker.evaluate({"extra": ""})}
        new = (needed - found) & INSTALLED
    return found


INSTALLED = {canonicalize_name(each.name) for each in distributions()}


@pytest.fixture
def environment(space, tmp_path):
    """A folder of installed packages that holds those of the Space's requirements and no others."""
    folder, site = tmp_path / "site", Path(sysconfig.get_paths()["purelib"])
    folder.mkdir()
    for name in with_dependencies(pins(space / "requirements.txt")):
        for top in {file.parts[0] for file in distribution(name).files} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(site / top)
    return folder


def test_the_page_is_built_from_the_folder_and_its_requirements_alone(space, environment):
    code = BUILD.format(paths=[str(space), str(environment)], folder=str(space))
    run = [sys.executable, "-I", "-S", "-B", "-W", "ignore", "-c", code]  # -S: no link to this checkout
    result = subprocess.run(run, capture_output=True, text=True, timeout=300, cwd=space.parent)
    assert "BUILT" in result.stdout, result.stderr
    loaded = result.stdout.split()
    assert not [
        word for word in loaded if word.partition(".")[0] in ("lightning", "pytest")
    ]  # _utilities: torchmetrics
    assert not [word for word in loaded if word.startswith(str(ROOT / "lab"))]


def test_pins_and_front_matter_are_those_of_the_lab(space):
    theirs, ours = pins(space / "requirements.txt"), pins(ROOT / "requirements.txt")
    assert theirs and all(ours.get(name) == line for name, line in theirs.items())
    front = yaml.safe_load((space / "README.md").read_text().split("---\n")[1])
    assert front["sdk"] == "gradio" and f"gradio=={front['sdk_version']}" == theirs["gradio"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert isinstance(front["python_version"], str)
    assert SpecifierSet(project["requires-python"]).contains(front["python_version"])
    assert (space / front["app_file"]).is_file() and len(front["short_description"]) <= 60  # the hub's limit
    assert "Not a medical device" in (space / "README.md").read_text()


def test_nothing_goes_along_that_should_stay_at_home(space, tmp_path):
    files = [path for path in space.rglob("*") if path.is_file()]
    assert {path.relative_to(space).parts[0] for path in files} == {
        *("app.py", "README.md", "requirements.txt", ".gitattributes", "apps", "lab", "releases")
    }
    assert not list(space.rglob("patient.png"))
    code = [path for path in files if "releases" not in path.parts]
    assert {path.suffix for path in code if path.name != ".gitattributes"} <= {
        *(".py", ".md", ".txt", ".json", ".css", ".js")
    }
    assert sum(path.stat().st_size for path in code) < 1_000_000
    secret = re.compile(rb"hf_[A-Za-z0-9]{20}|ghp_\w{20}|AKIA[0-9A-Z]{16}|PRIVATE KEY|/home/|/root/|/work/")
    assert not [path for path in files if path.suffix != ".safetensors" and secret.search(path.read_bytes())]
    large = [path for path in files if path.stat().st_size > 10_000_000]  # what the hub takes through LFS alone
    assert all(path.suffix == ".safetensors" for path in large) and "lfs" in (space / ".gitattributes").read_text()


def test_a_folder_with_something_in_it_is_not_written_to(space, releases, tmp_path, capsys):
    assert main(["space", str(space), "--releases", str(releases)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main(["space", str(tmp_path / "new"), "--releases", str(tmp_path)]) == 2
    assert "at least one release" in capsys.readouterr().err and not (tmp_path / "new").exists()


def elsewhere(function):
    """What `spaces.GPU` does on ZeroGPU: the function, which yields, runs in a process of its own; arguments and
    results are pickled, and what else it changes is lost."""

    def run(*args):
        context = multiprocessing.get_context("fork")
        given, got = context.SimpleQueue(), context.SimpleQueue()

        def work():
            results = function(*given.get())
            for result in results if hasattr(results, "__next__") else [results]:
                got.put(pickle.dumps(result))
            got.put(None)

        process = context.Process(target=work, daemon=True)
        process.start()
        given.put(args)
        while (result := got.get()) is not None:
            yield pickle.loads(result)
        process.join()

    return run


def test_answers_are_the_same_through_the_processes_of_zerogpu(releases, monkeypatch):
    """A scene or a result that stayed behind in the GPU's process would fail on ZeroGPU, and nowhere else."""
    here = Asker(Library(releases))
    monkeypatch.setattr("apps.lab.asking.on_gpu", elsewhere)
    there = Asker(Library(releases))
    image = np.random.default_rng(0).integers(0, 255, (40, 56, 3), dtype=np.uint8)
    asked = "tiny-sft", image, "Segment the cyst.", Sampling()
    monkeypatch.setattr("lab.model.core_seg.CoreSeg.stream", lambda self, scene, sampling: iter(["<think>", TEXT]))
    *ours, our_answer = here.answer(*asked)
    *theirs, their_answer = there.answer(*asked)
    assert ours == theirs == ["<think>", TEXT] and our_answer.prediction.has_mask
    np.testing.assert_array_equal(our_answer.prediction.probability, their_answer.prediction.probability)
    np.testing.assert_array_equal(our_answer.attention, their_answer.attention)
    moved = TEXT.replace("[5,5,60,60]", "[50,50,90,90]")
    (again,) = there.again("tiny-sft", their_answer.scene, moved)
    expected = here.again("tiny-sft", our_answer.scene, moved).prediction.probability
    np.testing.assert_array_equal(again.prediction.probability, expected)
    assert not np.array_equal(expected, our_answer.prediction.probability)


def test_the_decorator_is_used_where_it_is_installed(monkeypatch):
    """ZeroGPU refuses a Space that decorates nothing."""
    monkeypatch.setitem(sys.modules, "spaces", SimpleNamespace(GPU=elsewhere))
    assert runpy.run_path(str(ROOT / "apps" / "lab" / "asking.py"))["on_gpu"] is elsewhere


@pytest.fixture
def started(tmp_path):
    """Address of a Space made of the real releases, in an environment made of its own requirements."""
    folder, log = tmp_path / "space", tmp_path / "log"
    assert main(["space", str(folder), "--releases", str(ROOT / "releases")]) == 0
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    install = [python, "-m", "pip", "install", "--quiet", "--no-compile", "-r", folder / "requirements.txt"]
    subprocess.run(install, check=True, cwd=folder)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV", "HF_"))}
    of_space = {"GRADIO_SERVER_NAME": "0.0.0.0", "GRADIO_SERVER_PORT": "7860", "SYSTEM": "spaces", "SPACE_ID": "a/b"}
    of_space |= {"HOME": str(tmp_path), "GRADIO_ANALYTICS_ENABLED": "False"}
    with log.open("w") as file:
        process = subprocess.Popen([python, "app.py"], cwd=folder, env=kept | of_space, stdout=file, stderr=file)
    try:
        address, end = "http://127.0.0.1:7860", time.monotonic() + 120
        while True:
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            try:
                urllib.request.urlopen(address, timeout=5).read()
                break
            except OSError:
                time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine: apt-get install chromium")
def test_a_space_starts_from_its_own_requirements_and_answers_a_visitor(started, browser, tmp_path):
    image = np.full((240, 320, 3), 120, np.uint8)
    cv2.ellipse(image, (200, 110), (50, 34), 20, 0, 360, (40, 40, 40), -1)
    cv2.imwrite(str(tmp_path / "scan.png"), image)
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    page.set_default_timeout(60_000)
    page.goto(started)
    page.set_input_files("input[type=file]", tmp_path / "scan.png")
    page.wait_for_selector("#viewer-0 .stage")
    page.get_by_role("button", name="Segment", exact=True).click()
    page.wait_for_selector("#answer-1 .figures")
    assert "core-seg-tiny-sft" in page.text_content("#answer-0")
    assert "core-seg-tiny-grpo" in page.text_content("#answer-1")
    assert page.locator("#viewer-0 .layer.overlay").count()
    assert "Not a medical device" in page.text_content("body")
    assert [tab.inner_text() for tab in page.get_by_role("tab").all()] == ["Inspect"]  # nothing but the public page
    page.close()
