"""Configurations that were published with the checkpoints of the presets, so that `core-seg estimate` needs no network.

Of each `config.json` only what decides shapes is kept. Tests compare the parameters that they give with the published
sizes.
"""

from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

from lab.errors import LabError
from lab.model.pretrained import LANGUAGE, REASONERS, read_config

SMOLVLM_VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 512,
    "patch_size": 16,
}
"""google/siglip-base-patch16-512, without its pooling head."""
PUBLISHED: dict[str, dict] = {
    # https://huggingface.co/Qwen/Qwen2.5-VL-3B-Instruct/blob/main/config.json
    "Qwen/Qwen2.5-VL-3B-Instruct": {
        "model_type": "qwen2_5_vl",
        "tie_word_embeddings": True,
        "text_config": {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
        },
        "vision_config": {
            "depth": 32,
            "hidden_size": 1280,
            "out_hidden_size": 2048,
            "num_heads": 16,
            "intermediate_size": 3420,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "window_size": 112,
        },
    },
    # https://huggingface.co/Qwen/Qwen2.5-VL-7B-Instruct/blob/main/config.json
    "Qwen/Qwen2.5-VL-7B-Instruct": {
        "model_type": "qwen2_5_vl",
        "tie_word_embeddings": False,
        "text_config": {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
        },
        "vision_config": {
            "depth": 32,
            "hidden_size": 1280,
            "out_hidden_size": 3584,
            "num_heads": 16,
            "intermediate_size": 3420,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "window_size": 112,
        },
    },
    # https://huggingface.co/HuggingFaceTB/SmolVLM-256M-Instruct/blob/main/config.json
    "HuggingFaceTB/SmolVLM-256M-Instruct": {
        "model_type": "idefics3",
        "scale_factor": 4,
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "llama",
            "vocab_size": 49280,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "head_dim": 64,
            "tie_word_embeddings": False,
            "pad_token_id": 2,
        },
        "vision_config": SMOLVLM_VISION,
    },
    # https://huggingface.co/HuggingFaceTB/SmolVLM-500M-Instruct/blob/main/config.json
    "HuggingFaceTB/SmolVLM-500M-Instruct": {
        "model_type": "idefics3",
        "scale_factor": 4,
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "llama",
            "vocab_size": 49280,
            "hidden_size": 960,
            "intermediate_size": 2560,
            "num_hidden_layers": 32,
            "num_attention_heads": 15,
            "num_key_value_heads": 5,
            "head_dim": 64,
            "tie_word_embeddings": False,
            "pad_token_id": 2,
        },
        "vision_config": SMOLVLM_VISION,
    },
    # https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct/blob/main/config.json
    "HuggingFaceTB/SmolLM2-135M-Instruct": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    # https://huggingface.co/KamilaMila/FastVLM-0.5B/blob/main/config.json
    "KamilaMila/FastVLM-0.5B": {
        "model_type": "fast_vlm",
        "tie_word_embeddings": True,
        "image_token_index": 151646,
        "image_seq_length": 256,
        "text_config": {
            "model_type": "qwen2",
            "vocab_size": 152000,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
        "vision_config": {
            "model_type": "timm_wrapper",
            "architecture": "fastvit_mci3",
            "do_pooling": True,
            "global_pool": "avg",
            "hidden_size": 3072,
            "model_args": {"inference_mode": True},
        },
    },
}


def architecture(model: str) -> PreTrainedConfig:
    """The configuration of a model: of a local folder or GGUF file, or of the table above.

    Raises:
        LabError: For a hub id that is not in the table.
    """
    if model.endswith(".gguf") or (Path(model) / "config.json").is_file():
        return read_config(model, (*REASONERS, LANGUAGE))
    if model not in PUBLISHED:
        raise LabError(
            f"reasoner.model '{model}' is neither a folder with a config.json nor one of {', '.join(PUBLISHED)}; "
            "give the path of a local copy"
        )
    values = dict(PUBLISHED[model])
    return AutoConfig.for_model(values.pop("model_type"), **values)
