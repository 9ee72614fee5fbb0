"""A packed manifest must be the same data: no record lost, none twice, none changed, and training none the wiser."""

import io
import json
import multiprocessing
import pickle
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from apps.cli import main
from lab.data import pack as packing
from lab.data.check import check_manifest
from lab.data.images import ImageError, load_sample, read_image
from lab.data.manifest import ManifestError, read_manifest
from lab.data.mixture import MixtureSampler, Part
from lab.data.pack import pack
from lab.data.packed import SCHEMA, PackedRecords, mapped
from lab.data.reason import write_reason
from lab.data.synthetic import write_plain
from lab.errors import LabError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("CORE_SEG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def several(tmp_path) -> Path:
    """A manifest that asks about most images more than once, its lines not in the order of the images."""
    path = write_reason(tmp_path / "several", 9, seed=5, size=64)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[i] for i in np.random.default_rng(0).permutation(len(lines))) + "\n")
    return path


def plain(record):
    return replace(record, image=Path(), mask=Path())


@pytest.mark.parametrize("out", ["shards", "several/index.parquet"])
def test_every_record_comes_back_with_its_pixels(several, tmp_path, out):
    records = {record.id: record for record in read_manifest(several)}
    index = pack(several, tmp_path / out, images_per_shard=4, workers=2)
    packed = read_manifest(tmp_path / out)
    assert len(packed) == len(records) == len({record.id for record in packed})
    for record in packed:
        assert plain(record) == plain(records[record.id])
        ours, theirs = load_sample(record), load_sample(records[record.id])
        assert np.array_equal(ours.image, theirs.image) and np.array_equal(ours.mask, theirs.mask)
    assert not check_manifest(index, workers=1).problems
    assert [r.id for r in packed.of_split("test")] == [r.id for r in packed if r.split == "test"]
    assert [r.id for r in packed[5::3][:2]] == [packed[5].id, packed[8].id]
    assert [r.id for r in pickle.loads(pickle.dumps(packed[2:4]))] == [packed[2].id, packed[3].id]


def test_shards_are_what_webdataset_reads(several, tmp_path):
    """One sample is a run of files with one key; each must hold the image and all of its records."""
    pack(several, tmp_path / "out", images_per_shard=4, workers=1)
    shards = sorted((tmp_path / "out").glob("shard-*.tar"))
    keys, records = [], {record.id: record for record in read_manifest(several)}
    for shard in shards:
        with tarfile.open(shard) as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar}
        for name in files:
            if name.endswith(".json"):
                fields, key = json.loads(files[name]), name.removesuffix(".json")
                record = records.pop(fields["id"])
                assert files[f"{key}.mask.png"] == record.mask.read_bytes() and fields["query"] == record.query
                image = np.asarray(Image.open(io.BytesIO(files[f"{name.split('.')[0]}.image.jpg"])))
                assert np.array_equal(image, read_image(record.image))
        runs = [name.split(".")[0] for name in files]
        keys += [key for before, key in zip(["", *runs], runs) if key != before]
    assert not records and len(shards) == 3 and len(keys) == len(set(keys)) == 9


def test_a_stopped_pack_goes_on_and_writes_no_shard_twice(several, tmp_path, monkeypatch):
    whole = pack(several, tmp_path / "whole", images_per_shard=2, workers=1)
    written, write_shard = [], packing.write_shard

    def stopping(path, number, *rest):
        if len(written) == 2:
            raise KeyboardInterrupt
        write_shard(path, number, *rest)
        written.append(number)

    monkeypatch.setattr(packing, "write_shard", stopping)
    with pytest.raises(KeyboardInterrupt):
        pack(several, tmp_path / "cut", images_per_shard=2, workers=1)
    assert not (tmp_path / "cut" / "index.parquet").exists()
    monkeypatch.setattr(packing, "write_shard", lambda *given: (write_shard(*given), written.append(given[1])))
    pack(several, tmp_path / "cut", images_per_shard=2, workers=1)
    assert written == [0, 1, 2, 3, 4]
    names = sorted(path.name for path in (tmp_path / "cut").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "whole").iterdir()) and "parts" not in names
    assert all((tmp_path / "cut" / name).read_bytes() == (whole.parent / name).read_bytes() for name in names)


