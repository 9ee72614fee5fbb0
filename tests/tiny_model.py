"""The smallest CORE-Seg that all parts of the code run on."""

from lab.model.core_seg import CoreSegConfig
from lab.model.reasoner import ReasonerConfig
from lab.model.segmenter import SegmenterConfig


def tiny_config(layers: int = 1) -> CoreSegConfig:
    """64 pixels, widths 32 and 64, random weights: a model is built in a tenth of a second."""
    return CoreSegConfig(
        SegmenterConfig(image_size=64, embed_dim=32, weights="random"),
        ReasonerConfig(hidden_size=64, layers=layers, image_size=64, scene_dim=32),
    )
