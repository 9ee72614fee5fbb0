"""The lab as programs call it, strangers abuse it, and a crowd uses it. Without these one visitor could see another's
files, or a file of the machine, or end the lab for all."""

import base64
import io
import json
import os
import re
import resource
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from gradio_client import Client, handle_file
from PIL import Image

from apps.lab.inspection import PUBLIC_PIXELS
from apps.lab.library import KEPT_SECONDS, Library
from apps.lab.results import Result, Results
from lab.errors import LabError

SECONDS = 60
VISITORS = 20
MAX_GROWTH = 500
"""MB."""


def picture(path, colour=(200, 30, 30), mode="RGB", **more):
    Image.new("RGB", (64, 48), colour).convert(mode).save(path, **more)
    return path


def shown_colour(column):
    """Of the first pixel in a viewer's HTML."""
    encoded = re.search(r"data:image/png;base64,([^\"]+)", column)[1]
    return Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB").getpixel((0, 0))


def segment(client, upload, query="Segment.", models=("tiny-sft",), record=None):
    given = handle_file(upload) if upload else None
    return client.predict(given, record, query, list(models), False, 1.0, 0, api_name="/segment")


@pytest.fixture
def client(lab):
    return Client(lab[0], verbose=False)


def test_every_named_endpoint_answers(client, lab, tmp_path):
    named = set(client.view_api(return_format="dict", print_info=False)["named_endpoints"])
    assert named == {"/segment", "/segment_again", "/sample", "/curves", "/rollouts"}
    upload = picture(tmp_path / "a.png")
    said = segment(client, upload, models=["tiny-sft", "tiny-grpo"])
    assert "tiny-sft" in said[0] and "tiny-grpo" in said[1] and "layer overlay" in said[5]
    answer = "<think> A dark area. </think><answer>The cyst are located at [[5,5,30,30]]. The mask is <seg>.</answer>"
    changed, before, after = client.predict("tiny-sft", answer, api_name="/segment_again")
    assert "agrees with the old one" in changed and "layer overlay" in before and "layer overlay" in after
    assert client.predict("tiny-sft", 1.0, 0, 3, api_name="/sample").count('class="completion"') == 3
    figure, differences, address = client.predict(
        ["run-0", "run-1"], ["reward"], "step", 0.5, "each run by itself", api_name="/curves"
    )
    assert figure["type"] == "plotly" and "run-0" in address
    assert any("seed" in str(row[0]) for row in differences["data"])
    with pytest.raises(Exception, match="no rollouts of step 7"):
        client.predict("run-0", 7, "as sampled", False, api_name="/rollouts")
    groups = client.predict("run-0", 1, "as sampled", False, api_name="/rollouts")
    assert groups.count('class="group"') == 2


def test_a_result_belongs_to_the_session_that_asked(client, lab, tmp_path):
    segment(client, picture(tmp_path / "a.png"))
    with pytest.raises(Exception, match="not in the list of choices: ..$"):
        Client(lab[0], verbose=False).predict("tiny-sft", "x", api_name="/segment_again")


