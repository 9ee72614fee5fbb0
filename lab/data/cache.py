"""What frozen encoders said of an image, kept on disk under a key that cannot go stale."""

import hashlib
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lab.data.images import Frame


def fingerprint(modules: tuple[nn.Module, ...], preprocessing: str) -> str:
    """16 hex digits over every weight and buffer of frozen modules, their code's class names and what precedes them."""
    digest = hashlib.sha256(preprocessing.encode())
    for module in modules:
        digest.update(repr(module).encode())
        for name, tensor in module.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


class FeatureCache:
    """Half-precision tensors in one file an image: `ROOT/<encoders>/<ab>/<pixels>.safetensors`.

    The folder is named by the encoders' weights and preprocessing, and the file by the very pixels that they would see,
    augmented, resized and padded: a changed image, augmentation, size or weight is another file, so nothing has to be
    invalidated.

    Args:
        root: Folder of all caches.
        encoders: Whose outputs are kept.
        preprocessing: What these depend on beside weights and pixels.
        dynamic: They depend on how much of the square the image fills, too: black pixels may be padding or not.
    """

    def __init__(
        self, root: Path | str, encoders: tuple[nn.Module, ...], preprocessing: str = "", dynamic: bool = False
    ) -> None:
        self.folder, self.dynamic = Path(root) / fingerprint(encoders, preprocessing), dynamic

    def path(self, pixels: Tensor, frame: Frame) -> Path:
        """Where the features of one padded square (S, S, 3) uint8 are, or would be."""
        digest = hashlib.blake2b(pixels.numpy().tobytes(), digest_size=16)
        if self.dynamic:
            digest.update(repr(frame.inner).encode())
        name = digest.hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def load(self, pixels: Tensor, frame: Frame) -> dict[str, Tensor] | None:
        """The features in half precision, or None when the encoders have not seen these pixels yet."""
        path = self.path(pixels, frame)
        return load_file(path) if path.exists() else None

    def store(self, pixels: Tensor, frame: Frame, features: dict[str, Tensor]) -> None:
        """Write features (any float type) atomically, so that a killed run leaves no half file."""
        path = self.path(pixels, frame)
        path.parent.mkdir(parents=True, exist_ok=True)
        half = {name: tensor.detach().to("cpu", torch.float16).contiguous() for name, tensor in features.items()}
        temporary = path.with_suffix(f".{os.getpid()}")
        save_file(half, temporary)
        temporary.replace(path)
