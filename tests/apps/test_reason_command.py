"""`core-seg data reason` end to end against a real local server. Without these money is spent twice, an image leaves
the machine unasked, a sample is lost without a word, or a text is kept that must not be learnt from."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from apps.cli import main
from lab.data import endpoint
from lab.data.facts import measure
from lab.data.images import load_sample
from lab.data.manifest import read_manifest
from lab.data.reasoning import check_claims, parse_claims
from tests.data.chat_server import chat_server

ROOT = Path(__file__).parents[2]
KEY = "sk-secret-4567"


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with chat_server() as running:
        yield running


@pytest.fixture
def cysts(tmp_path) -> Path:
    """A manifest of twelve records, each with a lesion of its own name at the upper left; the last has none."""
    lines = []
    for number in range(12):
        mask = np.zeros((60, 60), np.uint8)
        if number < 11:
            cv2.ellipse(mask, (14, 12), (8 - number % 3, 6), 30, 0, 360, 255, -1)
        image = np.random.default_rng(number).integers(90, 130, (60, 60, 3), dtype=np.uint8)
        image[mask > 0] //= 2
        cv2.imwrite(str(tmp_path / f"{number}.png"), image)
        cv2.imwrite(str(tmp_path / f"{number}m.png"), mask)
        lines.append(
            {"id": f"c/{number}", "image": f"{number}.png", "mask": f"{number}m.png", "width": 60, "height": 60}
            | {"modality": "ultrasound", "anatomy": "breast", "lesion": f"cyst {chr(97 + number)}", "source": "c"}
            | {"license": "CC0", "split": "train", "group": str(number), "mask_fraction": round((mask > 0).mean(), 5)}
        )
    lines[-1]["lesion"] = "none"
    path = tmp_path / "manifest.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def asked(manifest, server, *flags):
    flags = ["--endpoint", server.url, "--model", "author", "--judge", "judge", "--timeout", "0.7", *flags]
    return ["data", "reason", str(manifest), "out.jsonl", *flags]


def started(manifest, server, half_way) -> subprocess.Popen:
    """The command in a process of its own, as soon as `half_way` holds."""
    command = [sys.executable, "-W", "ignore", "-m", "lab", *asked(manifest, server, "--concurrency", "3")]
    command[command.index("--timeout") + 1] = "60"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not half_way():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    return process


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def outcomes(manifest):
    return {line["id"]: line for line in read(manifest.parent / "out.outcomes.jsonl")}


def test_facts_send_nothing_and_are_true(cysts, monkeypatch, capsys):
    """No image leaves the machine without --endpoint."""
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a connection was opened"))
    assert main(["data", "reason", str(cysts), "out.jsonl"]) == 0
    records = read_manifest(cysts.parent / "out.jsonl")
    assert len(records) == 12 and "12 written, 0 rejected, 0 unanswered" in capsys.readouterr().out
    assert len({record.reasoning for record in records}) > 3  # phrasings vary
    for record in records:
        sample = load_sample(record)
        assert all(check_claims(parse_claims(record.reasoning), measure(sample.image, sample.mask)).values())
    first = (cysts.parent / "out.jsonl").read_text()
    assert main(["data", "reason", str(cysts), "out.jsonl"]) == 0
    assert (cysts.parent / "out.jsonl").read_text() == first
    assert main(["data", "reason", str(cysts), "out.jsonl", "--seed", "1"]) == 0
    assert (cysts.parent / "out.jsonl").read_text() != first


def test_every_fault_of_a_server_ends_written_or_rejected_with_a_reason(cysts, server, capsys):
    planned = {
        ("cyst a", "describe"): ["429"],
        ("cyst b", "describe"): ["500", "hang", "garbage"],
        ("cyst c", "describe"): ["refusal"],
        ("cyst c", "reason"): ["coordinates", "wrong claim"],
        ("cyst d", "reason"): ["refusal"] * 4,
        ("cyst e", "reason"): ["coordinates"] * 4,
        ("cyst f", "judge"): ["low", "chat"],
        ("cyst g", "judge"): ["low"] * 4,
        ("cyst h", "judge"): ["chat"] * 3,
        ("cyst i", "reason"): ["brackets"],
        ("cyst j", "reason"): ["cut", "refusal field"],
        ("cyst k", "reason"): ["400"],
    }
    server.faults.update({key: list(value) for key, value in planned.items()})
    code = main(asked(cysts, server, "--price_in", "2", "--price_out", "10"))
    said = capsys.readouterr()
    ended = outcomes(cysts)
    assert code == 2  # cyst k was not answered
    assert "12 records: 7 written, 4 rejected, 1 unanswered; 15 rewrites" in said.err
    states = {name: ended[f"c/{place}"] for place, name in enumerate("abcdefghijkl")}
    assert "".join(name for name, line in states.items() if line["state"] == "written") == "abcfijl"
    assert {name: line["rewrites"] for name, line in states.items() if line["rewrites"]} == {
        "c": 3, "d": 3, "e": 3, "f": 1, "g": 3, "j": 2,
    }  # fmt: skip
    reasons = {name: line["reason"] for name, line in states.items() if line["state"] != "written"}
    assert "refusal" in reasons["d"] and "'30'" in reasons["e"] and "scored it 0.7" in reasons["g"]
    assert "no scores that can be read" in reasons["h"] and "400" in reasons["k"]

    kept = read_manifest(cysts.parent / "out.jsonl")
    assert [record.id for record in kept] == [line["id"] for line in states.values() if line["state"] == "written"]
    assert not any(letter in record.reasoning for record in kept for letter in "0123456789[]%")
    before = {line["id"]: line for line in read(cysts)}
    for line in read(cysts.parent / "out.jsonl"):
        assert {name: value for name, value in line.items() if name != "reasoning"} == before[line["id"]]

    paid = sum(server.paid.values())
    bill = f"{paid} calls paid ({1000 * paid} tokens in, {100 * paid} out, {paid * (2000 + 1000) / 1e6:.4f} US dollars)"
    assert bill in said.out
    files = [path for path in cysts.parent.iterdir() if path.suffix in (".jsonl", ".part")]
    assert KEY not in said.out + said.err + "".join(path.read_text() for path in files)

    server.faults.clear()
    assert main(asked(cysts, server)) == 0  # only cyst k is asked about: one text and one score
    assert "8 written, 4 rejected, 0 unanswered" in (said := capsys.readouterr().out)
    assert "2 calls paid" in said
    assert max(server.paid.values()) == 1


def test_mask_and_boxes_are_kept_from_the_step_that_writes(cysts, server):
    assert main(asked(cysts, server, "--limit", "2")) == 0
    pictures = {"describe": set(), "reason": set(), "judge": set()}
    for _, _, step, body in server.seen:
        content = body["messages"][1]["content"]
        pictures[step].add(sum(part["type"] == "image_url" for part in content))
        assert ("Boxes" in content[0]["text"]) == (step == "describe")
    assert pictures == {"describe": {2}, "reason": {1}, "judge": {2}}


def test_a_kill_half_way_repeats_no_paid_call(cysts, server):
    server.stop_after = 14
    calls = cysts.parent / "out.calls.jsonl"
    process = started(
        cysts, server, lambda: calls.is_file() and len(calls.read_bytes().splitlines()) == server.stop_after
    )
    process.kill()
    process.wait()
    assert not (cysts.parent / "out.jsonl").exists()
    server.stop_after = 10**9
    assert main(asked(cysts, server)) == 0
    assert {line["state"] for line in outcomes(cysts).values()} == {"written"}
    assert sum(server.paid.values()) == len(server.paid) == 12 * 3  # describe, reason and judge, each once


def test_ctrl_c_keeps_the_replies_that_are_on_their_way(cysts, server):
    server.delay = 0.3
    process = started(cysts, server, lambda: sum(server.paid.values()) >= 3)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    paid = sum(server.paid.values())
    assert paid < 36 and len(read(cysts.parent / "out.calls.jsonl")) == paid


def test_a_server_that_is_gone_ends_the_run_soon(cysts, server, monkeypatch, capsys):
    monkeypatch.setattr(endpoint, "RETRIES", 0)
    for name in "abcdefghijk":
        server.faults[f"cyst {name}", "describe"] = ["500"] * 9
    server.faults["none", "describe"] = ["500"] * 9
    assert main(asked(cysts, server, "--concurrency", "2")) == 2
    assert "10 records in a row got no answer (answered 500" in capsys.readouterr().err
    assert len(server.seen) <= 11


def test_a_dry_run_sends_nothing_and_tells_what_it_would_cost(cysts, server, capsys):
    flags = ["--dry_run", "--price_in", "2.5", "--price_out", "10", "--tokens_in", "2000", "--tokens_out", "300"]
    assert main(asked(cysts, server, *flags, "--seconds", "4", "--concurrency", "2")) == 0
    said = capsys.readouterr().out
    calls, price = 12 * 3, (2000 * 2.5 + 300 * 10) / 1e6
    most = calls + 12 * 3 * 2  # each written three times more, and judged
    assert f"{calls} to {most} calls, {calls * price:.2f} to {most * price:.2f} US dollars" in said
    assert f"{calls * 4 / 2 / 60:.1f} to {most * 4 / 2 / 60:.1f} minutes" in said
    assert server.seen == [] and not (cysts.parent / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "m"], "need --endpoint"),
        (["--endpoint", "http://127.0.0.1:9/v1"], "needs a --model"),
        (["--endpoint", "nonsense", "--model", "m"], "is not a URL"),
        (["--endpoint", "http://127.0.0.1:9/v1", "--model", "m", "--concurrency", "0"], "--concurrency"),
        (["--api_key", "x"], "--api_key"),
    ],
)
def test_wrong_flags_end_in_one_sentence(cysts, capsys, flags, words):
    """A key on the command line would be seen by every user of the machine: there is no such flag."""
    assert main(["data", "reason", str(cysts), "out.jsonl", *flags]) == 2
    assert words in capsys.readouterr().err


def test_the_manifest_itself_is_never_overwritten(cysts, capsys):
    before = cysts.read_text()
    assert main(["data", "reason", str(cysts), cysts.name]) == 2
    assert cysts.read_text() == before


def test_a_damaged_image_is_rejected_by_name_and_the_rest_is_written(cysts, capsys):
    picture = cysts.parent / "3.png"
    picture.write_bytes(picture.read_bytes()[:2000])
    assert main(["data", "reason", str(cysts), "out.jsonl"]) == 0
    assert "11 written, 1 rejected" in capsys.readouterr().out
    assert "damaged" in outcomes(cysts)["c/3"]["reason"]
