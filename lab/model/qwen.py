"""Qwen2.5-VL as the reasoner: the paper's model, with its own patches and positions in three dimensions (M-RoPE)."""

import torch
from torch import Tensor, nn

from lab.model.reasoner import Reasoner, ReasonerConfig


class QwenReasoner(Reasoner):
    """A Qwen2.5-VL checkpoint behind the calls of `Reasoner`."""

    image_token = "<|image_pad|>"

    def __init__(self, config: ReasonerConfig, pretrained: bool = True) -> None:
        super().__init__(config, pretrained)
        side = config.image_size // self.image_processor.patch_size
        self.register_buffer("image_grid", torch.tensor([[1, side, side]]), persistent=False)

    @property
    def tower(self) -> nn.Module:
        return self.model.model.visual

    @property
    def pixels_per_token(self) -> int:
        return self.image_processor.patch_size * self.image_processor.merge_size

    def encode(self, pixels: Tensor) -> Tensor:
        images = list(self.resized(pixels, self.config.image_size))
        patches = self.image_processor(images, do_resize=False, return_tensors="pt").pixel_values
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
