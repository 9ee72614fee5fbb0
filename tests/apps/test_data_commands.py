"""Without this a source that is left out could still be trained on."""

import json

from apps.cli import main
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
