"""The folder that is pushed to a Space: code, releases, pinned requirements and front matter, and nothing else."""

import shutil
from pathlib import Path

import lab
from lab.errors import LabError

HERE = Path(__file__).parent
FILES = ("app.py", "README.md", "requirements.txt")
PAGE = ("__init__.py", "asking.py", "inspection.py", "library.py", "page.py", "results.py", "views.py", "assets")
"""Of apps/lab, what the public page consists of."""
LARGE = "*.safetensors filter=lfs diff=lfs merge=lfs -text\n*.webp filter=lfs diff=lfs merge=lfs -text\n"


def assemble(out: Path, releases: list[Path]) -> int:
    """Write the folder.

    Args:
        out: Must not exist, or be empty but for a clone's `.git`.
        releases: Folders that core-seg release wrote.

    Returns:
        Its size in bytes.

    Raises:
        LabError: For a folder that holds something, or a release that is none.
    """
    from lab.model.release import load_model, release_files

    if out.exists() and any(path.name != ".git" for path in out.iterdir()):
        raise LabError(f"'{out}' is not empty; give a new folder, or an empty clone of the Space")
    if not releases:
        raise LabError("a Space needs at least one release; name folders that core-seg release wrote")
    if len({release.resolve().name for release in releases}) < len(releases):
        raise LabError("two releases have the same name; rename the folder of one")
    for release in releases:
        if load_model(release).config.reasoner.model != "small":
            raise LabError(f"release '{release}' is not of the tiny preset and too large for a CPU; give another")
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
    out.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copy(HERE / name, out / name)
    shutil.copytree(Path(lab.__file__).parent, out / "lab", ignore=ignore)
    (out / "apps" / "lab").mkdir(parents=True)
    shutil.copy(HERE.parent / "__init__.py", out / "apps")
    for name in PAGE:
        source, target = HERE.parent / "lab" / name, out / "apps" / "lab" / name
        shutil.copytree(source, target, ignore=ignore) if source.is_dir() else shutil.copy(source, target)
    for release in releases:
        for name in release_files(release):
            target = out / "releases" / release.resolve().name / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(release / name, target)
    (out / ".gitattributes").write_text(LARGE)
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file() and ".git" not in path.parts)
