"""What visitors asked and got, kept on the server within a bound."""

import secrets
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field

import gradio as gr
import numpy as np

from apps.lab import views
from lab.model.core_seg import Scene

KEPT_RESULTS = 64
KEPT_PIXELS = 100_000_000
"""Of the images of all answers together; an answer's layers take about 21 bytes a pixel."""


@dataclass
class Result:
    """What a visitor asked and got; kept on the server, the page holds its random id."""

    image: np.ndarray
    query: str
    record: str = ""
    shown: dict[str, views.Shown] = field(default_factory=dict)
    scenes: dict[str, Scene] = field(default_factory=dict)
    asked: float = field(default_factory=time.monotonic)


class Results:
    """The last results by id; the oldest go first."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, Result] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, result: Result) -> str:
        key = secrets.token_urlsafe(16)
        with self._lock:
            self._kept[key] = result
        self.trim()
        return key

    def trim(self, older: float = float("inf")) -> None:
        """Let go of the oldest; to be called when a result has grown.

        Args:
            older: Seconds after which a result goes in any case.
        """
        with self._lock:
            while self._kept and time.monotonic() - next(iter(self._kept.values())).asked > older:
                self._kept.popitem(last=False)
            while len(self._kept) > KEPT_RESULTS or len(self._kept) > 1 and self._pixels() > KEPT_PIXELS:
                self._kept.popitem(last=False)

    def get(self, key: str | None) -> Result:
        with self._lock:
            if not key:
                raise gr.Error("Nothing was segmented yet; choose an image and press Segment.")
            if key not in self._kept:
                raise gr.Error("That result is gone; press Segment again.")
            return self._kept[key]

    def _pixels(self) -> int:
        sizes = [(result.image[..., 0].size, len(result.shown)) for result in self._kept.values()]
        return sum(size * max(1, answers) for size, answers in sizes)
