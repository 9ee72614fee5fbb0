"""Which class is behind a configuration."""

from lab.model.fastvlm import FastVlmReasoner
from lab.model.pretrained import LANGUAGE, REASONERS, read_config
from lab.model.qwen import QwenReasoner
from lab.model.reasoner import Reasoner, ReasonerConfig
from lab.model.sam2 import Sam2Segmenter
from lab.model.segmenter import Segmenter, SegmenterConfig
from lab.model.smolvlm import SmolVlmReasoner
from lab.model.text import TextReasoner


def reasoner_for(config: ReasonerConfig, pretrained: bool = True) -> Reasoner:
    """The reasoner that fits the checkpoint's architecture; `pretrained` as in `Reasoner`."""
    if config.model == "small":
        return Reasoner(config)
    kinds = {"qwen2_5_vl": QwenReasoner, "fast_vlm": FastVlmReasoner, LANGUAGE: TextReasoner}
    kind = kinds.get(read_config(config.model, (*REASONERS, LANGUAGE)).model_type, SmolVlmReasoner)
    return kind(config, pretrained)


def segmenter_for(config: SegmenterConfig) -> Segmenter:
    """The segmenter of the configured architecture, with random weights (`Segmenter.load_pretrained` loads others)."""
    return Sam2Segmenter(config) if config.architecture == "sam2" else Segmenter(config)
