"""Where a model looks: maps over the image of what it found before it wrote, and of what its answer made it draw."""

import numpy as np
import torch
from torch.nn import functional as F

from lab.data.images import Frame
from lab.model.core_seg import CoreSeg, Scene


@torch.no_grad()
def attention(model: CoreSeg, scene: Scene, texts: list[str]) -> list[np.ndarray]:
    """Where the semantic prompt of each answer looks: (H, W) float32, 0..1, over the image; zeros without `<seg>`.

    The weights of the mask decoder's last attention from tokens to image, mean over heads and prompt tokens.
    """
    completions = [model.reasoner.completion_ids(text) for text in texts]
    output = model(scene.encoded, scene.prompts, completions, seen=scene.seen)
    maps = [np.zeros(image.shape[:2], np.float32) for image in scene.images]
    rows = output.mask_rows.tolist()
    if rows:
        weights = model.segmenter.prompt_attention(scene.encoded.embeddings[rows], output.prompt_tokens)
        for row, weight in zip(rows, weights):
            frame = Frame(*maps[row].shape, model.config.segmenter.image_size)
            looked = frame.logits_to_original(weight[None])[0].clamp(min=0)
            maps[row] = (looked / looked.max().clamp(min=1e-9)).float().cpu().numpy()
    return maps


def noticed(model: CoreSeg, scene: Scene) -> list[np.ndarray | None]:
    """What the first look found: (H, W) float32, 0..1, how surely each place of an image shows some of what is asked
    for; None of a model with one look."""
    if scene.seen.relevance_logits is None:
        return [None] * len(scene.images)
    maps = []
    for image, shape, logits in zip(scene.images, scene.encoded.shapes.tolist(), scene.seen.relevance_logits):
        height, width = image.shape[:2]
        grid = logits[: shape[0] * shape[1]].float().unflatten(0, shape)[None]
        if model.config.reasoner.dynamic:  # it is of the image alone
            place = F.interpolate(grid[:, None], (height, width), mode="bilinear")[:, 0]
        else:
            place = Frame(height, width, model.config.segmenter.image_size).logits_to_original(grid)
        maps.append(place[0].sigmoid().cpu().numpy())
    return maps
