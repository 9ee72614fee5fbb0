"""Qwen2.5-VL as the reasoner: the paper's model, with its own patches and positions in three dimensions (M-RoPE)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoImageProcessor

from lab.errors import LabError
from lab.model.reasoner import Reasoner, ReasonerConfig


class QwenReasoner(Reasoner):
    """A Qwen2.5-VL checkpoint behind the calls of `Reasoner`."""

    image_token, pixels_per_token = "<|image_pad|>", 28

    def __init__(self, config: ReasonerConfig) -> None:
        if config.image_size % self.pixels_per_token:
            raise LabError(f"reasoner.image_size {config.image_size} is not a multiple of 28; Qwen2.5-VL needs that")
        super().__init__(config)
        self.image_processor = AutoImageProcessor.from_pretrained(config.model)
        side = config.image_size // self.image_processor.patch_size
        self.register_buffer("image_grid", torch.tensor([[1, side, side]]), persistent=False)

    @property
    def tower(self) -> nn.Module:
        return self.model.model.visual

    def encode(self, pixels: Tensor) -> Tensor:
        images = pixels.permute(0, 3, 1, 2)
        if images.shape[-1] != self.config.image_size:
            images = F.interpolate(images.float(), self.config.image_size, mode="area").round().to(torch.uint8)
        patches = self.image_processor(list(images), do_resize=False, return_tensors="pt").pixel_values
        grid = self.image_grid.expand(len(pixels), -1)
        return self.tower(patches.to(pixels.device), grid_thw=grid).pooler_output.unflatten(0, (len(pixels), -1))

    def see(self, features: Tensor, embeddings: Tensor) -> Tensor:
        """The features (B, image_tokens, D) themselves: Qwen's tower ends in the language model's space."""
        return features

    def positions(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(3, B, T): time, row and column of each visual token, one number for words."""
        grid = self.image_grid.expand(len(input_ids), -1)
        shows = (input_ids == self.image_id).int()
        return self.model.model.get_rope_index(input_ids, shows, image_grid_thw=grid, attention_mask=attention_mask)[0]


def reasoner_for(config: ReasonerConfig) -> Reasoner:
    """The reasoner that fits the checkpoint's architecture."""
    if config.model != "small" and AutoConfig.from_pretrained(config.model).model_type == "qwen2_5_vl":
        return QwenReasoner(config)
    return Reasoner(config)
