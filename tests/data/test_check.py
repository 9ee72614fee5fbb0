"""A fault in the data that nobody names is trained on, or makes a test figure a lie."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from apps.cli import main
from lab.data.check import NEAR, check_manifest, coordinates, look_at_record, near_pairs
from lab.data.manifest import ManifestError, read_manifest
from lab.data.synthetic import write_plain
from tests.data.test_manifest import BROKEN


class Planted:
    """A copy of a small data set, the faults put into it, and what must be said of each line (counted from 1)."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "manifest.jsonl"
        self.lines = [json.loads(line) for line in self.path.read_text().splitlines()]
        self.expected: list[tuple[int, str]] = []
        self.warned: list[tuple[int, str]] = []

    def place(self, line: int, name: str) -> str:
        return str(self.folder / self.lines[line - 1][name])

    def say(self, line: int, words: str, **fields) -> None:
        self.lines[line - 1] |= fields
        self.expected.append((line, words))

    def write(self) -> None:
        texts = [line if isinstance(line, str) else json.dumps(line) for line in self.lines]
        self.path.write_text("\n".join(texts) + "\n")


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clean")
    return write_plain(folder, 24, 7, fractions=(0.5, 0.25, 0.25), size=64).parent


@pytest.fixture
def planted(clean, tmp_path) -> Planted:
    """Train is line 1 to 12, val to 18, test to 24."""
    faulty = Planted(shutil.copytree(clean, tmp_path / "faulty"))
    lines, place, say = faulty.lines, faulty.place, faulty.say
    mask = cv2.imread(place(2, "mask"), cv2.IMREAD_GRAYSCALE)
    Path(place(1, "image")).unlink()
    say(1, "does not exist")
    Path(place(2, "mask")).unlink()
    say(2, "does not exist")
    say(3, "jpg' is 64x64 but the line says 80x64", width=80)
    say(3, "png' is 64x64 but the line says 80x64")
    cv2.imwrite(place(4, "mask"), np.zeros((32, 32), np.uint8))
    say(4, "mask is 32x32 but image is 64x64")
    say(4, "but the mask is empty")
    say(4, "is 32x32 but the line says 64x64")
    cv2.imwrite(place(5, "mask"), np.zeros_like(mask))
    say(5, "but the mask is empty")
    say(6, "lesion is 'none' but the mask is not empty", lesion="none", mask_fraction=0)
    cv2.imwrite(place(7, "mask"), cv2.GaussianBlur(mask, (0, 0), 2))
    say(7, "mask has more than two values")
    lines[6]["mask_fraction"] = float((cv2.imread(place(7, "mask"), 0) > 0).mean())
    lines[7]["id"] = lines[8]["id"]
    say(9, f"id '{lines[8]['id']}' is also on line 8")
    say(10, "damaged or cut short")
    Path(place(10, "image")).write_bytes(Path(place(10, "image")).read_bytes()[:700])
    say(11, "reasoning gives coordinates away, '[12, 30, 44, 60]'", reasoning="It lies at [12, 30, 44, 60], dark.")
    say(12, "query gives coordinates away", query="Segment what is at x = 12, y = 40.")
    cv2.imwrite(place(13, "image").replace(".jpg", ".png"), cv2.imread(place(9, "image")))  # another file and name
    say(13, "has the pixels of", image=lines[12]["image"].replace(".jpg", ".png"))
    say(14, f"group '{lines[8]['group']}' is in split 'val' here and in 'train' on line 9", group=lines[8]["group"])
    say(15, "mask_fraction is 0.9 but", mask_fraction=0.9)
    say(16, "split 'valid' is unknown", split="valid")
    say(17, "leaves the manifest's folder", image="../clean.jpg")
    say(18, "field 'mask_fraction' is nan", mask_fraction=float("nan"))
    say(19, "field 'license' is missing")
    del lines[18]["license"]
    lines[19] = '{"id": '
    faulty.expected.append((20, "not JSON"))
    say(21, "reasoning holds one of", reasoning="The <seg> shows it.")
    say(21, "field 'anatomy' is '  '", anatomy="  ")
    smaller = cv2.resize(cv2.imread(place(8, "image")), (60, 60), interpolation=cv2.INTER_AREA)
    cv2.imwrite(place(22, "image"), cv2.resize(smaller, (64, 64)), [cv2.IMWRITE_JPEG_QUALITY, 70])
    faulty.warned.append((22, "looks like"))
    lines[22] |= {"image": lines[23]["image"], "mask": lines[23]["mask"], "query": lines[23]["query"]}
    lines[22] |= {name: lines[23][name] for name in ("lesion", "mask_fraction")}
    faulty.warned.append((24, "image, mask and query are those of line 23"))
    faulty.write()
    return faulty


