"""A small server that speaks /v1/chat/completions on 127.0.0.1, with the faults that a test plans."""

import hashlib
import json
import re
import threading
import time
from collections import Counter, defaultdict
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FINE = (
    "The tissue looks as expected. A {size} area stands out at the {location}, {contrast}. Its outline is {shape} and "
    "its margin {margin}. There are {count} of them. This fits a cyst."
)
SCORES = {"normal_anatomy": 0.9, "lesion_characteristics": 0.9, "reasoning_logic": 0.9}


class ChatServer(ThreadingHTTPServer):
    """`faults[lesion, step]` lists what happens to the requests about a lesion, first to last; then all is well."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.faults: dict[tuple[str, str], list[str]] = defaultdict(list)
        self.seen: list[tuple[float, str, str, dict]] = []
        """Every request: when, about which lesion, step and body."""
        self.keys: set[str] = set()
        self.paid: Counter[str] = Counter()
        """How often a reply was given to the same body, by its hash."""
        self.stop_after = 10**9
        """Replies after which every request hangs until the client is gone."""
        self.delay = 0.0
        """Seconds that each reply takes after it is paid for."""
        self.lock = threading.Lock()

    def count(self, lesion: str, step: str) -> int:
        return sum(seen[1:3] == (lesion, step) for seen in self.seen)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ChatServer

    def log_message(self, *_) -> None:
        pass

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        body, key = json.loads(raw), self.headers["Authorization"]
        system, user = body["messages"][0]["content"], body["messages"][1]["content"]
        step = "judge" if "You review" in system else "describe" if "describes a" in system else "reason"
        lesion = re.search(r"^Lesion: (.*)$", user[0]["text"], re.MULTILINE)[1]
        with self.server.lock:
            planned = self.server.faults[lesion, step]
            fault = planned.pop(0) if planned else ""
            self.server.seen.append((time.monotonic(), lesion, step, body))
            self.server.keys.add(key)
            if sum(self.server.paid.values()) >= self.server.stop_after:
                fault = "hang"
            elif not fault.isdigit() and fault not in ("hang", "garbage"):
                self.server.paid[hashlib.sha256(raw).hexdigest()] += 1
        if fault == "hang":
            time.sleep(2.5)
            self.close_connection = True
        elif fault.isdigit():
            retry_after = {"Retry-After": "1"} if fault == "429" else {}
            moved = {"Location": "/elsewhere"} if fault == "307" else {}
            self.answer(int(fault), json.dumps({"error": {"message": f"no, {key}"}}), retry_after | moved)
        elif fault == "garbage":
            self.answer(200, '{"choices": [{"mess')
        else:
            time.sleep(self.server.delay)
            message = {"role": "assistant", "content": said(fault, step, user[0]["text"], len(body["messages"]))}
            if fault == "refusal field":
                message |= {"content": None, "refusal": f"no, {key}"}
            finish = "length" if fault == "cut" else "stop"
            choice = {"index": 0, "finish_reason": finish, "message": message}
            usage = {"prompt_tokens": 1000, "completion_tokens": 100, "total_tokens": 1100}
            self.answer(200, json.dumps({"id": "1", "object": "chat.completion", "choices": [choice], "usage": usage}))

    def answer(self, status: int, text: str, headers: dict | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(text), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(text.encode())


def said(fault: str, step: str, asked: str, turns: int) -> str:
    """What the model says, well or with a fault; in other words when it is asked again."""
    if fault == "refusal":
        return "I'm sorry, but I can't help with that."
    if step == "judge":
        low = {"reasoning_logic": 0.4}
        scores = SCORES | (low if fault == "low" else {})
        return "Looks good to me!" if fault == "chat" else f"```json\n{json.dumps(scores)}\n```"
    if "Measured: no lesion" in asked:
        return "The tissue looks as expected. Nothing departs from it."
    words = r"Measured: location (.*), size (.*), contrast (.*), margin (.*), shape (.*), count (.*)"
    location, size, contrast, margin, shape, count = re.search(words, asked).groups()
    fine = FINE.replace("as expected", "normal" if turns > 2 else "as expected")
    fine = fine.format(location=location, size=size, contrast=contrast, margin=margin, shape=shape, count=count)
    if fault == "wrong claim":
        return fine.replace(f"at the {location}", "at the lower right")
    if fault == "brackets":
        return fine.replace(f"at the {location}", f"at the {location} (at [[12, 30, 40, 50]])")
    return fine.replace("stands out", "stands out 30 pixels from the left edge") if fault == "coordinates" else fine


@contextmanager
def chat_server():
    """A running server; it is gone afterwards."""
    server = ChatServer()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
