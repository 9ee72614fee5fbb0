"""What is shared of a model: safetensors, JSON and a card; no pickle, and nothing imported by a name from data."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lab.errors import LabError
from lab.model.base import base_of, same_weights, weights_digest
from lab.model.build import segmenter_for
from lab.model.card import card
from lab.model.core_seg import CoreSeg, CoreSegConfig
from lab.model.segmenter import Segmenter, SegmenterConfig

FORMAT = "core-seg-release-1"
REASONER, SEGMENTER = "reasoner", "segmenter"
"""Folders of a release, for what a checkpoint of Hugging Face has beside its weights; the configuration names them in
place of the path or hub id that the model once came from."""
GALLERY = "worst.webp"
"""Picture of the four worst cases of an evaluation, as `core-seg evaluate` names it."""
TEXT = (".json", ".jinja", ".txt")
"""What those folders hold."""


class ReleaseError(LabError):
    """A folder that is not a complete release of ours."""


def save_release(
    model: CoreSeg | Segmenter,
    folder: Path | str,
    title: str,
    data: str,
    half: bool = True,
    evaluations: list[dict] | None = None,
    base: CoreSeg | None = None,
    gallery: Path | None = None,
) -> None:
    """Write `model.safetensors`, `config.json`, the tokenizer, `README.md` (the card) and, of the card, a picture.

    Args:
        model: Of any preset, or the segmenter of stage 0, which has no tokenizer.
        folder: Made when absent; its release files are replaced.
        title: Of the card.
        data: What the model was trained on, for the card.
        half: Store half precision; False keeps float32 and with it the last bits of every logit.
        evaluations: What `core-seg evaluate` wrote of it, for the card.
        base: From `base_of`: weights that are still its own are left out, and only `complete` reads the release.
        gallery: `worst.webp` of an evaluation, for the card.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    for name in shared_names(model):
        del state[name]
    left_out = {} if base is None else same_weights(state, base)
    state = {name: tensor for name, tensor in state.items() if name not in left_out}
    if half:
        state = {name: t.half() if t.dtype == torch.float32 else t for name, t in state.items()}
    save_file(state, folder / "model.safetensors")
    config, segmenter = asdict(model.config), model if isinstance(model, Segmenter) else model.segmenter
    of_segmenter = config if isinstance(model, Segmenter) else config["segmenter"]
    if segmenter.config.architecture == "sam2":
        segmenter.sam2_config().save_pretrained(folder / SEGMENTER)
        of_segmenter["weights"] = SEGMENTER
    elif segmenter.config.architecture != "small":
        of_segmenter["weights"] = None
    if isinstance(model, Segmenter):
        config = {"segmenter": config}
    else:
        if model.reasoner.small:
            model.reasoner.tokenizer.save_pretrained(folder / "tokenizer")
        else:
            model.reasoner.write_architecture(folder / REASONER)
            config["reasoner"]["model"] = REASONER
        config = {"core_seg": config}
    if base is not None:
        source = {"reasoner": base.config.reasoner.model, "segmenter": base.config.segmenter.weights}
        source = {name: Path(of).name if of and Path(of).exists() else of for name, of in source.items()}
        config["base"] = source | {"sha256": weights_digest(left_out)}
    glance = isinstance(model, CoreSeg) and model.draws_at_a_glance
    text = card(model.config, title, data, config.get("base"), evaluations or (), glance, gallery is not None)
    (folder / "README.md").write_text(text)
    if gallery is None:
        (folder / GALLERY).unlink(missing_ok=True)
    else:
        shutil.copy(gallery, folder / GALLERY)
    files = {name: sha256(folder / name) for name in release_files(folder) if name not in ("config.json", "README.md")}
    (folder / "config.json").write_text(json.dumps({"format": FORMAT} | config | {"sha256": files}, indent=2) + "\n")


def release_files(folder: Path) -> list[str]:
    """The files that are part of a release, as paths below its folder."""
    top = [folder / name for name in ("README.md", "config.json", "model.safetensors", GALLERY)]
    below = [path for name in ("tokenizer", REASONER, SEGMENTER) for path in sorted(folder.glob(f"{name}/*"))]
    paths = [path for path in top if path.is_file()] + [path for path in below if path.suffix in TEXT]
    return [path.relative_to(folder).as_posix() for path in paths]


