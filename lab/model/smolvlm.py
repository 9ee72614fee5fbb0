"""SmolVLM (the Idefics3 architecture) as the reasoner: tiles of the image, and the whole image once more."""

import torch
from torch import Tensor, nn

from lab.data.images import Frame
from lab.model.reasoner import Reasoner, ReasonerConfig


class SmolVlmReasoner(Reasoner):
    """A SmolVLM or Idefics3 checkpoint behind the calls of `Reasoner`."""

    def __init__(self, config: ReasonerConfig, pretrained: bool = True) -> None:
        super().__init__(config, pretrained)
        vision = self.model.config.vision_config
        self.tiles = config.image_size // vision.image_size  # a side
        self.grid_tokens = (vision.image_size // vision.patch_size // self.model.config.scale_factor) ** 2
        self.image_tokens = self.grid_tokens * (self.tiles**2 + 1 if self.tiles > 1 else 1)

    @property
    def language_model(self) -> nn.Module:
        return self.model.model.text_model

    @property
    def tower(self) -> nn.Module:
        """The vision encoder and the connector, which ends in the language model's space."""
        return nn.ModuleList([self.model.model.vision_model, self.model.model.connector])

    @property
    def pixels_per_token(self) -> int:
        """Side of a tile: sizes between whole numbers of tiles will not do."""
        return self.model.config.vision_config.image_size

    def visual_text(self, tokens: int) -> str:
        """As Idefics3's processor writes it: tiles by row and column, then the whole."""
        mark, each = "<fake_token_around_image>", self.image_token * self.grid_tokens
        whole = f"{mark}<global-img>{each}{mark}"
        if self.tiles == 1:
            return whole
        sides = range(1, self.tiles + 1)
        rows = ["".join(f"{mark}<row_{row}_col_{column}>{each}" for column in sides) + "\n" for row in sides]
        return "".join(rows) + "\n" + whole

    def encode(self, pixels: Tensor, frames: list[Frame]) -> Tensor:
        tile, number = self.pixels_per_token, len(pixels)
        views = self.resized(pixels, tile)[:, None]  # (B, 1, 3, tile, tile)
        if self.tiles > 1:
            large = self.resized(pixels, self.config.image_size)
            cut = large.unflatten(3, (-1, tile)).unflatten(2, (-1, tile))  # (B, 3, rows, tile, columns, tile)
            views = torch.cat([cut.permute(0, 2, 4, 1, 3, 5).flatten(1, 2), views], dim=1)
        encoder, connector = self.tower
        patches = tile // self.model.config.vision_config.patch_size
        images = self.scaled(views.flatten(0, 1))
        seen = torch.ones(len(images), patches, patches, dtype=torch.bool, device=images.device)
        states = encoder(pixel_values=images, patch_attention_mask=seen).last_hidden_state
        return connector(states).unflatten(0, (number, -1)).flatten(1, 2)

    def see(self, features: Tensor, embeddings: Tensor) -> Tensor:
        """The features (B, image_tokens, D) themselves."""
        return features
