"""Without these a conversion starts from the beginning, leaks patients across splits, or shows scans wrongly."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from apps.cli import main
from lab.data.convert.duplicates import alike, look
from lab.data.convert.run import convert, split_of
from lab.data.convert.sets import SETS
from lab.data.convert.source import Source, matcher, read_description
from lab.data.images import read_mask
from lab.data.manifest import read_manifest
from lab.errors import LabError
from tests.data.convert.trees import Tree, affine_of, box, head, lesions, lines, pairs, volumes

ROOT = Path(__file__).parents[3]


def polyps(tree: Tree, numbers, size=(48, 64)) -> None:
    for number in numbers:
        tree.image(f"images/p{number}.jpg", number, size)
        tree.mask(f"masks/p{number}.jpg", box(number, size))


def test_killed_half_way_it_goes_on_without_doing_finished_cases_again(tmp_path):
    """And the processes that it had started are gone, and the end is the same as without."""
    tree = Tree(tmp_path / "root")
    polyps(tree, range(60), (240, 320))
    program = (
        "import sys; from pathlib import Path; from lab.data.convert.run import convert\n"
        "from lab.data.convert.sets import SETS\n"
        f"if __name__ == '__main__': convert(SETS['kvasir_seg'], Path({str(tree.root)!r}), Path(sys.argv[1]), jobs=2)"
    )
    (tmp_path / "run.py").write_text(program)
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "run.py"), str(out)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    journal = out / "journal.jsonl"
    until = time.time() + 120
    while time.time() < until and not (journal.exists() and journal.read_text().count("\n") > 6):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    until = time.time() + 90  # they need a turn of the processor to notice
    while time.time() < until and _alive(process.pid):
        time.sleep(0.05)
    assert not _alive(process.pid)
    with journal.open("a") as file:
        file.write('{"case": "p9')  # as a line that was cut short
    done = {entry["case"] for entry in lines_whole(journal)}
    assert 6 <= len(done) < 60 and not (out / "manifest.jsonl").exists()
    before = {name: (out / f"images/{name}.png").stat().st_mtime_ns for name in done}
    convert(SETS["kvasir_seg"], tree.root, out)
    assert {name: (out / f"images/{name}.png").stat().st_mtime_ns for name in done} == before
    convert(SETS["kvasir_seg"], tree.root, tmp_path / "once")
    for name in ("manifest.jsonl", "skipped.jsonl"):
        assert (out / name).read_bytes() == (tmp_path / "once" / name).read_bytes()
    assert len(read_manifest(out / "manifest.jsonl")) == 60


def lines_whole(journal: Path) -> list[dict]:
    return [json.loads(line) for line in journal.read_text().split("\n")[1:-1]]


def _alive(session: int) -> list[int]:
    """Processes of a session; those that only wait to be buried do not count."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, number = path.read_text().rpartition(") ")[2].split()[:4]
        except OSError:
            continue
        if int(number) == session and state != "Z":
            found.append(int(path.parent.name))
    return found


def test_several_processes_write_what_one_does(tmp_path):
    tree = Tree(tmp_path / "root")
    volumes(tree, "lits")
    one = convert(SETS["lits"], tree.root, tmp_path / "one")
    assert convert(SETS["lits"], tree.root, tmp_path / "two", jobs=2) == one
    for file in sorted((tmp_path / "one").rglob("*")):
        if file.is_file() and file.name != "journal.jsonl":
            assert file.read_bytes() == (tmp_path / "two" / file.relative_to(tmp_path / "one")).read_bytes()


def test_a_case_that_was_mended_is_taken_the_next_time(tmp_path):
    tree = Tree(tmp_path / "root")
    pairs(tree, "kvasir_seg")
    first = convert(SETS["kvasir_seg"], tree.root, tmp_path / "out")
    tree.mask("Kvasir-SEG/masks/cju3dc.jpg", box(3))
    second = convert(SETS["kvasir_seg"], tree.root, tmp_path / "out")
    assert (second.written, second.skipped) == (first.written + 1, first.skipped - 1)
    assert "kvasir_seg/cju3dc" in {record.id for record in read_manifest(tmp_path / "out/manifest.jsonl")}


