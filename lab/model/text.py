"""A pretrained language model of text alone, such as SmolLM2, that sees through the small segmenter's backbone."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import FastVlmConfig, FastVlmForConditionalGeneration, LlamaConfig

from lab.data.images import Frame
from lab.errors import LabError
from lab.model.decoding import pad
from lab.model.look import Look
from lab.model.pretrained import SEG, read_language, without_code, write_reasoner
from lab.model.reasoner import Reasoner
from lab.model.small import IMAGE, INIT_STD, small_vision_config

QUERY = "what is asked"


def with_eyes(language: LlamaConfig, image_id: int, image_size: int) -> FastVlmConfig:
    """FastVLM's architecture around a language model, with the small SAM's backbone as its vision tower."""
    return FastVlmConfig(
        vision_config=small_vision_config(),
        text_config=language,
        tie_word_embeddings=language.tie_word_embeddings,
        image_token_index=image_id,
        image_seq_length=(image_size // 32) ** 2,
    )


class TextReasoner(Reasoner):
    """The small model's eyes before a language model that has read: FastVLM's architecture around Llama's.

    Unlike the small model's, the words of its prompt are read in order, as it has learnt to read. It has to learn to
    see, so that LoRA is on all linear layers, and may be left with its first layers alone.
    """

    cuts_layers = True
    has_gist = True
    lora_targets = (*Reasoner.lora_targets, "gate_proj", "up_proj", "down_proj")

    def build(self, pretrained: bool) -> None:
        dtype = getattr(torch, self.config.dtype)
        language, self.tokenizer = read_language(self.config.model, dtype, pretrained, [SEG, IMAGE])
        layers, kept = language.model.layers, self.config.first_layers
        if not 0 <= kept <= len(layers):
            raise LabError(f"'{self.config.model}' has {len(layers)} layers, not {kept}; change reasoner.first_layers")
        if kept:
            language.model.layers = layers[:kept]
            language.config.num_hidden_layers = kept
        self.text_config = LlamaConfig.from_dict(without_code(language.config.to_dict()))
        replaced = {"num_hidden_layers": 1, "initializer_range": INIT_STD}  # the projector alone stays
        one_layer = LlamaConfig.from_dict(self.text_config.to_dict() | replaced)
        image_id = self.tokenizer.convert_tokens_to_ids(IMAGE)
        config = with_eyes(one_layer, image_id, self.config.image_size)
        self.model = FastVlmForConditionalGeneration(config)
        self.model.model.language_model = language.model
        self.model.lm_head = language.lm_head
        self.model.config.text_config = self.text_config
        self.before_query = len(self.tokenizer.encode(self.chat(QUERY).split(QUERY)[0], add_special_tokens=False))

    @property
    def shares_tower(self) -> bool:
        return True

    def add_notice(self) -> None:
        super().add_notice()
        self.look = Look(self.hidden_size).to(self.mark.device)
        self.gist = nn.Linear(self.hidden_size, self.hidden_size, bias=False, device=self.mark.device)
        nn.init.normal_(self.gist.weight, std=INIT_STD)
        self.heed = nn.Parameter(torch.zeros(self.hidden_size, device=self.mark.device))

    def found(self, prompts: list[list[int]], visual: Tensor, shapes: Tensor | None = None) -> Tensor:
        """As `Reasoner.found`, by the first look where it has one, to which the words are as they are."""
        if not self.config.notice:
            return super().found(prompts, visual, shapes)
        asked = [prompt[: prompt.index(self.image_id)] for prompt in prompts]
        input_ids, mask = pad(asked, self.pad_id, device=visual.device)
        with torch.no_grad():
            words = self(input_ids, mask, visual[:, :0], torch.zeros_like(mask))
        mask[:, : self.before_query] = 0
        return self.look(words.float(), mask, visual)

    def gist_of(self, visual: Tensor, found: Tensor) -> Tensor:
        """What the first look found, (B, D) float32: a map of the mean of the marked visual tokens (B, V, D), weighted
        by what its logits (B, V) say.

        The masks teach the first look by it, before the language model has learnt to write and beside it after that.
        """
        share = found.sigmoid()[..., None]
        mean = (share * visual).sum(1) / share.sum(1)
        return self.gist(F.layer_norm(mean, mean.shape[-1:])).float()

    def told(self, states: Tensor, gist: Tensor | None) -> Tensor:
        """The gist, and as much of the state of `<seg>` as training finds useful, at first nothing: after a short
        training that state holds hardly anything of the place (docs/results.md)."""
        return super().told(states, gist) if gist is None else gist + self.heed * states.float()

    def prompt_ids(self, query: str, frame: Frame | None = None) -> list[int]:
        """As `Reasoner.prompt_ids`, for a chat template whose messages are plain text."""
        content = query.replace("<", " ").replace(">", " ") + "\n" + self.visual_text(self.image_tokens)
        return self.tokenizer.encode(self.chat(content), add_special_tokens=False)

    def chat(self, content: str) -> str:
        """What a user says, within the words of the chat template."""
        messages = [{"role": "user", "content": content}]
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def write_architecture(self, folder: Path) -> None:
        write_reasoner(folder, self.text_config, self.tokenizer)
