"""Without these an image, a key or money goes where it should not."""

import asyncio
import json
import time

import pytest

from lab.data import endpoint
from lab.data.endpoint import Endpoint, ReplyCache, Unanswered, check_url, is_plain
from lab.errors import LabError
from tests.data.chat_server import chat_server

KEY = "sk-secret-0123"
MESSAGES = [
    {"role": "system", "content": "One who describes a picture."},
    {"role": "user", "content": [{"type": "text", "text": "Lesion: cyst\nMeasured: no lesion"}]},
]


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with chat_server() as running:
        yield running


def ask(server, path, *conversations, **settings):
    """The replies to conversations asked at once, and the endpoint."""

    async def all_at_once():
        limits = settings.get("timeout", 5.0), settings.get("per_minute", 0.0)
        with ReplyCache(path) as cache:
            async with Endpoint(server.url, cache, *limits) as asked:
                return await asyncio.gather(*(asked.ask("m", messages) for messages in conversations)), asked

    return asyncio.run(all_at_once())


def numbered(count):
    return [[*MESSAGES, {"role": "user", "content": str(number)}] for number in range(count)]


def test_what_was_asked_before_is_not_asked_again_and_anything_else_is(server, tmp_path):
    first, _ = ask(server, tmp_path / "calls", MESSAGES)
    again, asked = ask(server, tmp_path / "calls", MESSAGES, numbered(1)[0])
    assert again[0] == first[0]
    assert (asked.usage.remembered, asked.usage.paid, sum(server.paid.values())) == (1, 1, 2)


def test_a_line_that_a_kill_cut_short_is_dropped_and_the_rest_is_kept(server, tmp_path):
    ask(server, tmp_path / "calls", *numbered(2))
    with (tmp_path / "calls").open("ab") as file:
        file.write(b'{"key": "abc", "te')
    _, asked = ask(server, tmp_path / "calls", *numbered(3))
    assert (asked.usage.remembered, asked.usage.paid) == (2, 1)
    assert len([json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]) == 3


def test_two_processes_do_not_pay_for_the_same(tmp_path):
    with ReplyCache(tmp_path / "calls"), pytest.raises(LabError, match="in use by another"):
        ReplyCache(tmp_path / "calls")


def test_another_file_is_not_taken_for_a_cache(tmp_path):
    (tmp_path / "calls").write_text('{"id": "1"}\n')
    with pytest.raises(LabError, match="not a file of replies"):
        ReplyCache(tmp_path / "calls")
    assert (tmp_path / "calls").read_text() == '{"id": "1"}\n'


def test_retry_after_is_obeyed(server, tmp_path):
    server.faults["cyst", "describe"] = ["429"]
    ask(server, tmp_path / "calls", MESSAGES)
    (first, *_), (second, *_) = server.seen
    assert second - first >= 1  # as the header says; without it the client would wait for half a second


def test_errors_time_outs_and_garbage_are_asked_again(server, tmp_path):
    server.faults["cyst", "describe"] = ["500", "hang", "garbage", "garbage"]
    replies, asked = ask(server, tmp_path / "calls", MESSAGES, timeout=0.5)
    assert replies[0].text.startswith("The tissue") and not replies[0].problem
    assert (asked.usage.requests, asked.usage.paid) == (5, 1)


def test_garbage_without_end_is_given_up(server, tmp_path):
    server.faults["cyst", "describe"] = ["garbage"] * 9
    with pytest.raises(Unanswered, match="protocol"):
        ask(server, tmp_path / "calls", MESSAGES)
    assert server.count("cyst", "describe") == endpoint.MALFORMED


@pytest.mark.parametrize("status", ["401", "403", "404", "307"])
def test_what_will_never_work_ends_the_run_without_telling_the_key(server, tmp_path, status):
    """A redirection is not followed either: the image would go to another place than the user named."""
    server.faults["cyst", "describe"] = [status] * 9
    with pytest.raises(LabError, match=status) as caught:
        ask(server, tmp_path / "calls", MESSAGES)
    assert len(server.seen) == 1
    assert KEY not in str(caught.value)


def test_the_key_is_sent_and_kept_nowhere(server, tmp_path):
    server.faults["cyst", "describe"] = ["refusal field"]
    replies, _ = ask(server, tmp_path / "calls", MESSAGES)
    assert server.keys == {f"Bearer {KEY}"}
    assert "***" in replies[0].problem  # the server repeated it
    assert KEY not in (tmp_path / "calls").read_text()


def test_the_rate_limit_holds_for_many_at_once_and_for_repeated_requests(server, tmp_path):
    server.faults["cyst", "describe"] = ["500"]
    start = time.monotonic()
    ask(server, tmp_path / "calls", *numbered(6), per_minute=600)
    times = sorted(seen[0] for seen in server.seen)
    assert len(times) == 7
    assert times[-1] - start >= 0.1 * 6 - 0.02
    assert min(later - earlier for earlier, later in zip(times, times[1:])) > 0.05


@pytest.mark.parametrize(
    "url", ["localhost:8000/v1", "ftp://host/v1", "https://", "https://me:word@host/v1", "http://h/v1?key=1"]
)
def test_a_url_that_is_none_or_holds_a_password_is_refused(url):
    with pytest.raises(LabError) as caught:
        check_url(url)
    assert "word" not in str(caught.value).replace("password", "")


def test_plain_http_is_told_apart_where_it_leaves_the_machine():
    plain = {
        url: is_plain(url) for url in ("http://a.org/v1", "https://a.org/v1", "http://localhost/v1", "http://[::1]/v1")
    }
    assert list(plain.values()) == [True, False, False, False]
