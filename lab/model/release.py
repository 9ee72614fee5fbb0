"""What is shared of a model: safetensors, JSON and a card; no pickle, and nothing imported by a name from data."""

import json
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lab.errors import LabError
from lab.model.core_seg import CoreSeg, CoreSegConfig
from lab.model.segmenter import Segmenter, SegmenterConfig

FORMAT = "core-seg-release-1"
HEADER = """\
---
library_name: core-seg-lab
pipeline_tag: image-segmentation
license: cc-by-nc-sa-4.0
---
# {title}

**Research use only. Not a medical device.** It is wrong often enough to matter; see its evaluation.

- Trained on: {data}
- Terms: those of the strictest source of its training data: non-commercial, share alike.
"""
CARD = """
A model of the CORE-Seg lab (after arXiv 2603.05911): it reasons, names boxes and segments the lesion that is asked for.

```
core-seg segment IMAGE --query "Locate and segment the polyp in this colon colonoscopy." --release DIR --out out/
```

- Input: one RGB image, padded to {size} px, and an English query of the form above.
- Output: `<think> reasoning </think><answer>The LESION are located at [[x1,y1,x2,y2],...]. The mask is <seg>.</answer>`
  with boxes on a grid of {grid} and the mask that the `<seg>` token prompts, or
  `<think> reasoning </think><answer>No such lesion is found. The mask is empty.</answer>`
- Limits: it knows the kinds of images that it was trained on, reads English alone, misses lesions of a few pixels, and
  its reasoning is of measured words (location, size, contrast, margin, shape, count), not of medical knowledge.
"""
CORROBORATED = """\
- Every answer is read again beside the mask that its draft drew: claims that the mask does not confirm are left out,
  and the boxes are those of the mask (`corroborate`).
"""
SEGMENTER_CARD = """
Stage 0 of the CORE-Seg lab (after arXiv 2603.05911): a small SAM that segments what is in a box, as MedSAM does; what
stage 1 starts from (`--model.init_args.segmenter_checkpoint DIR`).

- Input: one RGB image, padded to {size} px, and boxes. Output: their masks.
- Limits: it knows the kinds of images that it was trained on, and fills the box that it is given, right or wrong.
"""


class ReleaseError(LabError):
    """A folder that is not a complete release of ours."""


def save_release(
    model: CoreSeg | Segmenter,
    folder: Path | str,
    title: str,
    data: str,
    half: bool = True,
    evaluations: list[dict] | None = None,
) -> None:
    """Write `model.safetensors`, `config.json`, the tokenizer and `README.md` (the card).

    Args:
        model: Of any preset, or the segmenter of stage 0, which has no tokenizer.
        folder: Made when absent; its release files are replaced.
        title: Of the card.
        data: What the model was trained on, for the card.
        half: Store half precision; False keeps float32 and with it the last bits of every logit.
        evaluations: What `core-seg evaluate` wrote of it, for the card.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    for name in shared_names(model):
        del state[name]
    if half:
        state = {name: t.half() if t.dtype == torch.float32 else t for name, t in state.items()}
    save_file(state, folder / "model.safetensors")
    card = HEADER.format(title=title, data=data)
    if isinstance(model, Segmenter):
        config = {"segmenter": asdict(model.config)}
        card += SEGMENTER_CARD.format(size=model.config.image_size)
    else:
        config = {"core_seg": asdict(model.config)}
        card += CARD.format(size=model.config.segmenter.image_size, grid=model.config.reasoner.grid)
        card += CORROBORATED if model.config.corroborate else ""
        model.reasoner.tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "config.json").write_text(json.dumps({"format": FORMAT} | config, indent=2) + "\n")
    (folder / "README.md").write_text(card + "".join(map(results_table, evaluations or ())))


def results_table(evaluation: dict) -> str:
    """An evaluation by source, for a card."""
    lines = [f"\n## On the {evaluation['split']} split of {evaluation['manifest']}\n"]
    lines += ["| source | n | mDice (95 %) | failure rate | box F1 | faithful claims |", "|---|---|---|---|---|---|"]
    for name, values in {"**all**": evaluation["overall"], **evaluation["by"]["source"]}.items():
        low, high = values["mDice_ci"]
        cells = [f"{values['mDice']:.3f} ({low:.3f} to {high:.3f})", f"{values['failure_rate']:.1%}"]
        cells += ["" if (v := values.get(key)) is None else f"{v:.2f}" for key in ("box_f1", "faithfulness")]
        lines.append(f"| {name} | {values['n']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def load_release(folder: Path | str) -> CoreSeg | Segmenter:
    """Load a release in float32, ready for inference; one of stage 0 gives its segmenter.

    Raises:
        ReleaseError: With one sentence, for a folder that is incomplete, damaged or not ours.
    """
    folder = Path(folder)
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
    try:
        state = load_file(folder / "model.safetensors")
    except SafetensorError:
        raise ReleaseError(f"release '{folder}': model.safetensors is damaged; copy it again") from None
    if "segmenter" in config:
        model = Segmenter(from_plain(SegmenterConfig, config["segmenter"], f"release '{folder}': segmenter"))
    else:
        core_seg = from_plain(CoreSegConfig, config.get("core_seg"), f"release '{folder}': core_seg")
        if core_seg.reasoner.model != "small":
            raise ReleaseError(
                f"release '{folder}': reasoner '{core_seg.reasoner.model}' cannot be loaded from a release yet"
            )
        model = CoreSeg(core_seg)
    state |= {name: state[first] for name, first in shared_names(model).items() if first in state}
    try:
        model.load_state_dict(
            {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
        )
    except (RuntimeError, AttributeError):
        raise ReleaseError(f"release '{folder}': its weights do not fit its config.json; write it again") from None
    return model.eval()


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
        return module_from_checkpoint(path, "segmenter", Segmenter, SegmenterConfig)
    return module_from_checkpoint(path, "core_seg", CoreSeg, CoreSegConfig)


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


def module_from_checkpoint(path: Path | str, name: str, kind: type, config: type) -> Any:
    """A part of a checkpoint of your own, ready for inference.

    Args:
        path: The checkpoint.
        name: Of the part in the LightningModule and of its configuration in the hyper-parameters.
        kind: What is built.
        config: What it is built from.

    Raises:
        ReleaseError: No such file, or not such a checkpoint.
    """
    checkpoint = read_checkpoint(path)
    if name not in checkpoint["hyper_parameters"]:
        raise ReleaseError(f"checkpoint '{path}' holds no {kind.__name__}; give one of a stage that trains it")
    module = kind(from_plain(config, checkpoint["hyper_parameters"][name], f"checkpoint '{path}'"))
    module.load_state_dict(part(checkpoint, f"{name}."))
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
