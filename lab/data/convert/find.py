"""The cases of a set on disk: files that belong together by their names, and what is left over."""

import os
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lab.data.convert.source import Source, filled, matcher
from lab.errors import LabError


@dataclass(frozen=True)
class Case:
    """One image, volume or series with all of its files."""

    name: str
    """Unique in the set, fit for a file name."""
    fields: dict[str, str]
    """What the image's pattern has captured."""
    files: dict[str, tuple[str, ...]]
    """Pattern to files, relative to the root, in the order of their names (2 before 10)."""


@dataclass(frozen=True)
class Skipped:
    """A case, or a file that belongs to none, that gives no sample."""

    case: str
    reason: str


def find_cases(source: Source, root: Path) -> tuple[list[Case], list[Skipped]]:
    """All cases below a root, in the order of their names, and what cannot be one.

    Args:
        source: What belongs together.
        root: Folder that holds the set; hidden files and `__MACOSX` are not looked at.

    Raises:
        LabError: No such folder, or nothing in it that looks like the set.
    """
    if not root.is_dir():
        raise LabError(f"'{root}' is not a folder; give the one into which {source.name} was unpacked")
    images: dict[tuple, list[tuple[str, dict]]] = defaultdict(list)
    parts = {pattern: (matcher(pattern), defaultdict(list)) for pattern in source.patterns()}
    image = matcher(source.image)
    for path in _files(root):
        if found := image.fullmatch(path):
            images[tuple(found.groupdict().items())].append((path, found.groupdict()))
        for regex, by_key in parts.values():
            if found := regex.fullmatch(path):
                by_key[tuple(sorted(found.groupdict().items()))].append(path)
    if not images:
        raise LabError(
            f"no file below '{root}' looks like '{source.image}'; {source.name} is laid out as {source.seen}"
        )
    cases, skipped, taken, used = [], [], {}, set()
    for same in images.values():
        paths, fields = natural([path for path, _ in same]), same[0][1]
        if source.kind != "series":
            skipped += [Skipped(path, f"is the same case as '{paths[0]}'; remove one of them") for path in paths[1:]]
            paths = paths[:1]
        files = {source.image: tuple(paths)}
        for pattern, (regex, by_key) in parts.items():
            key = tuple(sorted((name, fields[name]) for name in regex.groupindex))
            files[pattern] = tuple(natural(by_key.get(key, [])))
            used.add((pattern, key))
        name = re.sub(r"[^\w.-]+", "-", filled(source.case, fields)).strip("-.")
        if name in taken:
            skipped.append(Skipped(paths[0], f"has the same name, '{name}', as '{taken[name]}'; rename one of them"))
            continue
        taken[name] = paths[0]
        cases.append(Case(name, fields, files))
    for pattern, (_, by_key) in parts.items():
        orphans = [path for key, paths in by_key.items() if (pattern, key) not in used for path in paths]
        skipped += [Skipped(path, f"there is no image '{source.image}' for it; add it") for path in natural(orphans)]
    return sorted(cases, key=lambda case: _order(case.name)), skipped


def natural(names: list[str]) -> list[str]:
    """Sorted so that 2 comes before 10."""
    return sorted(names, key=_order)


def _order(name: str) -> list:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"([0-9]+)", name)]


def _files(root: Path) -> Iterator[str]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))]
        for name in names:
            if not name.startswith("."):
                yield Path(folder, name).relative_to(root).as_posix()
