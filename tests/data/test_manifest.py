"""A manifest is the user's word for what the data are; every way in which it can be wrong is told, with the line."""

import json

import cv2
import numpy as np
import pytest

from lab.data.manifest import ManifestError, read_manifest


def change(**fields):
    return lambda line: line | fields


def without(*names):
    return lambda line: {name: value for name, value in line.items() if name not in names}


BROKEN = {
    "not JSON": (lambda line: '{"id": ', "not JSON"),
    "cut in the middle": (lambda line: json.dumps(line)[:50], "not JSON"),
    "an array": (lambda line: "[1, 2]", "not a JSON object"),
    "a bare number": (lambda line: "3", "not a JSON object"),
    "nested without end": (lambda line: "[" * 100_000, "not JSON"),
    "a number without end": (lambda line: '{"width": ' + "9" * 5000 + "}", "not JSON"),
    "a field missing": (without("license"), "field 'license' is missing"),
    "two fields missing": (without("license", "width"), "field 'license' and 'width' is missing"),
    "a number for a text": (change(id=7), "field 'id' is 7"),
    "null": (change(modality=None), "field 'modality' is None"),
    "an empty text": (change(anatomy=" "), "field 'anatomy' is ' '"),
    "half a character": (change(id="a\ud800"), "half of a character"),
    "query not a text": (change(query=["a"]), "field 'query'"),
    "width as a text": (change(width="56"), "field 'width' is '56'"),
    "width a fraction": (change(width=56.5), "field 'width' is 56.5"),
    "width true": (change(width=True), "field 'width' is True"),
    "height negative": (change(height=-1), "field 'height' is -1"),
    "fraction in per cent": (change(mask_fraction=7.2), "mask_fraction"),
    "fraction not a number": (change(mask_fraction=float("nan")), "mask_fraction"),
    "split misspelt": (change(split="training"), "split 'training' is unknown; use train, val or test"),
    "lesion but no pixels": (change(mask_fraction=0), "'none' goes with 0"),
    "pixels but no lesion": (change(lesion="none"), "'none' goes with 0"),
    "absolute path": (change(image="/etc/hostname"), "leaves the manifest's folder"),
    "path upwards": (change(mask="../0_mask.png"), "leaves the manifest's folder"),
    "a mark of the answer in its lesion": (change(lesion="cyst [simple]"), "lesion holds one of < > [ ]"),
    "a mark of the answer in its reasoning": (change(reasoning="It is < 5 mm."), "reasoning holds one of < >"),
    "image missing": (change(image="nowhere.png"), "nowhere.png' does not exist"),
    "image a folder": (change(image="."), "does not exist"),
    "name too long": (change(image="x" * 5000), "cannot be read"),
    "name with a zero": (change(image="a\0b"), "does not exist"),
    "mask not an image": (change(mask="notes.txt"), "mask '"),
    "image of another size": (change(image="other.png"), "image 'other.png' is 8x6 but the line says 56x40"),
    "mask of another size": (change(mask="other.png"), "mask 'other.png' is 8x6 but the line says 56x40"),
    "size wrong": (change(width=40, height=56), "is 56x40 but the line says 40x56"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_line_is_named_with_its_number_and_what_to_do(name, lesion_lines, write_lines, tmp_path):
    """Otherwise a user hunts through thousands of lines, or trains on fewer than were given."""
    cv2.imwrite(str(tmp_path / "other.png"), np.zeros((6, 8), np.uint8))
    (tmp_path / "notes.txt").write_text("not an image")
    breaking, said = BROKEN[name]
    path = write_lines([lesion_lines[1], breaking(lesion_lines[0]), *lesion_lines[2:]])
    with pytest.raises(ManifestError) as caught:
        read_manifest(path)
    (problem,) = caught.value.problems
    assert problem.startswith("manifest.jsonl line 2: ") and said in problem
    assert "; " in problem and "\n" not in problem  # one sentence, with a remedy


def test_all_broken_lines_are_reported_at_once(lesion_lines, write_lines):
    """Or a user mends one line a run."""
    lines = [line | {"split": "tset"} for line in lesion_lines[:4]] + lesion_lines[4:]
    with pytest.raises(ManifestError) as caught:
        read_manifest(write_lines(["", *lines]))
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        f"manifest.jsonl line {n}" for n in (2, 3, 4, 5)
    ]
    assert str(caught.value).count("\n") == 3


def test_same_id_twice_is_an_error(lesion_lines, write_lines):
    """Results are joined by id."""
    with pytest.raises(ManifestError, match="line 7: id 'made/2' is also on line 3"):
        read_manifest(write_lines([*lesion_lines, lesion_lines[2]]))


def test_group_on_two_sides_of_a_split_is_an_error(lesion_lines, write_lines):
    """One patient in train and test makes the test figure a lie."""
    lesion_lines[4]["group"] = "made-0"
    with pytest.raises(ManifestError, match="line 5: group 'made-0' is in split 'test' here and in 'train' on line 1"):
        read_manifest(write_lines(lesion_lines))


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_empty_manifest_is_an_error(tmp_path, content):
    (tmp_path / "m.jsonl").write_bytes(content)
    with pytest.raises(ManifestError, match="is empty"):
        read_manifest(tmp_path / "m.jsonl")


def test_unreadable_manifest_is_one_sentence(tmp_path):
    (tmp_path / "m.jsonl").write_bytes('{"id": "é"}'.encode("latin-1"))
    with pytest.raises(ManifestError, match=r"m.jsonl: not UTF-8 text \(byte 8\)"):
        read_manifest(tmp_path / "m.jsonl")
    for path in (tmp_path, tmp_path / "nowhere.jsonl"):
        with pytest.raises(ManifestError, match="cannot be read .*check the path"):
            read_manifest(path)


def test_records_hold_what_the_file_says_and_find_their_files_from_anywhere(
    manifest, lesion_lines, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    records = read_manifest("manifest.jsonl")
    monkeypatch.chdir("/")
    for record, line in zip(records, lesion_lines, strict=True):
        assert record.image.is_file() and record.mask.is_file()
        assert record.image == tmp_path / line["image"] and record.mask == tmp_path / line["mask"]
        for name in set(line) - {"image", "mask"}:
            assert getattr(record, name) == line[name]


def test_windows_files_and_unusual_characters_are_read(lesion_lines, tmp_path):
    """A byte-order mark, CRLF and a line separator inside a text are legal; none may split or lose a line."""
    lesion_lines[0]["query"] = "Where is\u2028the cyst\x85?"
    text = "\r\n".join(json.dumps(line, ensure_ascii=False) for line in lesion_lines)
    (tmp_path / "m.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    records = read_manifest(tmp_path / "m.jsonl")
    assert len(records) == 6 and records[0].query == lesion_lines[0]["query"]


def test_query_names_the_lesion_without_the_verdict(manifest):
    """The question must not tell what only the answer can know: whether the tumour is benign, or is there at all."""
    queries = {record.query for record in read_manifest(manifest)}
    assert queries == {"Locate and segment the cyst in this breast ultrasound."}


def test_query_for_no_lesion_asks_for_one_the_source_has_the_same_each_time(lesion_lines, write_lines):
    for line, lesion in zip(lesion_lines[::2], ("malignant tumour", "benign cyst", "abscess"), strict=True):
        line["lesion"] = lesion
    asked = [r.query for r in read_manifest(write_lines(lesion_lines)) if r.lesion == "none"]
    again = [r.query for r in read_manifest(write_lines(lesion_lines[::-1])) if r.lesion == "none"]
    known = {f"Locate and segment the {name} in this breast ultrasound." for name in ("tumour", "cyst", "abscess")}
    assert set(asked) <= known and asked == again[::-1]
    (alone,) = read_manifest(write_lines(lesion_lines[1:2]))
    assert alone.query == "Locate and segment the lesion in this breast ultrasound."


def test_query_of_the_file_is_kept(lesion_lines, write_lines):
    lesion_lines[0] |= {"query": "Where is the larger one?", "reasoning": "It is larger."}
    record = read_manifest(write_lines(lesion_lines))[0]
    assert (record.query, record.reasoning) == ("Where is the larger one?", "It is larger.")


def test_several_queries_may_share_an_image(lesion_lines, write_lines):
    """That is what makes the query matter."""
    twin = lesion_lines[0] | {"id": "made/0b", "query": "Where is the other one?"}
    records = read_manifest(write_lines([*lesion_lines, twin]))
    assert records[0].image == records[-1].image


def test_real_lesions_are_read_whole_and_quickly(real_manifest, monkeypatch):
    """3,017 records wait for the headers only."""

    def decodes(*_):
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decodes)
    records = read_manifest(real_manifest)
    assert len(records) == 3017
    assert sum(record.split == "test" for record in records) == 341
    assert all(record.query for record in records)
