"""A whole set: cases in several processes, a journal to go on from, and at the end the manifest."""

import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import cv2
from tqdm import tqdm

from lab.data.convert.duplicates import alike
from lab.data.convert.find import Case, Skipped, find_cases, natural
from lab.data.convert.images import unclaimed
from lab.data.convert.source import Source
from lab.data.convert.write import convert_case
from lab.data.manifest import replace_lines
from lab.errors import LabError

VAL, TEST = 0.1, 0.15
"""Shares of the groups where a set has no official split."""


@dataclass(frozen=True)
class Summary:
    """found = written + skipped."""

    found: int
    """Cases, and files that belong to none."""
    written: int
    """Cases with at least one record."""
    skipped: int
    left_out: int
    """Slices and lesions of written cases that could not be used."""
    records: int
    splits: dict[str, int]
    """Records of each."""
    joined: int
    """Groups that were made one because of near-duplicates."""


def convert(source: Source, root: Path, out: Path, *, jobs: int = 1, size: int = 1024, most: int = 0) -> Summary:
    """Convert a set to `out/manifest.jsonl`, `out/images/` and `out/masks/`; `out/skipped.jsonl` says what was not.

    What `out/journal.jsonl` names as written is not done again, so that a run that was stopped goes on; cases that
    were skipped are tried again.

    Args:
        source: The set.
        root: Folder into which it was unpacked.
        out: Folder to write to.
        jobs: Processes.
        size: Longest side of what is written, in pixels; 0 keeps every size.
        most: Slices of a volume for each lesion class; 0 leaves it to the source.

    Raises:
        LabError: Nothing is there, nothing could be used, `out` is of another set, or a process died.
    """
    if jobs < 1 or size < 0 or 0 < size < 32 or most < 0:
        raise LabError(f"--jobs {jobs} --size {size} --slices {most}: jobs from 1, size 0 or from 32, slices from 0")
    source = replace(source, most=most or source.most)
    cases, skipped = find_cases(source, root)
    skipped += unclaimed(source, cases, root)
    for folder in ("images", "masks"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    journal = out / "journal.jsonl"
    done = _resume(journal, _fingerprint(source, size))
    todo = [case for case in cases if not done.get(case.name)]
    with (
        journal.open("a", encoding="utf-8") as file,
        tqdm(total=len(cases), initial=len(cases) - len(todo), desc=source.name, unit="case") as bar,
    ):
        for entry in _entries(source, todo, root, out, size, jobs):
            file.write(json.dumps(entry) + "\n")
            file.flush()
            bar.update()
    return _finish(source, cases, skipped, out)


def _entries(source: Source, cases: list[Case], root: Path, out: Path, size: int, jobs: int) -> Iterator[dict]:
    """What `convert_case` says of each, in any order; no more than a few cases a process are under way."""
    if jobs == 1:
        yield from (convert_case(source, case, root, out, size) for case in cases)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lab.data.convert.run"])
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin_worker)
    waiting = iter(cases)
    try:
        running = {pool.submit(convert_case, source, case, root, out, size) for case in islice(waiting, 4 * jobs)}
        while running:
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            running |= {
                pool.submit(convert_case, source, case, root, out, size) for case in islice(waiting, len(finished))
            }
            yield from (future.result() for future in finished)
    except BrokenProcessPool:
        raise LabError("a process died, perhaps for want of memory; go on with fewer --jobs") from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _begin_worker() -> None:
    """One thread, deaf to Ctrl-C, and gone when the parent is, even if that was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cv2.setNumThreads(1)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _fingerprint(source: Source, size: int) -> str:
    return hashlib.sha256(repr((source, size)).encode()).hexdigest()[:16]


def _resume(journal: Path, fingerprint: str) -> dict[str, bool]:
    """Case to whether it was written; a last line that was cut short is taken away."""
    if not journal.exists() or not journal.stat().st_size:
        journal.write_text(json.dumps({"fingerprint": fingerprint}) + "\n")
        return {}
    with journal.open("rb+") as file:
        file.seek(-1, os.SEEK_END)
        if file.read() != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
    with journal.open(encoding="utf-8") as file:
        first = file.readline()
    if not first or json.loads(first).get("fingerprint") != fingerprint:
        raise LabError(
            f"'{journal.parent}' holds another set, description, --size or --slices; choose another folder, or empty it"
        )
    return {entry["case"]: not entry["skipped"] for entry in _journal(journal.parent)}


def _finish(source: Source, cases: list[Case], skipped: list[Skipped], out: Path) -> Summary:
    """Groups and splits, then manifest.jsonl and skipped.jsonl, in the order of the cases."""
    last = {entry["case"]: entry for entry in _journal(out)}
    entries = [last[case.name] for case in cases]
    written = [entry for entry in entries if not entry["skipped"]]
    lost = [{"case": entry["case"], "reason": entry["skipped"]} for entry in entries if entry["skipped"]]
    lost += [{"case": item.case, "reason": item.reason} for item in skipped]
    left_out = [{"case": entry["case"], "reason": reason} for entry in written for reason in entry["left_out"]]
    told = [line | {"written": False} for line in lost] + [line | {"written": True} for line in left_out]
    replace_lines(out / "skipped.jsonl", (json.dumps(line, ensure_ascii=False) for line in told))
    if not written:
        raise LabError(f"none of the {len(cases)} cases of {source.name} could be used: see '{out / 'skipped.jsonl'}'")
    groups = [entry["group"] for entry in written]
    numbers = alike(groups, [entry["look"] for entry in written])
    members: dict[int, set[str]] = defaultdict(set)
    parts: dict[int, set[str]] = defaultdict(set)
    for number, entry in zip(numbers, written):
        members[number].add(entry["group"])
        parts[number].add(source.splits.get(entry["part"], ""))
    prefix = source.namespace or source.name
    names = {number: f"{prefix}-{natural(list(inside))[0]}" for number, inside in members.items()}
    lines = [
        record | {"group": names[number], "split": split_of(names[number], parts[number])}
        for number, entry in zip(numbers, written)
        for record in entry["records"]
    ]
    replace_lines(out / "manifest.jsonl", (json.dumps(line, ensure_ascii=False) for line in lines))
    return Summary(
        found=len(cases) + len(skipped),
        written=len(written),
        skipped=len(lost),
        left_out=len(left_out),
        records=len(lines),
        splits=dict(Counter(line["split"] for line in lines)),
        joined=len(set(groups)) - len(members),
    )


def split_of(group: str, official: Iterable[str] = ()) -> str:
    """The split of a group: the official one, or by hash of its name.

    Args:
        group: Its name; the same name always gives the same split, in other sets too.
        official: Those of its members. Where near-duplicates are in several, all go where they do least harm: to test
            if one is there, else to val.
    """
    for name in ("test", "val"):
        if name in official:
            return name
    if "train" in official:
        return "train"
    place = int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big") / 2**64
    if place < VAL:
        return "val"
    return "test" if place < VAL + TEST and "trainval" not in official else "train"


def _journal(out: Path) -> Iterator[dict]:
    """What was said of cases, oldest first."""
    with (out / "journal.jsonl").open(encoding="utf-8") as file:
        yield from (json.loads(line) for line in islice(file, 1, None))
