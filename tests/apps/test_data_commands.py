"""Without this a source that is left out could still be trained on, or a manifest be lost to the one made from it."""

import json

import pytest

from apps.cli import main
from lab.data import knee, writer
from lab.data.manifest import read_manifest


def test_a_source_that_is_left_out_is_tested_on_and_nothing_else_is(manifest, capsys):
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    for place, line in enumerate(lines):
        line |= {"source": "ab"[place % 2], "split": ("train", "train", "test", "test", "val", "val")[place % 6]}
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["data", "leave-out", str(manifest), "a"]) == 0
    found = read_manifest(manifest.parent / "without-a.jsonl")
    assert {record.id for record in found if record.split == "test"} == {
        line["id"] for line in lines if line["source"] == "a"
    }
    kept = {line["id"]: line["split"] for line in lines if line["source"] == "b" and line["split"] != "test"}
    assert {record.id: record.split for record in found if record.split != "test"} == kept
    assert f"{len(kept)} records to train and choose on" in capsys.readouterr().out


@pytest.fixture
def evaluation(lesion_lines, tmp_path):
    """A folder as `core-seg evaluate` leaves it; even records are hard."""
    rows = [f"{line['id']},{line['group']},{0.1 + 0.8 * (place % 2)}" for place, line in enumerate(lesion_lines)]
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation/cases.csv").write_text("\n".join(["id,group,dice", *rows]) + "\n")
    return tmp_path / "evaluation"


def test_what_read_manifest_accepts_is_not_broken_by_the_commands_that_make_another(lesion_lines, evaluation, tmp_path):
    """A byte-order mark, CRLF, a line of spaces and a line separator inside a text; lines are kept as they are."""
    for line in lesion_lines:
        line["query"] = "Where is\u2028the cyst\x85 – 嚢胞?"
    texts = [json.dumps(line, ensure_ascii=False) for line in lesion_lines]
    path = tmp_path / "m.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*texts[:2], "   ", *texts[2:]]).encode())
    assert main(["data", "hard", str(path), str(evaluation)]) == 0
    assert (tmp_path / "hard.jsonl").read_text(encoding="utf-8").split("\n") == [*texts[::2], ""]
    assert main(["data", "leave-out", str(path), "made"]) == 0
    assert main(["data", "reason", str(path), "reasons.jsonl"]) == 0
    for name in ("without-made", "reasons"):
        found = read_manifest(tmp_path / f"{name}.jsonl")
        assert {(record.id, record.query) for record in found} == {(line["id"], line["query"]) for line in lesion_lines}
    assert not list(tmp_path.glob("*.part"))


@pytest.fixture
def commands(evaluation, monkeypatch):
    """Each command that makes a manifest of another, as a function of both; their long work fails the test."""

    def worked(*_):
        raise AssertionError("refuse before the work, not after it")

    monkeypatch.setenv("CORE_SEG_CACHE", str(evaluation.parent / "cache"))
    monkeypatch.setattr(knee, "cross_validated", worked)
    monkeypatch.setattr(writer, "_ask_for_all", worked)
    monkeypatch.setattr(writer, "from_facts", worked)
    server = ["--endpoint", "http://127.0.0.1:9/v1", "--model", "m"]
    return {
        "hard": lambda path, out: ["hard", path, str(evaluation), "--out", out],
        "leave-out": lambda path, out: ["leave-out", path, "made", "--out", out],
        "filter": lambda path, out: ["filter", path, str(evaluation.parent / "scores"), "--name", out],
        "filter's control": lambda path, out: [
            *("filter", path, str(evaluation.parent / "scores"), "--name", out.removeprefix("random-"))
        ],
        "reason": lambda path, out: ["reason", path, out],
        "reason of a server": lambda path, out: ["reason", path, out, *server],
    }


@pytest.mark.parametrize("name", ["hard", "leave-out", "filter", "filter's control", "reason", "reason of a server"])
def test_a_manifest_is_neither_overwritten_nor_mistaken_for_a_pack(manifest, commands, name, tmp_path, capsys):
    """And that is said before hours of work, or calls that are paid for."""
    path, folder = manifest.rename(tmp_path / "random-m.jsonl"), tmp_path / "packed"
    (tmp_path / "link.jsonl").symlink_to(path)
    before = path.read_bytes()
    assert main(["data", "pack", str(path), str(folder)]) == 0
    capsys.readouterr()
    for source, out, words in (
        (path, "random-m.jsonl", "'random-m.jsonl' is the manifest itself"),
        (tmp_path / "link.jsonl", "random-m.jsonl", "'random-m.jsonl' is the manifest itself"),
        (folder, "other.jsonl", "is packed; give the manifest.jsonl"),
        (folder / "index.parquet", "other.jsonl", "is packed; give the manifest.jsonl"),
        (path, "packed/other.jsonl", "other.jsonl' is not the name of a file"),
        (path, "..", "is not the name of a file"),
    ):
        assert main(["data", *commands[name](str(source), out)]) == 2, (source, out)
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1
    assert path.read_bytes() == before and not (tmp_path / "other.jsonl").exists()