def sha256(path: Path) -> str:
    """Of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def complete(folder: Path | str, reasoner: str, segmenter: str | None) -> CoreSeg:
    """Load a release that was written with a `base`, in float32, ready for inference.

    Args:
        folder: Of the release.
        reasoner: The checkpoint that it was trained from, a path or hub id; what a release names is never fetched.
        segmenter: The same of the segmenter, as `SegmenterConfig.weights`.

    Raises:
        ReleaseError: With one sentence, for a release that is whole, or another base than its own.
    """
    folder = Path(folder)
    config, state = read_release(folder)
    if "base" not in config:
        raise ReleaseError(f"release '{folder}' is whole; drop --reasoner and --segmenter")
    core_seg = from_plain(CoreSegConfig, config.get("core_seg"), f"release '{folder}': core_seg")
    base = base_of(core_seg, reasoner, segmenter)
    own = base.state_dict()
    missing = {name: tensor for name, tensor in own.items() if name not in state and name not in shared_names(base)}
    told = config["base"].get("sha256") if isinstance(config["base"], dict) else None
    if state.keys() - own.keys() or weights_digest(missing) != told:
        raise ReleaseError(
            f"release '{folder}' was not trained from '{reasoner}' and '{segmenter}'; give those it names"
        )
    return take(base, state | missing, folder)


def load_release(folder: Path | str) -> CoreSeg | Segmenter:
    """Load a release in float32, ready for inference; one of stage 0 gives its segmenter.

    Raises:
        ReleaseError: With one sentence, for a folder that is incomplete, damaged or not ours.
    """
    folder = Path(folder)
    config, state = read_release(folder)
    if "base" in config:
        raise ReleaseError(
            f"release '{folder}' holds only what was trained; make it whole with core-seg merge '{folder}' OUT "
            "--reasoner CHECKPOINT --segmenter WEIGHTS"
        )
    try:
        model = architecture(folder, config)
    except ReleaseError:
        raise
    except Exception as error:  # of whatever is wrong in what describes a part
        problem = " ".join(str(error).split())
        raise ReleaseError(f"release '{folder}' cannot be built ({problem}); write it again") from None
    return take(model, state, folder)


def take(model: CoreSeg | Segmenter, state: dict[str, torch.Tensor], folder: Path) -> CoreSeg | Segmenter:
    """The model with the weights of a release."""
    state = state | {name: state[first] for name, first in shared_names(model).items() if first in state}
    try:
        model.load_state_dict(
            {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
        )
    except (RuntimeError, AttributeError):
        raise ReleaseError(f"release '{folder}': its weights do not fit its config.json; write it again") from None
    return model.eval()


def read_release(folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """Configuration and weights of a release, neither of which is believed yet but that they are as written.

    Raises:
        ReleaseError: With one sentence, for a folder that is incomplete, damaged or not ours.
    """
    if not folder.is_dir():
        raise ReleaseError(f"release '{folder}' does not exist; give the folder that core-seg release wrote")
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise ReleaseError(f"release '{folder}' is incomplete: {name} is missing; write it again")
    try:
        config = json.loads((folder / "config.json").read_text())
    except ValueError:
        raise ReleaseError(f"release '{folder}': config.json is not JSON; write the release again") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ReleaseError(f"'{folder}' is not a release of this lab (config.json has no format {FORMAT})")
    check_files(folder, config.get("sha256", {}))
    try:
        return config, load_file(folder / "model.safetensors")
    except SafetensorError:
        raise ReleaseError(f"release '{folder}': model.safetensors is damaged; copy it again") from None


def is_stage_0(folder: Path) -> bool:
    """Whether a folder says that it is a release of stage 0, which has a segmenter alone and cannot be asked."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "segmenter" in config


def check_files(folder: Path, digests: Any) -> None:
    """Compare the files of a release with what they were when it was written.

    Raises:
        ReleaseError: Naming the first that is missing or changed.
    """
    if not isinstance(digests, dict):
        raise ReleaseError(f"release '{folder}': sha256 in config.json is not an object; write the release again")
    present = release_files(folder)
    for name, digest in digests.items():
        if name not in present:
            raise ReleaseError(f"release '{folder}' is incomplete: {name} is missing; copy it again")
        if sha256(folder / name) != digest:
            raise ReleaseError(f"release '{folder}': {name} is damaged or was changed; copy it again")


def architecture(folder: Path, config: dict) -> CoreSeg | Segmenter:
    """The model that a release describes, with weights that are yet to be loaded.

    Raises:
        ReleaseError: Where it names anything outside the release.
    """
    if "segmenter" in config:
        alone = from_plain(SegmenterConfig, config["segmenter"], f"release '{folder}': segmenter")
        return segmenter_for(located(folder, alone))
    core_seg = from_plain(CoreSegConfig, config.get("core_seg"), f"release '{folder}': core_seg")
    located(folder, core_seg.segmenter)
    if core_seg.reasoner.model != "small":
        if core_seg.reasoner.model != REASONER:
            raise ReleaseError(
                f"release '{folder}': reasoner '{core_seg.reasoner.model}' is not in the release; write it again"
            )
        core_seg.reasoner.model = inside(folder, REASONER)
    return CoreSeg(core_seg, pretrained=False)


def located(folder: Path, config: SegmenterConfig) -> SegmenterConfig:
    """The configuration, with the path of what describes a segmenter of Hugging Face."""
    if config.architecture == "sam2":
        if config.weights != SEGMENTER:
            raise ReleaseError(
                f"release '{folder}': segmenter '{config.weights}' is not in the release; write it again"
            )
        config.weights = inside(folder, SEGMENTER)
    return config