@pytest.mark.parametrize(
    "content, query, models, words",
    [
        (b"<html>", "Segment.", ["tiny-sft"], "not an image"),
        (b"", "Segment.", ["tiny-sft"], "empty"),
        (b"\x89PNG\r\n\x1a\n\0\0", "Segment.", ["tiny-sft"], "not an image|damaged"),
        (None, "Segment.", ["tiny-sft"], "Choose an image"),
        ("image", " ", ["tiny-sft"], "1 to 300"),
        ("image", "x" * 301, ["tiny-sft"], "1 to 300"),
        ("image", "Segment.", [], "1 to 4 models"),
        ("image", "Segment.", ["../../etc"], "not in the list"),
    ],
)
def test_bad_input_gets_one_sentence(client, tmp_path, content, query, models, words):
    path = tmp_path / "a.png"
    if content == "image":
        picture(path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(Exception, match=words) as error:
        segment(client, path if path.exists() else None, query, models)
    assert str(tmp_path) not in str(error.value) and "Traceback" not in str(error.value)
    assert "/tmp/" not in str(error.value)


def png(width, height, rows):
    """A PNG whose header promises width x height and whose data are `rows` rows of zeros."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packed = zlib.compressobj(9)
    body = b"".join(packed.compress(b"\0" * (width + 1)) for _ in range(rows)) + packed.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def test_a_bomb_is_refused_before_it_is_unpacked(client, tmp_path):
    (tmp_path / "a.png").write_bytes(png(20000, 20000, 2000))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(Exception, match="64 megapixels"):
        segment(client, tmp_path / "a.png")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


@pytest.mark.parametrize(
    "name, mode, more",
    [
        ("a.jpg", "CMYK", {}),
        ("a.png", "P", {}),
        ("a.png", "LA", {}),
        ("a.png", "1", {}),
        ("a.png", "RGB", {"save_all": True, "append_images": [Image.new("RGB", (64, 48))], "duration": 9}),
        ("a.webp", "RGB", {"save_all": True, "append_images": [Image.new("RGB", (64, 48))]}),
        ("a.tif", "I;16", {}),
    ],
)
def test_unusual_images_are_taken(client, tmp_path, name, mode, more):
    if mode == "I;16":
        Image.fromarray(np.full((48, 64), 30000, np.uint16)).save(tmp_path / name)
    else:
        picture(tmp_path / name, mode=mode, **more)
    assert "figures" in segment(client, tmp_path / name)[0]


def test_markup_in_a_query_and_in_an_answer_stays_text(client, tmp_path):
    evil = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    said = segment(client, picture(tmp_path / "a.png"), evil)
    said += client.predict("tiny-sft", f"<think> {evil} </think> {evil}", api_name="/segment_again")
    html = " ".join(str(part) for part in said[:-1] if "class=" in str(part))
    assert "<script" not in html and "onerror" not in re.sub(r"&lt;.*?&gt;", "", html)


def test_what_is_missing_or_foreign_is_named(lab, tmp_path):
    library = Library(tmp_path / "releases")
    for name, weights in (("cut", b"\x08"), ("foreign", b"")):
        (tmp_path / "releases" / name).mkdir(parents=True)
        (tmp_path / "releases" / name / "config.json").write_text('{"architectures": ["BertModel"]}')
        (tmp_path / "releases" / name / "model.safetensors").write_bytes(weights)
        with pytest.raises(LabError) as error:
            library.model(name)
        assert "\n" not in str(error.value) and name in str(error.value)
    with pytest.raises(LabError, match="no model"):
        library.model("../" + str(lab[1] / "releases" / "tiny-sft"))
    with pytest.raises(LabError, match="no run"):
        library.run("../../etc")


def test_a_run_shows_its_images_though_the_lab_was_given_no_manifest(lab):
    library = Library(lab[1] / "releases", lab[1] / "runs")
    ids = {json.loads(line)["id"] for line in (lab[1] / "data" / "manifest.jsonl").read_text().splitlines()}
    assert set(library.records_of(library.run("run-0"))) == ids


def test_a_record_whose_image_is_gone_is_an_error_and_no_more(client, lab, tmp_path):
    lines = (lab[1] / "data" / "manifest.jsonl").read_text().splitlines()
    record = json.loads(lines[0])
    path = lab[1] / "data" / record["image"]
    kept = path.read_bytes()
    path.unlink()
    try:
        with pytest.raises(Exception, match="does not exist"):
            segment(client, None, record=record["id"])
    finally:
        path.write_bytes(kept)
    assert "figures" in segment(client, None, record=record["id"])[0]


class TestAbuse:
    """By raw HTTP, against both kinds of lab."""

    @pytest.fixture(params=["local", "public"])
    def address(self, request, lab, public):
        return (lab[0] if request.param == "local" else public).rstrip("/")

    def call(self, address, data, name="segment"):
        """What a call ends in: the text of its event stream."""
        started = httpx.post(f"{address}/gradio_api/call/{name}", json={"data": data})
        if started.status_code != 200:
            return started.text
        return httpx.get(f"{address}/gradio_api/call/{name}/{started.json()['event_id']}", timeout=60).text

    def join(self, address, number, data):
        """As the page itself calls what is not named."""
        session = "abuse" + os.urandom(4).hex()
        body = {"fn_index": number, "session_hash": session, "data": data}
        started = httpx.post(f"{address}/gradio_api/queue/join", json=body)
        if started.status_code != 200:
            return started.text
        heard = []
        with httpx.stream("GET", f"{address}/gradio_api/queue/data?session_hash={session}", timeout=60) as stream:
            for line in stream.iter_lines():
                heard.append(line)
                if "process_completed" in line or "close_stream" in line:
                    break
        return "\n".join(heard)

    def test_no_file_of_the_machine_is_served(self, address, lab):
        wanted = ["/etc/passwd", "../../../etc/passwd", "%2e%2e/%2e%2e/etc/passwd", "http://169.254.169.254/latest"]
        wanted += [str(lab[1] / "releases" / "tiny-sft" / "model.safetensors"), str(lab[1] / "data" / "manifest.jsonl")]
        wanted += [str(path) for path in (lab[1] / "runs").rglob("*.ckpt")] + ["apps/lab/page.py", "/proc/self/environ"]
        for path in wanted:
            for route in ("/gradio_api/file=", "/file=", "/gradio_api/file/", "/static/", "/assets/"):
                answer = httpx.get(address + route + path)
                assert answer.status_code in (403, 404, 405, 500) or "root:" not in answer.text, (route, path)
                assert answer.status_code != 200 or "<html" in answer.text.lower(), (route, path)

    def test_a_path_instead_of_an_upload_is_refused(self, address, lab):
        models = ["tiny-sft"]
        for path in ("/etc/passwd", str(lab[1] / "data" / "manifest.jsonl"), "../../etc/passwd"):
            given = {"path": path, "meta": {"_type": "gradio.FileData"}}
            text = self.call(address, [given, None, "Segment.", models, False, 1.0, 0, 0, 0, 0])
            assert "event: error" in text and "root:" not in text

    def test_nothing_is_fetched(self, address, monkeypatch):
        """An address instead of an upload: the lab must not open it, nor hand it to gradio, which would."""
        visits = []

        async def fetch(url, folder):
            visits.append(url)
            raise ValueError(url)

        monkeypatch.setattr("gradio.processing_utils.async_ssrf_protected_download", fetch)
        url = "https://example.com/a.png"
        config = httpx.get(f"{address}/config").json()
        numbers = [n for n, function in enumerate(config["dependencies"]) if function["backend_fn"]]
        for given in ({"path": url}, {"path": "HTTPS" + url[5:]}, {"path": "a.png", "url": url}):
            given |= {"meta": {"_type": "gradio.FileData"}}
            text = self.call(address, [given, None, "Segment.", ["tiny-sft"], False, 1.0, 0, 0, 0, 0])
            assert "event: error" in text
            for number in numbers:
                self.join(address, number, [given] * len(config["dependencies"][number]["inputs"]))
        assert not visits

    def test_every_function_survives_nonsense(self, address):
        """Also those without a name, called as the page calls them."""
        config = httpx.get(f"{address}/config").json()
        for number, function in enumerate(config["dependencies"]):
            if not function["backend_fn"]:
                continue
            for value in ("../../etc/passwd", None, -1, [["x"]], {"path": "/etc/passwd"}):
                text = self.join(address, number, [value] * len(function["inputs"]))
                assert "root:" not in text and "Traceback" not in text
        assert httpx.get(address).status_code == 200

    def test_a_flood_of_tokens_or_samples_is_refused(self, address, tmp_path):
        client = Client(address, verbose=False)
        segment(client, picture(tmp_path / "a.png"))
        with pytest.raises(Exception, match="8"):
            client.predict("tiny-sft", 1.0, 0, 10_000, api_name="/sample")
        with pytest.raises(Exception, match="4000"):
            client.predict("tiny-sft", "x" * 4001, api_name="/segment_again")
        with pytest.raises(Exception, match="No answer holds the token .image.;"):
            client.predict("tiny-sft", "<think> <image> </think>", api_name="/segment_again")


def test_strangers_see_releases_only(public, lab, tmp_path):
    config = httpx.get(f"{public.rstrip('/')}/config").text
    assert str(lab[1]) not in config and "run-0" not in config
    tabs = [part["props"]["label"] for part in json.loads(config)["components"] if part["type"] == "tabitem"]
    assert tabs == ["Inspect"]
    client = Client(public, verbose=False)
    named = set(client.view_api(return_format="dict", print_info=False)["named_endpoints"])
    assert named == {"/segment", "/segment_again", "/sample"}
    assert "figures" in segment(client, picture(tmp_path / "a.png"))[0]
    (tmp_path / "a.dcm").write_bytes(b"\0" * 128 + b"DICM")
    with pytest.raises(Exception, match="not an image|is no image|Invalid file type"):
        segment(client, tmp_path / "a.dcm")
    Image.new("L", (5000, PUBLIC_PIXELS // 5000 + 1)).save(tmp_path / "b.png")
    with pytest.raises(Exception, match="16 megapixels"):
        segment(client, tmp_path / "b.png")
    with pytest.raises(Exception, match="not in the list"):
        segment(client, tmp_path / "a.png", models=["run-0/last"])
    big = httpx.post(f"{public.rstrip('/')}/gradio_api/upload", files={"files": ("a.png", b"\0" * 11_000_000)})
    assert big.status_code == 413


def test_results_stay_within_a_bound():
    results = Results()
    keys = [results.add(Result(np.zeros((5000, 5000, 3), np.uint8), "q")) for _ in range(6)]
    assert results.get(keys[-1]) and len(results._kept) == 4
    with pytest.raises(Exception, match="gone"):
        results.get(keys[0])
    results.get(keys[-1]).shown = {"a": None, "b": None}  # what it holds grows with each answer
    results.trim()
    assert len(results._kept) == 3


def test_what_a_visitor_sent_and_made_is_gone_after_an_hour_without_another_visitor(tmp_path):
    library = Library(tmp_path)
    key, folder = library.results.add(Result(np.zeros((4, 4, 3), np.uint8), "q")), library.scratch()
    library.tidy()
    assert library.results.get(key) and folder.is_dir()
    library.results.get(key).asked -= KEPT_SECONDS + 1
    os.utime(folder, (0, 0))
    library.tidy()
    assert not folder.is_dir()
    with pytest.raises(Exception, match="gone"):
        library.results.get(key)


def resident() -> float:
    """MB that this process, which serves the lab, holds."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


@pytest.mark.slow
def test_a_crowd_gets_its_own_answers_within_bounded_memory(public, tmp_path):
    """Twenty visitors for a minute, each with a picture of its own colour: whoever gets another's is told apart."""
    end, answers, wrong = time.monotonic() + SECONDS, [], []

    def visit(number):
        colour = (10 * number, 255 - 10 * number, 7 * number)
        upload = picture(tmp_path / f"{number}.png", colour)
        try:
            client = Client(public, verbose=False)
            while time.monotonic() < end:
                said = segment(client, upload, f"Segment lesion {number}.")
                answers.append(number)
                if shown_colour(said[4]) != colour:
                    wrong.append((number, shown_colour(said[4])))
        except Exception as error:
            wrong.append(error)

    with ThreadPoolExecutor(VISITORS) as pool:
        waiting = [pool.submit(visit, number) for number in range(VISITORS)]
        time.sleep(SECONDS / 3)
        early = resident()
        for one in waiting:
            one.result()
    assert not wrong and set(answers) == set(range(VISITORS))
    assert resident() - early < MAX_GROWTH
