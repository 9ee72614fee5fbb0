"""What the benchmarks measure with: seconds by part, and peak memory."""

import ctypes
import gc
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import psutil


class Clock:
    """Seconds by part, of whatever was timed."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def time(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - start

    def wrap(self, owner: object, method: str, part: str) -> None:
        """Time every call of a method."""
        call = getattr(owner, method)

        def timed(*args, **kwargs):
            with self.time(part):
                return call(*args, **kwargs)

        setattr(owner, method, timed)


class PeakMemory:
    """Peak resident memory of this process within the block, above what it held before, in MB."""

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what the side before freed is given back
        self.process, self.stop = psutil.Process(), threading.Event()
        self.before = self.peak = self.process.memory_info().rss
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.stop.wait(0.01):
            self.peak = max(self.peak, self.process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()
        self.megabytes = (self.peak - self.before) / 1e6
