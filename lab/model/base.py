"""The checkpoints that a model was trained from: what it still shares with them need not travel."""

import hashlib
from copy import deepcopy

import torch

from lab.model.core_seg import CoreSeg, CoreSegConfig


def base_of(config: CoreSegConfig, reasoner: str, segmenter: str | None) -> CoreSeg:
    """A model as it was before any training, but for parts that no checkpoint has, which are random.

    Args:
        config: Of the model.
        reasoner: Its checkpoint, a path or hub id.
        segmenter: Its weights, as `SegmenterConfig.weights`.
    """
    config = deepcopy(config)
    config.reasoner.model, config.segmenter.weights = reasoner, segmenter
    base = CoreSeg(config)
    base.segmenter.load_pretrained()
    return base


def same_weights(state: dict[str, torch.Tensor], base: CoreSeg) -> dict[str, torch.Tensor]:
    """The weights of a state that are those of `base` to the bit."""
    before = base.state_dict()
    return {name: tensor for name, tensor in state.items() if name in before and torch.equal(tensor, before[name])}


def weights_digest(state: dict[str, torch.Tensor]) -> str:
    """SHA-256 of named tensors, in hex."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode() + state[name].contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
