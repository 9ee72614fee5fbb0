"""The reference without language: a U-Net on CORE-Seg's image encoder. It segments what looks like a lesion."""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
from monai.networks.nets.flexible_unet import UNetDecoder
from torch import Tensor, nn

from lab.data.dataset import model_pixels
from lab.data.images import Frame
from lab.data.sample import without_specks
from lab.model.answer import Answer
from lab.model.core_seg import Prediction
from lab.model.release import module_from_checkpoint
from lab.model.segmenter import normalise


@dataclass
class UNetConfig:
    """What the U-Net is built from."""

    image_size: int = 320
    """Side of the padded square input in pixels; a multiple of 32."""
    width: int = 16
    """Channels at stride 2, the resolution of the mask; each of the three levels below has twice those above."""


class UNet(nn.Module):
    """EfficientNet-Lite0, as in `PyramidImageEncoder`, with MONAI's U-Net decoder."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = timm.create_model("tf_efficientnet_lite0", num_classes=0)
        encoder = [level["num_chs"] for level in self.backbone.feature_info]  # strides 2, 4, 8, 16, 32
        decoder = [config.width * 2**level for level in (3, 2, 1, 0)]
        self.decoder = UNetDecoder(
            spatial_dims=2,
            encoder_channels=encoder,
            decoder_channels=decoder,
            act="relu",
            norm="batch",
            dropout=0.0,
            bias=False,
            upsample="nontrainable",
            pre_conv=None,
            interp_mode="bilinear",
            align_corners=False,
            is_pad=False,
        )
        self.head = nn.Conv2d(config.width, 1, kernel_size=3, padding=1)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, S, S, 3) uint8 RGB, padded to the square, to mask logits (B, S/2, S/2)."""
        features = self.backbone.forward_intermediates(normalise(pixels), intermediates_only=True)
        return self.head(self.decoder(features, skip_connect=3))[:, 0]

    @torch.no_grad()
    def predict(self, images: list[np.ndarray], queries: list[str]) -> list[Prediction]:
        """Segment images (H, W, 3) uint8 RGB; queries are not read, and nothing is said."""
        start, predictions = time.perf_counter(), []
        size = self.config.image_size
        logits = self(torch.stack([model_pixels(image, size) for image in images]).to(self.head.weight.device))
        for image, row in zip(images, logits):
            frame = Frame(*image.shape[:2], size)
            probability = frame.logits_to_original(row[None])[0].sigmoid().float().cpu().numpy()
            mask = without_specks(probability > 0.5)  # as CORE-Seg's
            seconds = (time.perf_counter() - start) / len(images)
            nothing, no_boxes = Answer(True, "", ""), np.zeros((0, 4), np.float32)
            predictions.append(Prediction("", nothing, no_boxes, mask, probability, True, seconds, tokens=0))
        return predictions


def unet_from_checkpoint(path: Path | str) -> UNet:
    """The U-Net of one of your own checkpoints.

    Raises:
        ReleaseError: No such file, or not such a checkpoint.
    """
    return module_from_checkpoint(path, "unet", UNet, UNetConfig)
