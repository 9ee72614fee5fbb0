"""SAM 2 (or MedSAM 2) as the segmenter, through transformers: a Hiera encoder whose finer maps the decoder sees too."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Sam2Config, Sam2Model

from lab.errors import LabError
from lab.model.pretrained import read_config
from lab.model.segmenter import Segmenter, SegmenterConfig


class Sam2ImageEncoder(nn.Module):
    """The encoder, with what SAM 2 does to its maps once an image."""

    def __init__(self, model: Sam2Model) -> None:
        super().__init__()
        self.vision_encoder = model.vision_encoder
        self.conv_s0, self.conv_s1 = model.mask_decoder.conv_s0, model.mask_decoder.conv_s1
        self.no_memory_embedding = model.no_memory_embedding

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) normalised to (B, 4 C, S/16, S/16): C channels of the embedding, and the maps at strides 8 (C/4
        channels) and 4 (C/8), whose finer cells are folded into 4 and 16 channels each: C and 2 C."""
        fine, middle, coarse = self.vision_encoder(images).fpn_hidden_states
        coarse = coarse + self.no_memory_embedding.reshape(1, -1, 1, 1)
        middle, fine = F.pixel_unshuffle(self.conv_s1(middle), 2), F.pixel_unshuffle(self.conv_s0(fine), 4)
        return torch.cat([coarse, middle, fine], dim=1)


class Sam2Segmenter(Segmenter):
    """SAM 2 behind the calls of `Segmenter`; its embeddings have 4 times `embed_dim` channels."""

    def build(self, config: SegmenterConfig) -> None:
        if config.weights is None:
            raise LabError("segmenter.weights is null, but sam2 needs the folder or hub id of a SAM 2 checkpoint")
        self.take(Sam2Model(self.sam2_config()))

    def sam2_config(self) -> Sam2Config:
        """The checkpoint's, at our image size."""
        sam2 = read_config(self.config.weights, ("sam2",))
        sam2.prompt_encoder_config.image_size = self.config.image_size
        if (dim := sam2.prompt_encoder_config.hidden_size) != self.config.embed_dim:
            raise LabError(f"segmenter.embed_dim is {self.config.embed_dim}, but '{self.config.weights}' has {dim}")
        return sam2

    def take(self, model: Sam2Model) -> None:
        """Keep the parts of a model."""
        self.image_encoder = Sam2ImageEncoder(model)
        self.prompt_encoder, self.mask_decoder = model.prompt_encoder, model.mask_decoder
        del self.mask_decoder.conv_s0, self.mask_decoder.conv_s1
        self.mask_decoder.dynamic_multimask_via_stability = False  # one token draws the mask, in training and after
        self.place = model.shared_image_embedding

    def load_pretrained(self) -> None:
        weights, config = self.config.weights, self.sam2_config()
        try:
            model = Sam2Model.from_pretrained(weights, config=config, dtype=torch.float32, use_safetensors=True)
        except OSError:
            raise LabError(f"checkpoint '{weights}' has no model.safetensors; download it again") from None
        self.take(model)

    def box_prompt(self, boxes: Tensor) -> Tensor:
        """One box an image, (B, 4) xyxy in pixels of the padded square, to prompt tokens (B, 3, C)."""
        return self.prompt_encoder(None, None, boxes[:, None], None)[0][:, 0]

    def decode(self, embeddings: Tensor, prompt: Tensor) -> Tensor:
        """Image embeddings (B, 4 C, h, w) and prompt tokens (B, N, C) to mask logits (B, 4h, 4w) over the square."""
        dim = self.config.embed_dim
        coarse, middle, fine = embeddings.split([dim, dim, 2 * dim], dim=1)
        masks, *_ = self.mask_decoder(
            image_embeddings=coarse,
            image_positional_embeddings=self.positions(coarse),
            sparse_prompt_embeddings=prompt[:, None],
            dense_prompt_embeddings=self.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1),
            multimask_output=False,
            high_resolution_features=[F.pixel_shuffle(fine, 4), F.pixel_shuffle(middle, 2)],
        )
        return masks[:, 0, 0]

    def positions(self, embeddings: Tensor) -> Tensor:
        """Positions of the cells of embeddings (B, C, h, w), of the same shape."""
        number, _, height, width = embeddings.shape
        rows, columns = ((torch.arange(side, device=embeddings.device) + 0.5) / side for side in (height, width))
        places = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)  # (h, w, 2), x and y
        return self.place(places).permute(2, 0, 1).expand(number, -1, -1, -1)

    def heads_of(self, attention: nn.Module, given: dict[str, Tensor]) -> Iterator[Tensor]:
        heads = attention.num_attention_heads
        rows = attention.q_proj(given["query"]), attention.k_proj(given["key"])
        return (row[:, 0].unflatten(-1, (heads, -1)).transpose(1, 2) for row in rows)