def inside(folder: Path, name: str) -> str:
    """The path of a folder of a release, which has to have a config.json: else the name could be taken for a hub id."""
    if not (folder / name / "config.json").is_file():
        raise ReleaseError(f"release '{folder}' is incomplete: {name}/config.json is missing; copy it again")
    return str(folder / name)


def shared_names(model: torch.nn.Module) -> dict[str, str]:
    """Second names of tensors that the model holds under two, such as tied embeddings, each with its first."""
    first: dict[int, str] = {}
    names = {name: first.setdefault(id(tensor), name) for name, tensor in model.state_dict(keep_vars=True).items()}
    return {name: of for name, of in names.items() if name != of}


def from_plain(kind: type, values: Any, where: str) -> Any:
    """A configuration dataclass from plain JSON values; unknown and missing names and wrong types are errors.

    Raises:
        ReleaseError: Naming the value.
    """
    if not isinstance(values, dict):
        raise ReleaseError(f"{where} is not an object; write the release again")
    known = {field.name: field for field in fields(kind)}
    if unknown := sorted(values.keys() - known.keys()):
        raise ReleaseError(f"{where}.{unknown[0]} is not known to this version; update the lab or the release")
    built = {}
    for name, value in values.items():
        default = getattr(kind(), name)
        if is_dataclass(default):
            value = from_plain(type(default), value, f"{where}.{name}")
        elif get_origin(known[name].type) is Literal and value not in get_args(known[name].type):
            allowed = ", ".join(map(repr, get_args(known[name].type)))
            raise ReleaseError(f"{where}.{name} is {value!r}, not one of {allowed}; update the lab or the release")
        elif default is not None and type(value) is not type(default):
            raise ReleaseError(f"{where}.{name} is {value!r}, not {type(default).__name__}; write the release again")
        built[name] = value
    return kind(**built)


def load_any(path: Path | str) -> CoreSeg | Segmenter:
    """The model of a release folder or of one of your own checkpoints: that of stage 0 is a segmenter.

    Raises:
        ReleaseError: When it is neither.
    """
    if Path(path).suffix != ".ckpt":
        return load_release(path)
    if "segmenter" in read_checkpoint(path)["hyper_parameters"]:
        return module_from_checkpoint(path, "segmenter", segmenter_for, SegmenterConfig)
    return module_from_checkpoint(path, "core_seg", partial(CoreSeg, pretrained=False), CoreSegConfig)


def load_model(path: Path | str) -> CoreSeg:
    """The model of a release folder or of one of your own checkpoints, of stage 1 or 2.

    Raises:
        ReleaseError: When it is neither.
    """
    model = load_any(path)
    if isinstance(model, Segmenter):
        raise ReleaseError(f"'{path}' is of stage 0 and cannot reason; give a release or checkpoint of stage 1 or 2")
    return model


def load_segmenter(path: Path | str) -> Segmenter:
    """The segmenter of a release folder or of one of your own checkpoints, of whichever stage.

    Raises:
        ReleaseError: When it is neither.
    """
    model = load_any(path)
    return model if isinstance(model, Segmenter) else model.segmenter


def module_from_checkpoint(path: Path | str, name: str, build: Callable[[Any], torch.nn.Module], config: type) -> Any:
    """A part of a checkpoint of your own, ready for inference.

    Args:
        path: The checkpoint.
        name: Of the part in the LightningModule and of its configuration in the hyper-parameters.
        build: Makes it from its configuration; the weights are loaded after that.
        config: The class of the configuration.

    Raises:
        ReleaseError: No such file, or not such a checkpoint.
    """
    checkpoint = read_checkpoint(path)
    if name not in checkpoint["hyper_parameters"]:
        raise ReleaseError(f"checkpoint '{path}' holds no {name}; give one of a stage that trains it")
    module = build(from_plain(config, checkpoint["hyper_parameters"][name], f"checkpoint '{path}'"))
    try:
        module.load_state_dict(part(checkpoint, f"{name}."))
    except RuntimeError:
        raise ReleaseError(
            f"checkpoint '{path}' has other weights than its configuration makes here; it is of another version of the "
            "lab, which can merge it into a release"
        ) from None
    return module.eval()


def read_checkpoint(path: Path | str) -> dict:
    """A Lightning checkpoint of our own, read without unpickling code.

    Raises:
        ReleaseError: No such file, or no checkpoint.
    """
    if not Path(path).is_file():
        raise ReleaseError(f"checkpoint '{path}' does not exist; check the path")
    try:
        checkpoint = torch.load(path, weights_only=True, map_location="cpu")
    except Exception:
        raise ReleaseError(
            f"'{path}' is not a checkpoint that can be read safely; give one that core-seg fit wrote"
        ) from None
    if not isinstance(checkpoint, dict) or not {"state_dict", "hyper_parameters"} <= checkpoint.keys():
        raise ReleaseError(f"'{path}' is not a checkpoint of core-seg fit; give one from runs/<name>/checkpoints/")
    return checkpoint


def part(checkpoint: dict, prefix: str) -> dict[str, torch.Tensor]:
    """The weights below a prefix, the prefix removed."""
    state = checkpoint["state_dict"]
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
