"""Qwen2.5-VL as the reasoner: the paper's model, with its own patches and positions in three dimensions (M-RoPE)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from lab.data.images import Frame
from lab.model.reasoner import Reasoner, ReasonerConfig


class QwenReasoner(Reasoner):
    """A Qwen2.5-VL checkpoint behind the calls of `Reasoner`."""

    image_token = "<|image_pad|>"
    any_shape = True

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

    def encode(self, pixels: Tensor, frames: list[Frame]) -> Tensor:
        images = []
        for square, frame in zip(pixels, frames):
            height, width = self.part(frame, len(square))
            size = (side * self.pixels_per_token for side in self.shape(frame))
            images.append(self.resized(square[None, :height, :width], *size)[0])
        seen = self.image_processor(images, do_resize=False, return_tensors="pt").to(pixels.device)
        features = self.tower(seen.pixel_values, grid_thw=seen.image_grid_thw).pooler_output
        return pad_sequence(features.split([self.tokens_of(frame) for frame in frames]), batch_first=True)

    def see(self, features: Tensor, embeddings: Tensor) -> Tensor:
        """The features (B, image_tokens, D) themselves: Qwen's tower ends in the language model's space."""
        return features

    def embed(self, input_ids: Tensor, visual: Tensor) -> Tensor:
        """As `Reasoner.embed`, the padding of rows that have fewer visual tokens left out."""
        shown = (input_ids == self.image_id).sum(1, keepdim=True)
        return super().embed(input_ids, visual[torch.arange(visual.shape[1], device=visual.device) < shown])

    def positions(self, input_ids: Tensor, attention_mask: Tensor, shapes: Tensor | None = None) -> Tensor:
        """(3, B, T): time, row and column of each visual token, one number for words."""
        if shapes is None:
            grid = self.image_grid.expand(len(input_ids), -1)
        else:
            grid = F.pad(self.image_processor.merge_size * shapes, (1, 0), value=1)  # (B, 3), in patches
        shows = (input_ids == self.image_id).int()
        return self.model.model.get_rope_index(input_ids, shows, image_grid_thw=grid, attention_mask=attention_mask)[0]