@pytest.mark.parametrize("out", ["cut", "several/index.parquet"])
def test_a_stopped_pack_that_is_run_again_with_larger_shards_leaves_nothing_behind(several, tmp_path, monkeypatch, out):
    """A shard that no index names would be uploaded, and read by WebDataset, with the rest."""
    with monkeypatch.context() as stopping, pytest.raises(ZeroDivisionError):
        stopping.setattr(packing, "join", lambda *_: 1 / 0)
        pack(several, tmp_path / out, images_per_shard=2, workers=1)
    folder = (tmp_path / out).parent if out.endswith(".parquet") else tmp_path / out
    parts = next(folder.glob("*parts"))
    for path in (parts / ".00004.parquet.unfinished", folder / "notes.txt", folder / "shard-notes.tar"):
        path.write_text("")
    before = {path.name for path in folder.iterdir()}
    pack(several, tmp_path / out, images_per_shard=4, workers=1)
    lost = {parts.name} if out.endswith(".parquet") else {parts.name, "shard-00003.tar", "shard-00004.tar"}
    assert {path.name for path in folder.iterdir()} == before - lost | {"index.parquet"}
    assert len(read_manifest(tmp_path / out)) == len(read_manifest(several))
    for record in read_manifest(tmp_path / out):
        load_sample(record)


def test_broken_lines_are_all_told_and_leave_no_index(lesion_lines, write_lines, tmp_path):
    lesion_lines[1]["split"] = "tset"
    lesion_lines[3]["image"] = "gone.png"
    lesion_lines[5]["id"] = lesion_lines[4]["id"]
    path = write_lines(['{"', *lesion_lines])
    with pytest.raises(ManifestError) as caught:
        pack(path, tmp_path / "out", images_per_shard=2, workers=1)
    with pytest.raises(ManifestError) as read:
        read_manifest(path)
    assert sorted(caught.value.problems) == sorted(read.value.problems) and len(read.value.problems) == 4
    assert not (tmp_path / "out" / "index.parquet").exists()


def test_another_manifest_does_not_replace_a_pack(several, manifest, tmp_path):
    pack(several, tmp_path / "out", images_per_shard=4, workers=1)
    with pytest.raises(LabError, match="is of another manifest"):
        pack(manifest, tmp_path / "out", images_per_shard=4, workers=1)
    with pytest.raises(LabError, match="must lie beside"):
        pack(manifest, tmp_path / "elsewhere" / "x.parquet", images_per_shard=4, workers=1)


def test_a_changed_index_is_read_anew(several, tmp_path):
    """A cache that went stale would train on what is no longer there."""
    index = pack(several, tmp_path / "out", images_per_shard=4, workers=1)
    before = len(read_manifest(index))
    table = pq.read_table(index)
    pq.write_table(table.slice(0, 5), index)
    assert before > 5 and len(read_manifest(index)) == 5


def test_files_of_strangers_are_refused_in_one_sentence(several, tmp_path):
    """An index may come from anyone; it must not open what lies outside its folder."""
    index = pack(several, several.parent / "index.parquet", images_per_shard=4, workers=1)
    row = pq.read_table(index).slice(0, 1).to_pylist()[0]
    for name, changed in (("up", {"mask": "../secret.png"}), ("root", {"image": "/etc/hostname"})):
        path = tmp_path / f"{name}.parquet"
        pq.write_table(pa.Table.from_pylist([row | changed], SCHEMA), path)
        with pytest.raises(LabError, match="leaves the index's folder"):
            read_manifest(path)[0]
    (tmp_path / "text.parquet").write_text("hello")
    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "other.parquet")
    for name in ("text", "other"):
        with pytest.raises(LabError, match="is not an index that core-seg data pack wrote"):
            read_manifest(tmp_path / f"{name}.parquet")
    with pytest.raises(LabError, match="cannot be read"):
        read_manifest(tmp_path / "none.parquet")


def test_a_shard_cut_short_is_one_sentence(several, tmp_path):
    index = pack(several, tmp_path / "out", images_per_shard=20, workers=1)
    shard = tmp_path / "out" / "shard-00000.tar"
    shard.write_bytes(shard.read_bytes()[:5000])
    packed = read_manifest(index)
    with pytest.raises(ImageError, match="shard-00000.tar"):
        load_sample(packed[len(packed) - 1])
    shard.unlink()
    with pytest.raises(ImageError, match="cannot be read"):
        load_sample(packed[0])


def test_packed_records_are_drawn_as_those_of_the_lines_are(several, tmp_path):
    """Packing must not change what a seed trains on; lines are in the order of the images here."""
    lines = sorted(several.read_text().splitlines(), key=lambda line: json.loads(line)["id"])
    several.write_text("\n".join(lines) + "\n")
    packed, records = read_manifest(pack(several, tmp_path / "out", 4, 1)), read_manifest(several)
    assert [record.id for record in packed] == [record.id for record in records]
    for part in (Part("a", per_batch=3, balance=0.5), Part("a", per_batch=4, queries_per_image=2)):
        a, b = (MixtureSampler([(part, given)], 50, 7, lambda: 0) for given in (packed, records))
        assert list(a) == list(b)


