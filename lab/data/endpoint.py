"""A multimodal model behind an OpenAI-compatible endpoint, each of whose replies is paid for once.

Replies are appended to a file, keyed by the hash of everything that was sent. The API key is read from OPENAI_API_KEY
by the client, goes to the endpoint alone, and is blotted out wherever a server repeats it.
"""

import asyncio
import fcntl
import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from lab.errors import LabError

RETRIES = 6
"""Of a request answered with 408, 409, 429 or 5xx, or not at all; after growing pauses, or as Retry-After asks."""
MALFORMED = 3
"""How often a request is sent whose answer is not what the protocol says."""
MAX_TOKENS = 2000
"""Of one reply."""


class Unanswered(Exception):
    """A request without a usable reply; another start may bring one."""


@dataclass
class Usage:
    """What an endpoint was asked in this run."""

    requests: int = 0
    """HTTP requests, repeated ones too."""
    paid: int = 0
    """Replies that came and were not in the cache."""
    remembered: int = 0
    """Replies from the cache."""
    tokens_in: int = 0
    """As the endpoint counted them; of paid replies."""
    tokens_out: int = 0


class ReplyCache:
    """Replies in an append-only JSONL file; what a kill cut short is dropped, and two processes cannot share it."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("a+b")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LabError(f"'{path}' is in use by another core-seg data reason; wait for it, or end it") from None
        self.file.seek(0)
        content = self.file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self.file.truncate(len(whole))
        try:
            self.replies = {line["key"]: line for line in map(json.loads, whole.splitlines())}
        except (ValueError, KeyError, TypeError):
            raise LabError(f"'{path}' is not a file of replies; move it away") from None

    def __enter__(self) -> "ReplyCache":
        return self

    def __exit__(self, *_) -> None:
        self.file.close()

    def add(self, key: str, line: dict) -> None:
        """Keep a reply, at once."""
        self.replies[key] = line
        self.file.write(json.dumps({"key": key, **line}).encode() + b"\n")
        self.file.flush()


@dataclass
class Reply:
    """What a model said; `problem` says why it is not to be used: a refusal, or a text that was cut."""

    text: str
    problem: str = ""


@dataclass
class Endpoint:
    """Asks an endpoint; to be made and used within one event loop.

    Raises:
        LabError: A URL that cannot be used.
    """

    url: str
    cache: ReplyCache
    timeout: float
    """Seconds until a request counts as unanswered."""
    per_minute: float
    """HTTP requests a minute at most, repeated ones included; 0: no limit."""
    usage: Usage = field(default_factory=Usage)

    def __post_init__(self) -> None:
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient

        check_url(self.url)
        self._key = os.environ.get("OPENAI_API_KEY", "").strip()
        self._pace, self._next = asyncio.Lock(), 0.0
        self._under_way: set[asyncio.Task] = set()
        # A redirection would take the image to another place than the one that was given.
        client = DefaultAsyncHttpxClient(event_hooks={"request": [self._wait_for_turn]}, follow_redirects=False)
        self._client = AsyncOpenAI(
            base_url=self.url,
            api_key=self._key or "none",
            timeout=self.timeout,
            max_retries=RETRIES,
            http_client=client,
        )

    async def __aenter__(self) -> "Endpoint":
        return self

    async def __aexit__(self, *_) -> None:
        if self._under_way:
            print(f"waiting for {len(self._under_way)} calls that may be paid; Ctrl-C gives them up")
            await asyncio.gather(*self._under_way, return_exceptions=True)
        await self._client.close()

    async def ask(self, model: str, messages: list[dict]) -> Reply:
        """The reply to a conversation, from the cache where the same was asked before.

        Raises:
            LabError: The endpoint refuses the key, the model or the path: asking more is of no use.
            Unanswered: No usable reply after all retries, or the endpoint will not take this request.
        """
        sent = {"model": model, "messages": messages, "max_completion_tokens": MAX_TOKENS}
        key = hashlib.sha256(json.dumps(sent, sort_keys=True).encode()).hexdigest()
        if key in self.cache.replies:
            self.usage.remembered += 1
        else:
            # Shielded, so that what is under way when a run is stopped is kept: see __aexit__.
            call = asyncio.create_task(self._send(key, sent))
            self._under_way.add(call)
            call.add_done_callback(self._under_way.discard)
            await asyncio.shield(call)
        return Reply(self.cache.replies[key]["text"], self.cache.replies[key]["problem"])

    async def _send(self, key: str, sent: dict) -> None:
        import openai

        for _ in range(MALFORMED):
            try:
                answer = await self._client.chat.completions.with_raw_response.create(**sent)
            except openai.APIStatusError as error:
                said = self.blot(" ".join(error.message.split()))[:300]
                if error.status_code in (401, 403, 404) or 300 <= error.status_code < 400:
                    raise LabError(
                        f"{self.url} answers {error.status_code} ({said}); check --endpoint, --model and OPENAI_API_KEY"
                    ) from None
                raise Unanswered(f"answered {error.status_code}: {said}") from None
            except openai.APITimeoutError:
                raise Unanswered(f"no answer within {self.timeout:g} s, {RETRIES + 1} times") from None
            except openai.APIConnectionError as error:
                raise Unanswered(f"no connection ({type(error.__cause__).__name__})") from None
            try:
                line = _read(answer.text)
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                continue
            self.usage.paid += 1
            self.usage.tokens_in += line["tokens_in"]
            self.usage.tokens_out += line["tokens_out"]
            said = {name: self.blot(line[name]) for name in ("text", "problem")}
            self.cache.add(key, line | {"model": sent["model"]} | said)
            return
        raise Unanswered(f"{MALFORMED} answers that do not keep to the protocol")

    def blot(self, text: str) -> str:
        """A text of the server's without our key."""
        return text.replace(self._key, "***") if self._key else text

    async def _wait_for_turn(self, _) -> None:
        self.usage.requests += 1
        if self.per_minute:
            async with self._pace:
                now = asyncio.get_running_loop().time()
                self._next = max(now, self._next) + 60 / self.per_minute
                wait = self._next - 60 / self.per_minute - now
            await asyncio.sleep(wait)


def check_url(url: str) -> None:
    """Refuse what is no http(s) URL, and one with a password, which would be printed.

    Raises:
        LabError: As said.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise LabError(f"--endpoint '{url}' is not a URL such as https://host/v1; correct it")
    if parts.username or parts.password or parts.query:
        raise LabError(
            f"--endpoint at {parts.hostname} carries a user, a password or a query; put the key in OPENAI_API_KEY"
        )


def is_plain(url: str) -> bool:
    """Whether images would cross a network unencrypted."""
    parts = urlsplit(url)
    return parts.scheme == "http" and not re.fullmatch(r"localhost|127(?:\.\d+){3}|::1", parts.hostname)


def _read(body: str) -> dict:
    answer = json.loads(body)
    choice = answer["choices"][0]
    message, usage = choice["message"], answer.get("usage") or {}
    refusal = message.get("refusal") or (choice.get("finish_reason") == "content_filter" and "content filter")
    text = message.get("content") or ""
    if not isinstance(text, str):
        raise ValueError("content is no text")
    cut = "It was cut short; write less." if choice.get("finish_reason") == "length" else ""
    return {
        "text": text.encode(errors="replace").decode(),
        "problem": f"It was refused ({ascii(refusal)})." if refusal else cut,
        "tokens_in": int(usage.get("prompt_tokens") or 0),
        "tokens_out": int(usage.get("completion_tokens") or 0),
    }
