"""Checkpoints of the real architectures, tiny and random, saved as the real ones are."""

from pathlib import Path

import torch
from transformers import (
    CLIPImageProcessor,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Sam2Config,
    Sam2Model,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
)

from lab.model.reasoner import Reasoner
from lab.model.small import CHAT_TEMPLATE, SMALL_TOKENIZER

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
IMAGE_SIZES = {"qwen": 112, "fastvlm": 128, "idefics3": 128, "smolvlm": 64, "llama": 64}
"""Sides that give 16, 4 x 4 = 16, 5 x 4, 4 and 4 visual tokens."""
SPARE_ROWS = 7
"""Checkpoints have more rows than tokens, of whose number Qwen's and FastVLM's are."""


def tokenizer(*names: str, image: str = "<image>", pad: str = "<pad>") -> PreTrainedTokenizerBase:
    """As real ones: it knows no `<seg>`, and its template writes `image`."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    text = SMALL_TOKENIZER.read_text().replace('"<seg>"', '"<gone>"')
    return_ = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(text), pad_token=pad, eos_token="<eos>")
    return_.chat_template = CHAT_TEMPLATE.replace("<image>", image)
    return_.add_special_tokens({"additional_special_tokens": list(names)}, replace_extra_special_tokens=False)
    return return_


def save(folder: Path, model: torch.nn.Module, *parts) -> str:
    for part in (model, *parts):
        part.save_pretrained(folder)
    return str(folder)


def qwen(folder: Path, tied: bool = False) -> str:
    """Qwen2.5-VL: 28 x 28 pixels a token, M-RoPE, rows to spare."""
    names = ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"]
    words = tokenizer(*names, image="".join(names))
    start, image, end = words.convert_tokens_to_ids(names)
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    config = Qwen2_5_VLConfig(
        text_config=TEXT | {"vocab_size": len(words) + SPARE_ROWS, "rope_parameters": rope},
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "out_hidden_size": 64,
            "num_heads": 2,
            "intermediate_size": 64,
            "fullatt_block_indexes": [1],
        },
        image_token_id=image,
        vision_start_token_id=start,
        vision_end_token_id=end,
        tie_word_embeddings=tied,
    )
    return save(folder, Qwen2_5_VLForConditionalGeneration(config), words, Qwen2VLImageProcessor())


def fastvlm(folder: Path, tied: bool = True) -> str:
    """FastVLM: timm's FastViT, padding that is the end of sequence, no mean and no deviation."""
    words = tokenizer(pad="<eos>")
    config = FastVlmConfig(
        vision_config={
            "model_type": "timm_wrapper",
            "architecture": "fastvit_t8",
            "hidden_size": 768,
            "do_pooling": True,
            "model_args": {"inference_mode": True},
        },
        text_config=TEXT | {"model_type": "qwen2", "vocab_size": len(words) + SPARE_ROWS},
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
        tie_word_embeddings=tied,
    )
    processor = CLIPImageProcessor(
        size={"shortest_edge": 128}, crop_size=128, image_mean=[0.0, 0.0, 0.0], image_std=[1.0, 1.0, 1.0]
    )
    return save(folder, FastVlmForConditionalGeneration(config), words, processor)


def idefics3(folder: Path, tied: bool = False, kind: str = "idefics3") -> str:
    """SmolVLM, whose first version is an Idefics3: tiles of 64 pixels with 4 tokens each, and no rows to spare."""
    classes = {
        "idefics3": (Idefics3Config, Idefics3ForConditionalGeneration, Idefics3ImageProcessor),
        "smolvlm": (SmolVLMConfig, SmolVLMForConditionalGeneration, SmolVLMImageProcessor),
    }
    config_class, model_class, processor_class = classes[kind]
    marks = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    words = tokenizer("<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *marks)
    config = config_class(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 16,
            "initializer_range": 0.2,
        },
        text_config=TEXT | {"model_type": "llama", "vocab_size": len(words), "pad_token_id": words.pad_token_id},
        image_token_id=words.convert_tokens_to_ids("<image>"),
        pad_token_id=words.pad_token_id,
        scale_factor=2,
        tie_word_embeddings=tied,
    )
    processor = processor_class(size={"longest_edge": 128}, max_image_size={"longest_edge": 64})
    return save(folder, model_class(config), words, processor)


def smolvlm(folder: Path, tied: bool = False) -> str:
    """SmolVLM 2."""
    return idefics3(folder, tied, "smolvlm")


def llama(folder: Path, tied: bool = True) -> str:
    """SmolLM2: text alone, messages that are strings, padding that is the end of sequence, and no rows to spare."""
    words = tokenizer(pad="<eos>")
    words.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
    config = LlamaConfig(**TEXT, vocab_size=len(words), eos_token_id=words.eos_token_id, tie_word_embeddings=tied)
    return save(folder, LlamaForCausalLM(config), words)


def sam2(folder: Path) -> str:
    """SAM 2: Hiera with four stages, 32 channels."""
    config = Sam2Config(
        vision_config={
            "model_type": "sam2_vision_model",
            "backbone_config": {
                "model_type": "sam2_hiera_det_model",
                "hidden_size": 8,
                "blocks_per_stage": [1, 1, 3, 1],
                "embed_dim_per_stage": [8, 16, 32, 64],
                "num_attention_heads_per_stage": [1, 1, 2, 2],
                "global_attention_blocks": [4],
                "image_size": [64, 64],
            },
            "backbone_channel_list": [64, 32, 16, 8],
            "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
            "fpn_hidden_size": 32,
        },
        prompt_encoder_config={"hidden_size": 32, "image_size": 64},
        mask_decoder_config={"hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 2, "iou_head_hidden_dim": 32},
    )
    model = Sam2Model(config)
    with torch.no_grad():  # the real ones are not zero
        model.no_memory_embedding.normal_()
    return save(folder, model)


REASONERS = {"qwen": qwen, "fastvlm": fastvlm, "idefics3": idefics3, "smolvlm": smolvlm, "llama": llama}


def written(reasoner: Reasoner, prompt: list[int], tokens: int, **given: torch.Tensor) -> list[int]:
    """What Hugging Face's own greedy `generate` writes behind a prompt."""
    ids = reasoner.model.generate(
        input_ids=torch.tensor([prompt]),
        **given,
        max_new_tokens=tokens,
        do_sample=False,
        suppress_tokens=reasoner.forbidden,
        eos_token_id=reasoner.eos_id,
        pad_token_id=reasoner.pad_id,
    )
    return ids[0, len(prompt) :].tolist()