def test_only_what_is_looked_at_is_loaded(tmp_path):
    """A million rows would not fit; 60,000 rows of 40 MB stand for them, and Arrow tells what it has allocated."""
    rows = 60_000
    column = {name: pa.array(["x"] * rows) for name in ("modality", "anatomy", "lesion", "source", "license", "query")}
    column |= {name: pa.array([f"{name}/{i:09d}" for i in range(rows)]) for name in ("id", "image", "mask", "group")}
    column |= {"split": pa.array(["train", "val", "test"] * (rows // 3)), "reasoning": pa.array(["word " * 100] * rows)}
    column |= {"image_number": pa.array(np.arange(rows)), "shard": pa.nulls(rows)}
    column |= {name: pa.array(np.zeros(rows)) for name in set(SCHEMA.names) - set(column)}
    pq.write_table(pa.table(column).select(SCHEMA.names).cast(SCHEMA), tmp_path / "big.parquet")
    size = pa.table(column).nbytes
    mapped(tmp_path / "big.parquet")
    del column
    before = pa.total_allocated_bytes()
    records = PackedRecords(tmp_path / "big.parquet").of_split("val")
    sampler = MixtureSampler([(Part("a", per_batch=16), records)], 10, 0, lambda: 0)
    names = {records[index].id for batch in sampler for index, _ in batch}
    assert len(records) == rows // 3 and len(names) == 160 and {int(name[-9:]) % 3 for name in names} == {1}
    assert size > 40e6 and pa.total_allocated_bytes() - before < 0.05 * size


class Names(Dataset):
    """The ids of a batch, once its pixels were read."""

    def __init__(self, records) -> None:
        self.records = records

    def __getitem__(self, draws: list[tuple[int, int]]) -> list[str]:
        return [load_sample(self.records[index]).record.id for index, _ in draws]


def read_as_rank(rank: int, folder: Path, places: list[Path], batches: int) -> None:
    """One of two ranks, with two workers: writes the ids of each batch, a line a batch, for each place."""
    for number, place in enumerate(places):
        records = read_manifest(place)
        sampler = MixtureSampler([(Part("a", per_batch=4), records)], batches, 0, lambda: 0, rank, world=2)
        loader = DataLoader(Names(ConcatDataset([records])), batch_size=None, sampler=sampler, num_workers=2)
        (folder / f"{number}-{rank}").write_text("\n".join(" ".join(names) for names in loader))


def test_two_ranks_of_two_workers_read_each_sample_once_an_epoch(tmp_path):
    """13 images in batches of 4 over 2 ranks divide by nothing; none may be left out, none twice before all were."""
    manifest = write_plain(tmp_path / "plain", 13, 4, size=64)
    places = [pack(manifest, tmp_path / out, 5, 1) for out in ("shards", "plain/index.parquet")]
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=read_as_rank, args=(rank, tmp_path, places, 13)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
        assert rank.exitcode == 0
    ids = {record.id for record in read_manifest(manifest)}
    for number in range(2):
        printed = [(tmp_path / f"{number}-{rank}").read_text().splitlines() for rank in range(2)]
        drawn = [name for pair in zip(*printed, strict=True) for batch in pair for name in batch.split()]
        assert len(drawn) == 13 * 4
        for epoch in range(4):
            assert Counter(drawn[13 * epoch : 13 * (epoch + 1)]) == Counter(ids)


def test_a_run_trains_from_shards_with_the_same_keys(manifest, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["data", "pack", str(manifest), "packed"]) == 0
    losses = {}
    for name, place in (("lines", str(manifest)), ("shards", "packed")):
        part = json.dumps([{"manifest": place, "per_batch": 2}])
        flags = [
            "--data=modules.data.Lesions",
            f"--data.train={part}",
            f"--data.val={place}",
            "--data.num_workers=1",
            "--data.steps_per_epoch=3",
        ]
        flags += ["--model=tests.apps.tiny.Tiny", "--trainer.max_steps=3"]
        flags += ["--trainer.accelerator=cpu", "--trainer.log_every_n_steps=1", f"--name={name}"]
        assert main(["fit", *flags]) == 0
        lines = map(json.loads, (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines())
        losses[name] = [line["train/loss"] for line in lines if "train/loss" in line]
    assert losses["lines"] == losses["shards"] and len(losses["lines"]) == 3
