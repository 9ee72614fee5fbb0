"""FastVLM as the reasoner: a convolutional tower of timm, one visual token for each 64 x 64 pixels, and Qwen2."""

from torch import Tensor

from lab.data.images import Frame
from lab.model.reasoner import Reasoner


class FastVlmReasoner(Reasoner):
    """A FastVLM checkpoint behind the calls of `Reasoner`."""

    @property
    def pixels_per_token(self) -> int:
        return self.tower.timm_model.feature_info[-1]["reduction"]

    def encode(self, pixels: Tensor, frames: list[Frame]) -> Tensor:
        images = self.scaled(self.resized(pixels, self.config.image_size))
        return self.tower(images).last_hidden_state.flatten(2).transpose(1, 2)

    def see(self, features: Tensor, embeddings: Tensor) -> Tensor:
        """Visual tokens (B, image_tokens, D) from the tower's features alone."""
        return self.model.model.multi_modal_projector(features.to(self.model.dtype))
