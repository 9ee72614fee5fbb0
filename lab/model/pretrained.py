"""Hugging Face checkpoints of the architectures that the lab knows; nothing in their files can name code."""

import struct
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPImageProcessor,
    FastVlmConfig,
    GgufConfig,
    Idefics3Config,
    Idefics3ImageProcessor,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2VLImageProcessor,
    Sam2Config,
    SmolVLMConfig,
    SmolVLMImageProcessor,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import find_adapter_config_file

from lab.errors import LabError

SEG = "<seg>"
PAD = "<|lab_pad|>"
"""Added where a tokenizer's padding is its end of sequence (FastVLM's), which must not be forbidden or masked."""
NAMES_CODE = {
    "auto_map",
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "experts_implementation",
    "quantization_config",
}
"""Keys by which a configuration could have code fetched or chosen; they are dropped."""


class Architecture(NamedTuple):
    """What may stand behind a `model_type`, and the types of its parts that transformers would look up by name."""

    config: type[PreTrainedConfig]
    image_processor: type[BaseImageProcessor] | None
    parts: dict[str, str]


ARCHITECTURES = {
    "qwen2_5_vl": Architecture(Qwen2_5_VLConfig, Qwen2VLImageProcessor, {}),
    "idefics3": Architecture(Idefics3Config, Idefics3ImageProcessor, {"text_config": "llama"}),
    "smolvlm": Architecture(SmolVLMConfig, SmolVLMImageProcessor, {"text_config": "llama"}),
    "fast_vlm": Architecture(
        FastVlmConfig, CLIPImageProcessor, {"text_config": "qwen2", "vision_config": "timm_wrapper"}
    ),
    "llama": Architecture(LlamaConfig, None, {}),
    "sam2": Architecture(
        Sam2Config,
        None,
        {"vision_config": "sam2_vision_model", "vision_config.backbone_config": "sam2_hiera_det_model"},
    ),
}
LANGUAGE = "llama"
"""A language model without eyes."""
REASONERS = ("qwen2_5_vl", "idefics3", "smolvlm", "fast_vlm")


def read_config(model: str, known: tuple[str, ...]) -> PreTrainedConfig:
    """The configuration of a checkpoint.

    Args:
        model: Local folder, GGUF file or hub id; nothing is downloaded while HF_HUB_OFFLINE is 1, which is the default.
        known: Model types that will do.

    Raises:
        LabError: No such checkpoint, or not of such a type.
    """
    place, gguf = located(model)
    if find_adapter_config_file(place):  # transformers would add it, and read it with pickle where it is one
        raise LabError(
            f"checkpoint '{model}' has an adapter beside it (adapter_config.json); merge it, or move it away"
        )
    try:
        values, _ = PreTrainedConfig.get_config_dict(place, **gguf)
    except OSError:
        raise LabError(
            f"no checkpoint '{model}' in this folder or in the Hugging Face cache; check the path, or download it with "
            f"HF_HUB_OFFLINE=0 hf download {model}"
        ) from None
    except (KeyError, ValueError, struct.error):  # the last of a GGUF file that is cut short
        raise LabError(
            f"'{model}' is not a checkpoint of an architecture that transformers knows; give another"
        ) from None
    if values.get("model_type") == "sam2_video":  # so say Meta's checkpoints, of which the image part is used
        values = {name: values.get(name) for name in ("vision_config", "prompt_encoder_config", "mask_decoder_config")}
        values["model_type"] = "sam2"
    kind = values.get("model_type")
    if kind not in known:
        raise LabError(f"checkpoint '{model}' is of type '{kind}', but only {', '.join(known)} will do; give another")
    if "quantization_config" in values:
        raise LabError(f"checkpoint '{model}' is quantised, which cannot be trained; give the one with full weights")
    return checked(values, kind, model)


def located(model: str) -> tuple[str, dict[str, str]]:
    """What transformers' `from_pretrained` takes of a checkpoint: a GGUF file is named beside its folder."""
    path = Path(model)
    if path.suffix == ".gguf" and not path.is_file():
        raise LabError(f"'{model}' does not exist; check the path")
    return (str(path.parent), {"gguf_file": path.name}) if path.suffix == ".gguf" else (model, {})


