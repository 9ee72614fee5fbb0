"""The `small` reasoner: the configuration and the tokenizer of a FastVLM of 6 M parameters, made here."""

from pathlib import Path

from transformers import (
    FastVlmConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    TimmWrapperConfig,
)

from lab.model.segmenter import PyramidImageEncoder

IMAGE = "<image>"
SMALL_TOKENIZER = Path(__file__).with_name("small_tokenizer.json")
"""Byte-level BPE of 874 tokens over the lab's own phrasings, made by `python -m lab.model.tokenizer`."""
INIT_STD = 0.0625
"""Of the small model's weights, 1 / sqrt(256), and of its visual tokens.

At Qwen2's own 0.02, meant for wide models, attention starts so flat, and places and words so faint beside the picture,
that the query is not heeded within 600 steps."""
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}<assistant>"
)


def small_tokenizer() -> PreTrainedTokenizerBase:
    """The tokenizer of the `small` model."""
    return PreTrainedTokenizerFast(
        tokenizer_file=str(SMALL_TOKENIZER), pad_token="<pad>", eos_token="<eos>", chat_template=CHAT_TEMPLATE
    )


def small_vision_config() -> TimmWrapperConfig:
    """The small SAM's backbone as a vision tower."""
    channels = PyramidImageEncoder.STRIDE_32_CHANNELS
    return TimmWrapperConfig(
        architecture="tf_efficientnet_lite0", hidden_size=channels, num_features=channels, do_pooling=False
    )


def small_config(hidden_size: int, layers: int, image_size: int, tokenizer: PreTrainedTokenizerBase) -> FastVlmConfig:
    """FastVLM's architecture with the small SAM's backbone as its vision tower; see `ReasonerConfig`."""
    return FastVlmConfig(
        vision_config=small_vision_config(),
        text_config=Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=4 * hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=hidden_size // 64,
            num_key_value_heads=hidden_size // 64,
            max_position_embeddings=1024,
            initializer_range=INIT_STD,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        ),
        tie_word_embeddings=True,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=(image_size // 32) ** 2,
    )