def test_a_folder_of_another_set_is_not_written_into(tmp_path):
    tree = Tree(tmp_path / "root")
    polyps(tree, range(3))
    convert(SETS["kvasir_seg"], tree.root, tmp_path / "out")
    with pytest.raises(LabError, match="another set"):
        convert(SETS["kvasir_seg"], tree.root, tmp_path / "out", size=64)


def test_a_full_disk_ends_the_run_and_is_no_fault_of_the_case(tmp_path):
    """Else every case would be called broken, and none would be tried again."""
    tree = Tree(tmp_path / "root")
    polyps(tree, range(3))
    (tmp_path / "out/masks/p1.part").mkdir(parents=True)  # it cannot be written to, whoever runs this
    with pytest.raises(LabError, match="cannot be written"):
        convert(SETS["kvasir_seg"], tree.root, tmp_path / "out")
    (tmp_path / "out/masks/p1.part").rmdir()
    assert convert(SETS["kvasir_seg"], tree.root, tmp_path / "out").written == 3


def test_near_duplicates_share_a_group_and_others_do_not(tmp_path):
    """A polyp that was stored twice, brighter, smaller and with JPEG's traces, could be learnt and then tested on."""
    tree = Tree(tmp_path / "root")
    polyps(tree, range(40))
    picture = cv2.imread(str(tree.root / "images/p3.jpg"))
    again = cv2.resize(np.clip(picture * 0.9 + 10, 0, 255).astype(np.uint8), (56, 42), interpolation=cv2.INTER_AREA)
    cv2.imwrite(str(tree.root / "images/p77.jpg"), again, [cv2.IMWRITE_JPEG_QUALITY, 70])
    tree.mask("masks/p77.jpg", cv2.resize(box(3).astype(np.uint8), (56, 42)) > 0)
    summary = convert(SETS["kvasir_seg"], tree.root, tmp_path / "out")
    groups = {line["id"]: line["group"] for line in lines(tmp_path / "out/manifest.jsonl")}
    assert groups["kvasir_seg/p77"] == groups["kvasir_seg/p3"] and summary.joined == 1
    assert len(set(groups.values())) == 40