def checked(values: dict[str, Any], kind: str, model: str) -> PreTrainedConfig:
    """A configuration from its JSON values, none of whose parts is of another class than it should be."""
    values = without_code(values)
    for path, expected in ARCHITECTURES[kind].parts.items():
        part: Any = values
        for name in path.split("."):
            part = part.get(name) or {}
        if part.get("model_type", expected) != expected:
            raise LabError(f"checkpoint '{model}': {path} is of type '{part['model_type']}', not {expected}")
    if kind == "fast_vlm":
        vision = values.get("vision_config") or {}
        name, settings = vision.get("architecture", "fastvit_mci3"), vision.get("model_args") or {}
        if set(name) & set(":/\\") or not timm.is_model(name) or settings.keys() - {"inference_mode"}:
            raise LabError(f"checkpoint '{model}': its vision tower '{name}' {settings} is not one of timm's alone")
    return ARCHITECTURES[kind].config.from_dict(values)


def without_code(values: Any) -> Any:
    """JSON values without the keys of `NAMES_CODE`, at any depth."""
    if isinstance(values, list):
        return [without_code(value) for value in values]
    if not isinstance(values, dict):
        return values
    return {name: without_code(value) for name, value in values.items() if name not in NAMES_CODE}


def read_reasoner(
    model: str, dtype: torch.dtype, pretrained: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, BaseImageProcessor]:
    """A vision language model with its tokenizer, which knows `<seg>`, and its image processor.

    Args:
        model: Local folder or hub id.
        dtype: Of the weights.
        pretrained: Load the weights; else only the architecture is read and the weights are random.

    Raises:
        LabError: No such checkpoint, or not of an architecture that the lab knows.
    """
    config = read_config(model, REASONERS)
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
        image_processor = ARCHITECTURES[config.model_type].image_processor.from_pretrained(model)
        kinds = AutoModelForImageTextToText
        if pretrained:
            language = kinds.from_pretrained(
                model, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=False
            )
        else:
            language = kinds.from_config(config, dtype=dtype, trust_remote_code=False)
    except (OSError, ValueError):
        raise LabError(
            f"checkpoint '{model}' is incomplete: it needs config.json, preprocessor_config.json, tokenizer.json and "
            "model.safetensors; download it again"
        ) from None
    check_chat(tokenizer, model)
    add_tokens(language, tokenizer, [SEG])
    return language, tokenizer, image_processor


def read_language(
    model: str, dtype: torch.dtype, pretrained: bool, tokens: list[str]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A language model of text alone with its tokenizer, which knows `tokens` too.

    Args:
        model: Local folder, GGUF file (its weights are unpacked) or hub id, of Llama's architecture such as SmolLM2's.
        dtype: Of the weights.
        pretrained: As in `read_reasoner`.
        tokens: New ones.

    Raises:
        LabError: No such checkpoint, of another architecture, or incomplete.
    """
    config, (place, gguf) = read_config(model, (LANGUAGE,)), located(model)
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(place, **gguf)
        if pretrained:
            how = gguf | {"quantization_config": GgufConfig(dequantize=True)} if gguf else {"use_safetensors": True}
            language = AutoModelForCausalLM.from_pretrained(
                place, config=config, dtype=dtype, trust_remote_code=False, **how
            )
        else:
            language = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except (OSError, ValueError):
        raise LabError(
            f"checkpoint '{model}' is incomplete: it needs config.json, tokenizer.json and model.safetensors, or is a "
            "GGUF file; download it again"
        ) from None
    check_chat(tokenizer, model)
    add_tokens(language, tokenizer, tokens)
    return language, tokenizer


def check_chat(tokenizer: PreTrainedTokenizerBase, model: str) -> None:
    """
    Raises:
        LabError: For a tokenizer that knows no chat.
    """
    if tokenizer.chat_template is None:
        raise LabError(f"checkpoint '{model}' has no chat template (chat_template.jinja); give an instruct model")


def add_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: list[str]) -> None:
    """Let a model and its tokenizer know tokens such as `<seg>`, and padding that is not the end of sequence.

    Checkpoints often have more rows than tokens, and then none is added. A new token starts as the mean of all others.
    """
    known = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": tokens}, replace_extra_special_tokens=False)
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.add_special_tokens({"pad_token": PAD})
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight[known : len(tokenizer)] = layer.weight[:known].float().mean(0).to(layer.weight.dtype)


def write_reasoner(folder: Path, *parts: PreTrainedConfig | PreTrainedTokenizerBase | BaseImageProcessor) -> None:
    """What `read_reasoner` or `read_language` needs to build the architecture again."""
    for part in parts:
        part.save_pretrained(folder)
