"""Memory and FLOPs of code that runs on tensors without values: PyTorch's own counting, nothing by formula."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

ATEN = torch.ops.aten
ON_CPU = {
    ATEN._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(
        grad, q, k, v
    ),
}
"""What FlopCounterMode does not count by itself: fake tensors are on the CPU."""


@dataclass
class Cost:
    """Of a traced piece of work."""

    peak: int = 0
    """Bytes of all tensors that came to be in it, at the worst moment."""
    left: int = 0
    """Bytes of those that outlive it."""
    flops: int = 0
    """A multiplication and an addition count as two."""
    operators: int = 0
    """How many operators were called, but for views."""


class Live(TorchDispatchMode):
    """Counts the bytes of the storages that operators make, until they are freed.

    Unlike `torch.distributed._tools.MemTracker` it takes models with frozen weights. Scratch space within an operator
    is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[int, int] = {}  # 0 for what was there before
        self.now = self.peak = self.operators = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace != "aten":  # a question about a tensor
            return function(*args, **(kwargs or {}))
        self.operators += not function.is_view
        self.meet((args, kwargs), made=False)
        result = function(*args, **(kwargs or {}))
        self.meet(result, made=True)
        return result

    def meet(self, values: object, made: bool) -> None:
        for tensor in tree_leaves(values):
            if isinstance(tensor, Tensor) and (key := (storage := tensor.untyped_storage())._cdata) not in self.bytes:
                self.bytes[key] = storage.nbytes() if made else 0
                self.now += self.bytes[key]
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.freed, key)

    def freed(self, key: int) -> None:
        self.now -= self.bytes.pop(key)


class NoModules:
    """In place of FlopCounterMode's tracker of modules, whose hooks hold autograd graphs in reference cycles: what was
    freed when, and with it the peak, hung on when Python's collector ran."""

    parents = ("Global",)

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


@contextmanager
def traced() -> Iterator[Cost]:
    """The cost of what runs within; it is filled in at the end. In-place writes to what was there before are free."""
    cost = Cost()
    counter = FlopCounterMode(display=False, custom_mapping=ON_CPU)
    counter.mod_tracker = NoModules()
    with Live() as live, counter:
        yield cost
    cost.peak, cost.left, cost.operators = live.peak, live.now, live.operators
    cost.flops = counter.get_total_flops()


@contextmanager
def fake(module: nn.Module) -> Iterator[None]:
    """Within, parameters and buffers of a module on the meta device are fake tensors on the CPU: unlike meta tensors
    they are autocast and take the attention kernels of a device."""
    owners = [
        (store, name, tensor)
        for part in module.modules()
        for store in (part._parameters, part._buffers)
        for name, tensor in store.items()
        if tensor is not None
    ]
    with FakeTensorMode():
        made: dict[int, Tensor] = {}
        for store, name, tensor in owners:
            if id(tensor) not in made:
                empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                is_parameter = isinstance(tensor, nn.Parameter)
                made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
            store[name] = made[id(tensor)]
        try:
            yield
        finally:
            for store, name, tensor in owners:
                store[name] = tensor
