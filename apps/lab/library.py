"""What there is to look at: models, runs and records, by id; nothing is opened by a path that a visitor sends."""

import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from datetime import datetime
from pathlib import Path

import yaml

from apps.lab.results import Results
from lab.data.manifest import read_manifest
from lab.data.sample import Record
from lab.errors import LabError
from lab.model.core_seg import CoreSeg
from lab.model.release import is_stage_0, load_model

KEPT_MODELS = 4
"""Models in memory; the one that was used longest ago goes first."""
KEPT_EXPORTS = 64
KEPT_SECONDS, TIDIED_SECONDS = 3300, 300
"""How long what a visitor sent, asked and made is kept, and how often it is looked at: an hour at most."""


class Library:
    """Releases, runs and the records of a manifest.

    Args:
        releases: Folder of releases, or one release.
        runs: Folder of runs; None hides them.
        manifest: manifest.jsonl whose records can be picked; None offers uploads only.
        evaluations: Folders below which core-seg evaluate wrote.
    """

    def __init__(
        self,
        releases: Path,
        runs: Path | None = None,
        manifest: Path | None = None,
        evaluations: list[Path] | None = None,
    ) -> None:
        self.releases, self.runs = releases, runs
        self.evaluations = [folder for folder in (runs, *(evaluations or [])) if folder]
        self.votes = (runs or Path("runs")) / "votes.jsonl"
        self.records: dict[str, Record] = {r.id: r for r in read_manifest(manifest)} if manifest else {}
        self._records_of: dict[Path, dict[str, Record]] = {}
        self._loaded: OrderedDict[str, CoreSeg] = OrderedDict()
        self.results = Results()
        self._scratch = tempfile.TemporaryDirectory(prefix="core-seg-")
        self._lock, self._scratch_lock = threading.Lock(), threading.Lock()

    def models(self) -> dict[str, Path]:
        """Name to release folder or checkpoint; SFT before GRPO, so that the first two are the default comparison."""
        folders = [self.releases] if (self.releases / "config.json").is_file() else sorted(self.releases.glob("*"))
        folders = [folder for folder in folders if (folder / "model.safetensors").is_file() and not is_stage_0(folder)]
        found = {folder.name: folder for folder in folders}
        for name, run in self.run_folders().items():
            for path in sorted((run / "checkpoints").glob("*.ckpt")):
                if holds_core_seg(run):
                    found[f"{name}/{path.stem}"] = path
        return dict(sorted(found.items(), key=lambda item: (item[1].suffix == ".ckpt", "sft" not in item[0], item[0])))

    def model(self, name: str) -> CoreSeg:
        """The loaded model of a name of `models`, shared by everyone who asks.

        Raises:
            LabError: No such model, or one that cannot be loaded.
        """
        path = self.models().get(name)
        if path is None:
            raise LabError(f"there is no model '{name}'; reload the page")
        file = path if path.suffix else path / "model.safetensors"
        key = f"{path} {file.stat().st_mtime_ns}"  # a run that goes on overwrites its checkpoint
        with self._lock:
            if key not in self._loaded:
                self._loaded[key] = load_model(path)
                if len(self._loaded) > KEPT_MODELS:
                    self._loaded.popitem(last=False)
            self._loaded.move_to_end(key)
            return self._loaded[key]

    def scratch(self) -> Path:
        """A new folder for files that a visitor downloads; the oldest go, and all of them when the lab ends."""
        root = Path(self._scratch.name)
        with self._scratch_lock:
            for old in sorted(root.iterdir(), key=lambda path: path.stat().st_mtime)[: -KEPT_EXPORTS + 1]:
                shutil.rmtree(old, ignore_errors=True)
            return Path(tempfile.mkdtemp(dir=root))

    def tidy(self) -> None:
        """Let go of what visitors asked and made before `KEPT_SECONDS`."""
        self.results.trim(older=KEPT_SECONDS)
        with self._scratch_lock:  # a folder that `scratch` removes meanwhile would end `keep_tidy`
            for folder in Path(self._scratch.name).iterdir():
                if time.time() - folder.stat().st_mtime > KEPT_SECONDS:
                    shutil.rmtree(folder, ignore_errors=True)

    def keep_tidy(self) -> None:
        while True:
            time.sleep(TIDIED_SECONDS)
            self.tidy()

    def record(self, identity: str) -> Record:
        """The record of an id.

        Raises:
            LabError: When the manifest has none.
        """
        if identity not in self.records:
            raise LabError(f"the manifest has no record '{identity}'; pick another")
        return self.records[identity]

    def records_of(self, run: Path) -> dict[str, Record]:
        """By id, the records of the manifests that a run was trained and validated on, as far as they are there, and
        the lab's own."""
        if run not in self._records_of:
            named = {
                str(v) for k, v in read_config(run).items() if k.endswith(".manifest") or k.endswith("init_args.val")
            }
            there = [path for path in sorted(named) if Path(path).is_file()]
            self._records_of[run] = {r.id: r for path in there for r in read_manifest(path)} | self.records
        return self._records_of[run]

    def run_folders(self) -> dict[str, Path]:
        """Name to folder of every run that has logged something, the newest first."""
        if self.runs is None:
            return {}
        files = [path for path in self.runs.rglob("metrics.jsonl")]
        files.sort(key=lambda path: -path.stat().st_mtime)
        return {str(path.parent.relative_to(self.runs)): path.parent for path in files}

    def run(self, name: str) -> Path:
        """The folder of a run.

        Raises:
            LabError: No such run.
        """
        folder = self.run_folders().get(name)
        if folder is None:
            raise LabError(f"there is no run '{name}' (any more); reload the page")
        return folder


def flat(tree: dict, prefix: str = "") -> dict[str, object]:
    """Nested dictionaries and lists as one, keys joined by dots."""
    items: dict[str, object] = {}
    for name, value in tree.items():
        if isinstance(value, list) and any(isinstance(item, dict) for item in value):
            value = {str(place): item for place, item in enumerate(value)}
        items |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + str(name): value}
    return items


def read_config(run: Path) -> dict[str, object]:
    """A run's configuration, flat; empty while it has none."""
    path = run / "config_fit.yaml"
    return flat(yaml.safe_load(path.read_text()) or {}) if path.is_file() else {}


def holds_core_seg(run: Path) -> bool:
    """Whether a run's checkpoints are of stage 1 or later, told from its own configuration."""
    config = run / "config_fit.yaml"
    return config.is_file() and ("modules.sft." in (text := config.read_text()) or "modules.grpo." in text)


def described(name: str, folder: Path) -> str:
    """A run's name with the class that it trains and when it last logged."""
    trains = str(read_config(folder).get("model.class_path", "")).rpartition(".")[2]
    logged = datetime.fromtimestamp((folder / "metrics.jsonl").stat().st_mtime)
    return f"{name} ({trains + ', ' if trains else ''}{logged:%d %b %H:%M})"
