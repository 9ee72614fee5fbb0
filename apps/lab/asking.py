"""What the page asks of models: functions of plain values, which ZeroGPU runs in a process with a GPU of its own."""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from apps.lab.library import Library
from lab.model.core_seg import CoreSeg, Prediction, Scene
from lab.model.decoding import Sampling
from lab.model.gaze import attention, noticed

try:
    from spaces import GPU as on_gpu  # there in a Space on Hugging Face
except ImportError:

    def on_gpu(function):
        return function


class Answer(NamedTuple):
    """A finished answer."""

    scene: Scene
    """On the CPU."""
    prediction: Prediction
    attention: np.ndarray
    """(H, W), 0..1."""
    noticed: np.ndarray | None
    """(H, W) uint8, 255 for sure; see `lab.model.gaze`."""


class Asker:
    """Asks the models of a library. On ZeroGPU arguments and results go from process to process, and nothing else does:
    models that are not loaded before are loaded for one call only."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self.answer, self.again, self.several = on_gpu(self._answer), on_gpu(self._again), on_gpu(self._several)

    def _answer(self, name: str, image: np.ndarray, query: str, sampling: Sampling) -> Iterator[str | Answer]:
        """The text of an answer, longer each time, and at last all of it."""
        model, text = self.model(name), ""
        scene = model.open([image], [query])
        for text in model.stream(scene, sampling=sampling):
            yield text
        yield finished(model, scene, model.conclude(scene, [model.reasoner.completion_ids(text)]))

    def _again(self, name: str, scene: Scene, text: str) -> Answer:
        """What is segmented from an answer, to the word."""
        model = self.model(name)
        scene = placed(scene, model.device)
        return finished(model, scene, model.segment_text(scene, [text]))

    def _several(self, name: str, scene: Scene, count: int, sampling: Sampling) -> list[Prediction]:
        """Several sampled answers."""
        model = self.model(name)
        scene = placed(scene, model.device)
        texts = model.sample(scene, count, sampling)
        return [model.conclude(scene, [model.reasoner.completion_ids(text)])[0] for text in texts]

    def model(self, name: str) -> CoreSeg:
        """The model of a name, on the GPU where there is one."""
        return self.library.model(name).to("cuda" if torch.cuda.is_available() else "cpu")


def finished(model: CoreSeg, scene: Scene, said: list[Prediction]) -> Answer:
    (prediction,) = said
    found = noticed(model, scene)[0]
    found = None if found is None else (255 * found).astype(np.uint8)
    return Answer(placed(scene, torch.device("cpu")), prediction, attention(model, scene, [prediction.text])[0], found)


def placed(scene: Scene, device: torch.device) -> Scene:
    """A scene with what is known of it on a device."""
    mirrored = placed(scene.mirrored, device) if scene.mirrored else None
    encoded, seen = (
        type(parts)(*(part if part is None else part.to(device) for part in parts))
        for parts in (scene.encoded, scene.seen)
    )
    return replace(scene, encoded=encoded, seen=seen, mirrored=mirrored)
