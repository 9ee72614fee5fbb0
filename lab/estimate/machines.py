"""GPUs, as their makers state them, and how much of that is counted on."""

import re
from dataclasses import dataclass

from lab.errors import LabError

UTILISATION = 0.4
"""Share of the peak FLOP/s that training reaches; 0.35 to 0.5 is usual (PaLM, Chowdhery et al. 2022, table 3)."""
BANDWIDTH_SHARE = 0.6
"""Share of the memory's bandwidth that sampling reaches, which reads all weights for each token."""
LAUNCH = 1e-5
"""Seconds that PyTorch takes to call an operator without compiling; small models wait for nothing else."""
NETWORK = 25e9
"""Bytes a second and GPU between nodes: 200 Gb/s InfiniBand for each GPU."""


@dataclass(frozen=True)
class Gpu:
    """What a maker states of a GPU."""

    name: str
    bf16: float
    """FLOP/s of dense matrix products."""
    fp32: float
    """The same in float32; PyTorch does not use TF32 unless told to."""
    memory: float
    """Bytes a second."""
    link: float
    """Bytes a second to another GPU of the node, one way."""


# NVIDIA Ada GPU architecture whitepaper, appendix A; PCIe 4.0 x16
RTX_4090 = Gpu("RTX 4090", 165.2e12, 82.6e12, 1008e9, 25e9)
# NVIDIA A100 Tensor Core GPU datasheet; 80 GB SXM
A100 = Gpu("A100", 312e12, 19.5e12, 2039e9, 300e9)


@dataclass(frozen=True)
class Machine:
    """Nodes of equal GPUs."""

    nodes: int
    gpus: int
    """In each node."""
    gigabytes: int
    """Of each GPU, in GiB."""

    @property
    def world(self) -> int:
        return self.nodes * self.gpus

    @property
    def gpu(self) -> Gpu:
        return RTX_4090 if self.gigabytes <= 24 else A100

    @property
    def link(self) -> float:
        return self.gpu.link if self.nodes == 1 else NETWORK

    def __str__(self) -> str:
        nodes = f"{self.nodes} nodes of " if self.nodes > 1 else ""
        return f"{nodes}{self.gpus}x{self.gigabytes} GB"


def read_machine(text: str) -> Machine:
    """`8x80GB`, or `4x8x80GB` for four nodes.

    Raises:
        LabError: For anything else.
    """
    found = re.fullmatch(r"(?:([1-9]\d*)x)?([1-9]\d*)x([1-9]\d*)GB", text.strip(), re.IGNORECASE)
    if not found:
        raise LabError(f"--gpus '{text}' is not like 8x80GB, or 4x8x80GB for four nodes; change it")
    return Machine(*(int(number or 1) for number in found.groups()))
