"""LoRA within a language model: added, made part of its weights, switched off, set back or merged for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from lab.model.seg_row import RowOfEmbedding, RowOfHead


def add_lora(language_model: nn.Module, rank: int, targets: tuple[str, ...]) -> None:
    """Put trained LoRA of this rank, in float32, beside linear layers of these names.

    Raises:
        ValueError: No layer has any of these names.
    """
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets)), language_model)
    for parameter in language_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # PEFT takes the dtype of the weights


def settle_lora(language_model: nn.Module) -> None:
    """Make LoRA, where there is some, part of the weights."""
    for name, layer in list(language_model.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            language_model.set_submodule(name, layer.get_base_layer())
    vars(language_model).pop("peft_config", None)


def lora_layers(model: nn.Module) -> list[BaseTunerLayer]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def rounds_lora(layer: BaseTunerLayer) -> bool:
    """Whether its weights are not float32: most of a LoRA that became part of them would be rounded away."""
    return layer.get_base_layer().weight.dtype != torch.float32


class StartOfLora(nn.Module):
    """What a model's LoRA and row of `<seg>` are now, kept beside it to be put back for a while.

    Args:
        model: Whose values are copied; its LoRA and row take gradients from here on.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.places = {}
        for name, parameter in model.named_parameters():
            if "lora_" in name or name.endswith(".row"):
                self.places[name] = f"value_{len(self.places)}"
                self.register_buffer(self.places[name], parameter.detach().clone(), persistent=False)
                parameter.requires_grad_(True)

    @contextmanager
    def put_back(self, model: nn.Module) -> Iterator[None]:
        """Within, they are in the model, which may have been moved or sharded; afterwards it is as before."""
        parameters = dict(model.named_parameters())
        now = {name: parameters[name].detach().clone() for name in self.places}
        write({parameters[name]: getattr(self, place) for name, place in self.places.items()})
        try:
            yield
        finally:
            write({parameters[name]: value for name, value in now.items()})


@torch.no_grad()
def write(values: dict[nn.Parameter, Tensor]) -> None:
    """Set parameters, sharded ones too, whose values may be whole."""
    for parameter, value in values.items():
        if isinstance(parameter, DTensor) and not isinstance(value, DTensor):  # each process takes its part
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(value)


@contextmanager
def without_lora(model: nn.Module) -> Iterator[None]:
    """Within, LoRA and the trained row of `<seg>` are switched off: the model is the one that they were added to."""
    layers = lora_layers(model)
    rows = [module for module in model.modules() if isinstance(module, (RowOfEmbedding, RowOfHead))]
    for layer in layers:
        layer.enable_adapters(False)
    for row in rows:
        row.active = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for row in rows:
            row.active = True


@contextmanager
def merged_lora(model: nn.Module) -> Iterator[None]:
    """Within, LoRA is part of the weights, which saves its work at every token; afterwards they are as before, to the
    bit. Where the weights are bfloat16, which would round most of it away, it stays beside them."""
    layers = [layer for layer in lora_layers(model) if not rounds_lora(layer)]
    weights = [layer.get_base_layer().weight.data for layer in layers]
    before = [weight.clone() for weight in weights]
    for layer in layers:
        layer.merge()
    try:
        yield
    finally:
        for layer, weight, value in zip(layers, weights, before):
            layer.unmerge()
            weight.copy_(value)