def test_every_planted_fault_is_found_and_named_and_nothing_else(planted, capsys):
    report = check_manifest(planted.path, workers=2)
    for found, expected in ((report.problems, planted.expected), (report.warnings, planted.warned)):
        left = list(found)
        for line, words in expected:
            said = [one for one in left if one.startswith(f"manifest.jsonl line {line}: ") and words in one]
            assert len(said) == 1, (line, words, found)
            left.remove(said[0])
        assert not left
    assert len({line for line, _ in planted.expected}) >= 15
    assert main(["data", "check", str(planted.path)]) == 2
    printed = capsys.readouterr().err
    assert all(problem in printed for problem in report.problems) and "warning: manifest.jsonl line 22" in printed


def test_clean_data_has_no_problem_and_no_warning(clean, capsys):
    assert main(["data", "check", str(clean / "manifest.jsonl")]) == 0
    assert "24 records, all well, 0 warnings" in capsys.readouterr().out


def test_files_that_only_a_link_brings_into_the_folder_are_told(clean, tmp_path):
    """A copy of the folder would lack them."""
    folder = shutil.copytree(clean, tmp_path / "linked")
    (folder / "images").rename(tmp_path / "elsewhere")
    (folder / "images").symlink_to(tmp_path / "elsewhere")
    report = check_manifest(folder / "manifest.jsonl", workers=1)
    assert not report.problems and len(report.warnings) == 24 and "link out of" in report.warnings[0]


@pytest.mark.parametrize("name", BROKEN)
def test_what_keeps_a_manifest_from_being_read_is_among_the_problems(name, lesion_lines, write_lines, tmp_path):
    """Mending what is listed must be enough."""
    cv2.imwrite(str(tmp_path / "other.png"), np.zeros((6, 8), np.uint8))
    (tmp_path / "notes.txt").write_text("not an image")
    path = write_lines([BROKEN[name][0](lesion_lines[0]), *lesion_lines[1:]])
    with pytest.raises(ManifestError) as caught:
        read_manifest(path)
    assert set(caught.value.problems) <= set(check_manifest(path, workers=1).problems)


@pytest.mark.parametrize("value", [1, 255])
def test_masks_of_ones_and_of_255_are_both_masks(manifest, value):
    for path in manifest.parent.glob("*_mask.png"):
        cv2.imwrite(str(path), (cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) > 0).astype(np.uint8) * value)
    assert not check_manifest(manifest, workers=1).problems


@pytest.mark.parametrize(
    "text",
    [
        "It lies at [[8,31,40,66]].",
        "Its centre is (120, 85).",
        "See <loc0123><loc0456>.",
        "The box is x1=3, y1: 9.",
        "It begins at row 40.",
        "Its y-coordinate is 31.",
        "The bounding box is 12 by 30.",
        "It is 14 pixels wide.",
        "It lies 30% from the left.",
        "A dark spot at 0.31, 0.62 stands out.",
    ],
)
def test_text_that_gives_the_place_in_numbers_is_found(text):
    """A model would copy the numbers instead of looking."""
    assert coordinates(text)


@pytest.mark.parametrize(
    "text",
    [
        "A medium area at the upper left departs from it: brighter than its surround.",
        "A 45-year-old with a nodule of 12 x 8 mm (BI-RADS 4).",
        "Two lesions, one of 3 mm and one of 4 mm, in segments 5 and 6.",
        "The T1-weighted image shows 2 foci; 3 months later (2019) they were gone.",
        "A well-defined, X-shaped scar on the right.",
    ],
)
def test_text_without_coordinates_is_left_alone(text):
    assert coordinates(text) == ""


def test_near_hashes_are_those_that_comparing_all_with_all_finds():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, 60, dtype=np.uint64)
    flips = [
        np.bitwise_or.reduce(np.uint64(1) << rng.permutation(64)[:n].astype(np.uint64)) for n in (1, 2, 3, 3, 4, 5)
    ]
    hashes = np.concatenate([hashes, hashes[: len(flips)] ^ np.array(flips, np.uint64), hashes[:2]])
    expected = {
        (a, b) for b in range(len(hashes)) for a in range(b) if bin(int(hashes[a]) ^ int(hashes[b])).count("1") <= NEAR
    }
    assert set(near_pairs(hashes)) == expected and len(expected) >= 7


def test_marks_of_the_answer_are_found_in_an_index_too(manifest):
    """Its lines were checked when it was packed, by what was known then."""
    record = read_manifest(manifest)[0]
    assert not look_at_record(1, record).problems
    (problem,) = look_at_record(1, replace(record, lesion="cyst [simple]")).problems
    assert "marks of the answer" in problem