def test_looks_are_joined_in_chains():
    """Against a comparison of all pairs; frames of one video drift, so that only neighbours are alike."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2, 256)
    looks, groups = [], []
    for number in range(300):
        if number % 10 == 0:
            bits = rng.integers(0, 2, 256)
        bits = bits ^ (rng.random(256) < 0.06)
        looks.append(np.packbits(bits).tobytes().hex())
        groups.append(str(number) if number != 299 else "0")
    values = [int(text, 16) for text in looks]
    label = list(range(300))
    for a in range(300):
        for b in range(300):
            if (values[a] ^ values[b]).bit_count() <= 24 or groups[a] == groups[b]:
                label = [label[a] if name == label[b] else name for name in label]
    found = alike(groups, looks)
    assert len(set(found)) < 200  # some were joined
    assert len(set(zip(found, label))) == len(set(found)) == len(set(label))
    assert len(look(np.zeros((9, 9, 3), np.uint8))) == 64


def test_a_patient_is_on_one_side_and_shares_are_as_said(tmp_path):
    tree = Tree(tmp_path / "root")
    source = replace(SETS["kvasir_seg"], image="{patient}/{name}.png", mask="{patient}/masks/{name}.png")
    source = replace(source, group="{patient}", case="{patient}-{name}")
    for number in range(24):
        tree.image(f"patient{number // 4}/{number}.png", number)
        tree.mask(f"patient{number // 4}/masks/{number}.png", box(number))
    convert(source, tree.root, tmp_path / "out")
    found = {(line["group"], line["split"]) for line in lines(tmp_path / "out/manifest.jsonl")}
    assert len(found) == 6
    splits = [split_of(f"group-{number}") for number in range(20_000)]
    assert splits.count("val") / 20_000 == pytest.approx(0.1, abs=0.01)
    assert splits.count("test") / 20_000 == pytest.approx(0.15, abs=0.01)
    assert split_of("kvasir_seg-1") == "train"  # and for ever


def test_official_splits_are_kept_and_a_twin_of_a_test_image_is_not_trained_on(tmp_path):
    tree = Tree(tmp_path / "root")
    for number in range(60):
        part = "test" if number < 4 else "trainval"
        tree.image(f"tn3k/{part}-image/{number:04d}.jpg", number)
        tree.mask(f"tn3k/{part}-mask/{number:04d}.jpg", box(number))
    tree.image("tn3k/trainval-image/0099.jpg", 2)
    tree.mask("tn3k/trainval-mask/0099.jpg", box(2))
    convert(SETS["tn3k"], tree.root, tmp_path / "out")
    split = {line["id"]: line["split"] for line in lines(tmp_path / "out/manifest.jsonl")}
    tested = {name for name, value in split.items() if value == "test"}
    assert tested == {f"tn3k/test-{number:04d}" for number in range(4)} | {"tn3k/trainval-0099"}
    assert "val" in split.values()


def test_an_image_that_several_isic_sets_have_is_on_the_same_side_in_all(tmp_path):
    split = {}
    for year, folder, truth, ending in (
        (2016, "ISBI2016_ISIC_Part1_Test_Data", "ISBI2016_ISIC_Part1_Test_GroundTruth", "_Segmentation"),
        (2018, "ISIC2018_Task1-2_Training_Input", "ISIC2018_Task1_Training_GroundTruth", "_segmentation"),
    ):
        tree = Tree(tmp_path / str(year))
        for number in range(30):
            tree.image(f"{folder}/ISIC_{number:07d}.jpg", number)
            tree.mask(f"{truth}/ISIC_{number:07d}{ending}.png", box(number))
        convert(SETS[f"isic{year}"], tree.root, tmp_path / f"out{year}")
        found = lines(tmp_path / f"out{year}/manifest.jsonl")
        split[year] = {line["id"].split("/")[1]: (line["group"], line["split"]) for line in found}
    assert split[2016] == split[2018] and len({name for _, name in split[2016].values()}) == 3


def test_pixels_become_square_and_large_images_small(tmp_path):
    tree = Tree(tmp_path / "root")
    affine = affine_of("RAS", (1, 2, 3))
    tree.nifti("1/pre/FLAIR.nii.gz", head(1), affine)
    tree.nifti("1/wmh.nii.gz", lesions(1, 1), affine)
    convert(SETS["wmh"], tree.root, tmp_path / "out")
    first = lines(tmp_path / "out/manifest.jsonl")[0]
    assert (first["width"], first["height"]) == (24, 56)
    mask = read_mask(tmp_path / "out" / first["mask"])
    assert mask.sum() == 2 * 36
    polyps(Tree(tmp_path / "large"), [0], (900, 1200))
    convert(SETS["kvasir_seg"], tmp_path / "large", tmp_path / "out2", size=300)
    (record,) = read_manifest(tmp_path / "out2/manifest.jsonl")
    assert (record.width, record.height) == (300, 225) and record.mask_fraction == pytest.approx(
        box(0, (900, 1200)).mean(), abs=2e-4
    )


def test_a_lesion_that_vanishes_when_scaled_is_named(tmp_path):
    """An empty mask would pass for health."""
    tree = Tree(tmp_path / "root")
    polyps(tree, [0, 1], (400, 800))
    tiny = np.zeros((400, 800), bool)
    tiny[201:202, 101:102] = True
    tree.image("images/p2.jpg", 2, (400, 800))
    cv2.imwrite(str(tree.path("masks/p2.png")), tiny * np.uint8(255))
    source = replace(SETS["kvasir_seg"], mask="{base}masks/{name}.*")
    summary = convert(source, tree.root, tmp_path / "out", size=80)
    assert (summary.written, summary.skipped) == (2, 1)
    assert "polyp is too small to be seen at 80x40" in lines(tmp_path / "out/skipped.jsonl")[0]["reason"]


def test_names_with_dots_are_cases_of_their_own(tmp_path):
    """Names are often UIDs: cut at a dot, several patients would be one case with the masks of all."""
    tree = Tree(tmp_path / "root")
    for number, end in enumerate(("jpg", "png")):
        tree.image(f"images/1.2.840.{number}.{end}", number)
        tree.mask(f"masks/1.2.840.{number}.png", box(number))
    convert(read_description(ROOT / "configs/convert/pairs.yaml"), tree.root, tmp_path / "out")
    found = {record.id: read_mask(record.mask) for record in read_manifest(tmp_path / "out/manifest.jsonl")}
    assert set(found) == {"my_pairs/1.2.840.0", "my_pairs/1.2.840.1"}
    assert all((found[f"my_pairs/1.2.840.{number}"] == box(number)).all() for number in range(2))


def test_the_command_converts_and_says_what_was_lost(tmp_path, capsys):
    tree = Tree(tmp_path / "root")
    polyps(tree, range(5))
    tree.path("masks/p2.jpg").unlink()
    assert (
        main(
            [
                "data",
                "convert",
                str(ROOT / "configs/convert/pairs.yaml"),
                str(tree.root),
                str(tmp_path / "out"),
                "--jobs",
                "1",
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert "found 5 cases = 4 written + 1 skipped" in said and "4 records" in said
    assert main(["data", "convert", "nosuch", str(tree.root), str(tmp_path / "out")]) == 2
    assert "busi" in capsys.readouterr().err
    assert main(["data", "convert", "busi", str(tree.root), str(tmp_path / "other")]) == 2
    assert "no file below" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, words",
    [
        ("name: a\nkind: pears", "kind"),
        ("name: a", "image"),
        ("colour: red", "colour"),
        ("nothing", "cannot be used"),
    ],
)
def test_a_wrong_description_gets_one_sentence(tmp_path, text, words):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(LabError, match=words) as error:
        read_description(tmp_path / "a.yaml")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"mask": "{base}{patient}.png"}, "patient"),
        ({"window": "bone"}, "window"),
        ({"splits": {"a": "dev"}}, "dev"),
        ({"mask": ""}, "give mask"),
        ({"lesions": ()}, "lesions"),
        ({"image": "{name:[}.png"}, "cannot be|not one that can be read"),
    ],
)
def test_a_description_that_contradicts_itself_is_refused(changes, words):
    with pytest.raises(LabError, match=words):
        replace(SETS["kvasir_seg"], **changes)


def test_patterns_take_whole_names():
    found = matcher("{base}a/{name}_mask*.png").fullmatch("x/y/a/b c (1)_mask_1.png")
    assert found and found["name"] == "b c (1)"
    assert not matcher("{base}a/{name}.png").fullmatch("x/a/b/c.png")
    assert not matcher("{base}volume-{name:\\d+}.nii").fullmatch("test-volume-1.nii")
    assert matcher("{name}/{name}.bmp").fullmatch("a/a.bmp") and not matcher("{name}/{name}.bmp").fullmatch("a/b.bmp")
    for pattern, path in (("{name}.*", "1.2.nii.gz"), ("{name}.nii*", "1.2.nii.gz"), ("{name}.*", "1.2.tif")):
        assert matcher(pattern).fullmatch(path)["name"] == "1.2"
    assert isinstance(SETS["busi"], Source)
