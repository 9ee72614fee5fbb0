"""How this process asks the system for memory."""

import ctypes
import platform

MALLOPT = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, 2**31 - 1), "M_TOP_PAD": (-2, 2**28)}
"""glibc's numbers for what is set, and the values: no allocation by mmap, nothing given back, 256 MB at a time."""


def keep_freed_memory() -> None:
    """Have glibc keep what tensors free, for the next step's tensors; elsewhere than on Linux this does nothing.

    By default each tensor of some MB is mapped anew and given back, and the kernel fills its pages with zeros every
    time: a third of the time of an image encoder on a CPU (`python -m benchmarks.memory`).
    """
    if platform.system() == "Linux" and platform.libc_ver()[0] == "glibc":
        for number, value in MALLOPT.values():
            ctypes.CDLL(None).mallopt(number, value)
