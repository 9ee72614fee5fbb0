"""The multimodal reasoning module: a vision language model that writes reasoning, boxes and one `<seg>` token."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import FastVlmForConditionalGeneration

from lab.data.images import Frame
from lab.errors import LabError
from lab.model.decoding import Prompt, Sampling, Step, collect, decode, pad
from lab.model.lora import StartOfLora, add_lora, lora_layers, merged_lora, rounds_lora, settle_lora, without_lora
from lab.model.pretrained import SEG, read_reasoner, write_reasoner
from lab.model.seg_row import settle_row, train_row
from lab.model.segmenter import normalise
from lab.model.small import IMAGE, INIT_STD, small_config, small_tokenizer

GREEDY = Sampling()


@dataclass
class ReasonerConfig:
    """Which language model reasons, and how its answers are written."""

    model: str = "small"
    """`small`: a FastVLM of 6 M parameters from scratch; else a local path or hub id of a Qwen2.5-VL, SmolVLM (or
    Idefics3) or FastVLM, or of a language model such as SmolLM2, also as a GGUF file, which is given the small one's
    eyes."""
    hidden_size: int = 256
    """`small`: width of the language model."""
    layers: int = 4
    """`small`: transformer layers."""
    first_layers: int = 0
    """A language model: keep so many of its layers, the first; 0 keeps all."""
    image_size: int = 320
    """Side of the padded square that the vision tower sees, in pixels; one visual token for each 32 x 32 (Qwen2.5-VL:
    28 x 28, FastVLM: 64 x 64; SmolVLM: 64 for each tile of 512 x 512, and 64 for the whole once more)."""
    dynamic: bool = False
    """Qwen2.5-VL: only what the image fills of the square is seen, its sides rounded to multiples of 28, so that a 2:1
    image costs half of the visual tokens."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of a checkpoint's weights; LoRA, the row of `<seg>` and all else are float32 all the same. Leave float32 where
    the language model itself is trained."""
    lora_rank: int = 0
    """Rank of LoRA on the attention projections (of a language model on all linear layers), beside which a checkpoint's
    row of `<seg>` is trained; 0 trains the language model itself."""
    grid: int = 100
    """Box coordinates are written as whole numbers 0..grid of the image's width and height."""
    scene_dim: int = 128
    """`small`, or a language model: channels of the segmenter's embedding, which it sees too, pooled to its grid."""
    notice: bool = False
    """Read the prompt twice: once for what each visual token shows of what is asked for, which the loss of relevance
    teaches; then, and behind it the answer, with that marked on the visual tokens. A language model of text alone looks
    the first time through `lab.model.look`, which also tells the adapter what it found. Ours, not the paper's."""
    max_boxes: int = 5
    """Boxes of at most this many lesions, the largest, are written in a training answer."""


class Reasoner(nn.Module):
    """A vision language model behind the few calls that training, rollouts and inference share; this is the `small`
    one, and `lab.model.build.reasoner_for` says which class is behind a checkpoint."""

    image_token = IMAGE
    lora_targets = ("q_proj", "k_proj", "v_proj", "o_proj")
    cuts_layers = False
    """Whether `ReasonerConfig.first_layers` is for it."""
    has_gist = False
    """Whether its first look tells the adapter by itself what it found, see `TextReasoner.gist_of`."""
    any_shape = False
    """Whether the tower sees images that are not square."""

    def __init__(self, config: ReasonerConfig, pretrained: bool = True) -> None:
        """
        Args:
            config: What to build.
            pretrained: Load a checkpoint's weights; False is for those who load others after that.
        """
        super().__init__()
        self.config = config
        self.small = config.model == "small"
        if config.dynamic and not self.any_shape:
            raise LabError(f"reasoner.dynamic is for Qwen2.5-VL, not for '{config.model}'; set it to false")
        if config.first_layers and not self.cuts_layers:
            raise LabError(f"reasoner.first_layers is for a language model, not for '{config.model}'; set it to 0")
        self.build(pretrained)
        if config.image_size % self.pixels_per_token:
            raise LabError(
                f"reasoner.image_size {config.image_size} is not a multiple of {self.pixels_per_token}, the pixels "
                f"that '{config.model}' sees at a time; change it"
            )
        hidden_size = self.language_model.config.hidden_size
        self.grid_tokens = (config.image_size // self.pixels_per_token) ** 2
        self.image_tokens = self.grid_tokens
        self.relevance = nn.Linear(hidden_size, 1)
        if self.shares_tower:
            std = INIT_STD if self.small else self.model.get_input_embeddings().weight.float().std().item()
            self.scene = nn.Linear(2 * config.scene_dim, hidden_size)
            self.visual_norm = nn.LayerNorm(hidden_size)
            nn.init.constant_(self.visual_norm.weight, std)
            self.image_positions = nn.Parameter(std * torch.randn(self.image_tokens, hidden_size))
        if config.notice:
            self.add_notice()
        self.seg_id, self.image_id = self.tokenizer.convert_tokens_to_ids([SEG, self.image_token])
        self.pad_id, self.eos_id = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        self.start: StartOfLora | None = None
        if config.lora_rank:
            self.add_lora(config.lora_rank)

    def build(self, pretrained: bool) -> None:
        """Make `model`, `tokenizer` and, of a checkpoint, `image_processor`."""
        if self.small:
            sizes = self.config.hidden_size, self.config.layers, self.config.image_size
            self.tokenizer = small_tokenizer()
            self.model = FastVlmForConditionalGeneration(small_config(*sizes, self.tokenizer))
        else:
            dtype = getattr(torch, self.config.dtype)
            self.model, self.tokenizer, self.image_processor = read_reasoner(self.config.model, dtype, pretrained)

    @property
    def shares_tower(self) -> bool:
        """Whether it has no vision tower of its own, but sees through the small segmenter's backbone and embedding."""
        return self.small

    @property
    def language_model(self) -> nn.Module:
        return self.model.model.language_model

    @property
    def tower(self) -> nn.Module:
        """The vision tower, which stays frozen."""
        return self.model.model.vision_tower

    @property
    def hidden_size(self) -> int:
        return self.language_model.config.hidden_size

    @property
    def pixels_per_token(self) -> int:
        """Side of what one visual token shows."""
        return 32

    def part(self, frame: Frame, side: int) -> tuple[int, int]:
        """Height and width of what the visual tokens show of a padded square of so many cells a side: all of it, or
        what the image fills."""
        return frame.filled(side) if self.config.dynamic else (side, side)

    def shape(self, frame: Frame) -> tuple[int, int]:
        """Rows and columns of the visual tokens, which come in reading order (SmolVLM: of the whole, the last)."""
        return self.part(frame, math.isqrt(self.grid_tokens))

    def tokens_of(self, frame: Frame) -> int:
        """How many visual tokens show an image."""
        return self.image_tokens - self.grid_tokens + math.prod(self.shape(frame))

    def visual_text(self, tokens: int) -> str:
        """What stands in the prompt in place of the image token."""
        return self.image_token * tokens

    def add_notice(self) -> None:
        """Let it notice, see `ReasonerConfig.notice`; until that is trained, all that it says stays as it was."""
        self.config.notice = True
        self.mark = nn.Parameter(torch.zeros(self.hidden_size, device=self.relevance.weight.device))

    def add_lora(self, rank: int) -> None:
        """Freeze the language model and train LoRA of this rank on `lora_targets` instead.

        Of a checkpoint all is frozen, and the row of `<seg>` is trained beside LoRA. LoRA that there is already becomes
        part of the weights.
        """
        self.merge_lora()
        self.config.lora_rank = rank
        for part in (self.language_model, self.model.lm_head) if self.shares_tower else (self.model,):
            part.requires_grad_(False)
        add_lora(self.language_model, rank, self.lora_targets)
        if not self.small:
            train_row(self.model, self.seg_id)

    def train_lora(self, rank: int) -> None:
        """Train LoRA of this rank alone; `reference` is the model as it is now.

        LoRA that there is becomes part of weights in float32; others would round most of it away: beside those it is
        trained further.

        Raises:
            LabError: When it is, and has another rank.
        """
        self.requires_grad_(False)
        if not any(map(rounds_lora, lora_layers(self.language_model))):
            self.add_lora(rank)
        elif rank != self.config.lora_rank:
            raise LabError(
                f"beside weights in {self.config.dtype} the LoRA of the start, of rank {self.config.lora_rank}, is "
                f"trained further; set lora_rank to {self.config.lora_rank}, not {rank}"
            )
        else:
            self.start = StartOfLora(self.model)

    def merge_lora(self) -> None:
        """Add LoRA, and the trained row of `<seg>`, to the weights that they stand for, and remove them."""
        settle_row(self.model)
        settle_lora(self.language_model)
        self.config.lora_rank = 0

    def reference(self) -> AbstractContextManager[None]:
        """Within, the model is the one that LoRA was added to, or whose LoRA is trained further."""
        return without_lora(self) if self.start is None else self.start.put_back(self.model)

    def checkpoint_gradients(self) -> None:
        """Compute the language model's activations again in the backward pass instead of keeping them."""
        self.language_model.gradient_checkpointing_enable({"use_reentrant": False})

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Within, the language model is in eval mode: layers that checkpoint gradients use no cache in training."""
        language_model, was_training = self.language_model, self.language_model.training
        language_model.eval()
        try:
            yield
        finally:
            language_model.train(was_training)

    def prompt_ids(self, query: str, frame: Frame | None = None) -> list[int]:
        """Chat prompt: the query, then the visual tokens, which in this order can look for what is asked.

        Angle brackets are dropped, so that a query cannot hold special tokens.

        Args:
            query: What is asked.
            frame: Of the image; None is one that fills its square.
        """
        tokens = self.tokens_of(frame) if frame else self.image_tokens
        content = [{"type": "text", "text": query.replace("<", " ").replace(">", " ")}, {"type": "image"}]
        messages = [{"role": "user", "content": content}]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return self.tokenizer.encode(text.replace(self.image_token, self.visual_text(tokens)), add_special_tokens=False)

    def completion_ids(self, text: str) -> list[int]:
        """An answer's tokens, with the end-of-sequence token."""
        return [*self.tokenizer.encode(text, add_special_tokens=False), self.eos_id]

    def decode_text(self, ids: list[int]) -> str:
        """A completion's text up to the end of sequence, special tokens such as `<seg>` kept."""
        ids = ids[: ids.index(self.eos_id)] if self.eos_id in ids else ids
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def encode(self, pixels: Tensor, frames: list[Frame]) -> Tensor:
        """Padded squares (B, S, S, 3) uint8 RGB of images in these frames to features of the vision tower
        (B, image_tokens, channels), rows that have fewer (`tokens_of`) padded with zeros."""
        return self.tower(normalise(pixels)).last_hidden_state.flatten(2).transpose(1, 2)

    def resized(self, pixels: Tensor, height: int, width: int | None = None) -> Tensor:
        """Images (B, H, W, 3) uint8 to (B, 3, height, width) uint8; without a width, squares."""
        images, size = pixels.permute(0, 3, 1, 2), (height, width or height)
        if images.shape[-2:] == size:
            return images
        return F.interpolate(images.float(), size, mode="area").round().to(torch.uint8)

    def scaled(self, images: Tensor) -> Tensor:
        """uint8 images (..., 3, H, W) to what the checkpoint's image processor makes of them, in its dtype."""
        settings = self.image_processor
        mean, std = (
            torch.tensor(values, device=images.device)[:, None, None]
            for values in (settings.image_mean, settings.image_std)
        )
        return ((images.float() / 255 - mean) / std).to(self.model.dtype)

    def see(self, features: Tensor, embeddings: Tensor) -> Tensor:
        """Visual tokens (B, image_tokens, D).

        Args:
            features: (B, image_tokens, channels) of the vision tower.
            embeddings: (B, C, h, w) of the segmenter; the small model adds the mean and the maximum of each visual
                token's cells, because its tower knows less of lesions than an encoder trained to segment them.
        """
        visual = self.model.model.multi_modal_projector(features)
        side = math.isqrt(self.image_tokens)
        means, maxima = F.adaptive_avg_pool2d(embeddings, side), F.adaptive_max_pool2d(embeddings, side)
        scene = self.scene(torch.cat([means, maxima], dim=1).flatten(2).transpose(1, 2))
        return self.visual_norm(visual + scene) + self.image_positions

    def relevance_logits(self, hidden: Tensor, input_ids: Tensor) -> Tensor:
        """(B, grid_tokens) logits of whether a visual token shows some of what is asked for, from last hidden states
        (B, T, D) of sequences (B, T); rows with fewer visual tokens are padded."""
        is_visual = input_ids == self.image_id
        states = pad_sequence(hidden[is_visual].split(is_visual.sum(1).tolist()), batch_first=True)
        return self.relevance(states[:, -self.grid_tokens :].float())[..., 0]

    def found(self, prompts: list[list[int]], visual: Tensor, shapes: Tensor | None = None) -> Tensor:
        """`relevance_logits` of the visual tokens (B, image_tokens, D) of images that are asked these prompts."""
        input_ids, mask = pad(prompts, self.pad_id, device=visual.device)
        hidden = self(input_ids, mask, visual, torch.zeros_like(mask), shapes=shapes)
        return self.relevance_logits(hidden, input_ids)

    def marked(self, prompts: list[list[int]], visual: Tensor, shapes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Visual tokens (B, image_tokens, D) with what a first look `found` on them marked, and what it found.
        Words do not teach it where to look: marks pass no gradient on."""
        found = self.found(prompts, visual, shapes)
        before = self.image_tokens - self.grid_tokens
        share = F.pad(found.detach().sigmoid(), (before, visual.shape[1] - before - found.shape[1]))
        return visual + share[..., None] * self.mark, found

    def told(self, states: Tensor, gist: Tensor | None) -> Tensor:
        """What the adapter is told, here the states of `<seg>` (M, D), and not the gist, which there is none of."""
        return states.float()

    def embed(self, input_ids: Tensor, visual: Tensor) -> Tensor:
        """Token embeddings (B, T, D), the visual tokens of each row (B, image_tokens, D) put in their places."""
        embeds = self.model.get_input_embeddings()(input_ids)
        return embeds.masked_scatter((input_ids == self.image_id)[..., None], visual.to(embeds.dtype))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        visual: Tensor,
        is_completion: Tensor,
        hidden_from: Tensor | None = None,
        queries: Tensor | None = None,
        shapes: Tensor | None = None,
    ) -> Tensor:
        """Last hidden states of whole sequences.

        Args:
            input_ids: (B, T), padded on either side.
            attention_mask: (B, T), 1 for real tokens.
            visual: (B, image_tokens, D) from `see`.
            is_completion: (B, T), 1 for tokens of the completion.
            hidden_from: (B, T, T) bool, True where the token of the row must not attend to that of the column, beside
                those that it cannot see anyway.
            queries: (Q, D), embeddings in place of those Q padding tokens of each row that the mask counts as real.
            shapes: (B, 2), of the visual tokens of each row; None where they fill the square.

        Returns:
            (B, T, D).
        """
        seen = self.sight(input_ids, attention_mask, is_completion)
        if hidden_from is not None:
            itself = torch.eye(seen.shape[-1], dtype=torch.bool, device=seen.device)
            seen = seen & ~hidden_from[:, None] | itself
        embeds = self.embed(input_ids, visual)
        if queries is not None:
            is_query = (input_ids == self.pad_id) & (attention_mask == 1)
            embeds = embeds.masked_scatter(is_query[..., None], queries.to(embeds.dtype).repeat(len(embeds), 1))
        return self.language_model(
            inputs_embeds=embeds,
            attention_mask=seen,
            position_ids=self.positions(input_ids, attention_mask, shapes),
            use_cache=False,
        ).last_hidden_state

    def positions(self, input_ids: Tensor, attention_mask: Tensor, shapes: Tensor | None = None) -> Tensor:
        """(B, T) positions that count real tokens only, so that padding on the left changes nothing."""
        return (attention_mask.cumsum(-1) - 1).clamp(min=0)

    def sight(self, input_ids: Tensor, attention_mask: Tensor, is_completion: Tensor) -> Tensor:
        """Which token (row) attends to which (column), (B, 1, T, T) bool, from ids and two masks (B, T).

        In order, but the small model's whole prompt sees itself both ways (as PaliGemma's, Beyer et al. 2024): "the
        larger of the two" cannot be told by a visual token that sees only those before it. Of a language model only
        the visual tokens do: it has learnt to read words in order.
        """
        length = attention_mask.shape[1]
        before = torch.ones(length, length, dtype=torch.bool, device=attention_mask.device).tril()
        if self.small:
            before = before | (is_completion == 0)[:, None, :]
        elif self.shares_tower:
            visual = input_ids == self.image_id
            before = before | visual[:, :, None] & visual[:, None, :]
        itself = torch.eye(length, dtype=torch.bool, device=attention_mask.device)  # rows of padding see something
        return (before & (attention_mask == 1)[:, None, :] | itself)[:, None]

    def prompt(self, prompts: list[list[int]], visual: Tensor, shapes: Tensor | None = None) -> Prompt:
        """Prompts of `prompt_ids` with their images' visual tokens (B, image_tokens, D), ready for decoding; shapes as
        in `forward`."""
        input_ids, mask = pad(prompts, self.pad_id, left=True, device=visual.device)
        sight = self.sight(input_ids, mask, torch.zeros_like(mask))
        return Prompt(self.embed(input_ids, visual), mask, self.positions(input_ids, mask, shapes), sight)

    @property
    def forbidden(self) -> list[int]:
        """Tokens that no completion may hold."""
        return [self.image_id, self.pad_id]

    def decode(
        self,
        prompts: list[list[int]],
        visual: Tensor,
        group_size: int,
        max_new_tokens: int,
        sampling: Sampling,
        shapes: Tensor | None = None,
    ) -> Iterator[Step]:
        """`lab.model.decoding.decode` with this model; shapes as in `forward`."""
        lm_head, prompt = self.model.lm_head, self.prompt(prompts, visual, shapes)
        with merged_lora(self), self.writing():
            yield from decode(
                self.language_model, lm_head, prompt, group_size, max_new_tokens, sampling, self.eos_id, self.forbidden
            )

    def write_architecture(self, folder: Path) -> None:
        """Write all of a checkpoint but its weights: what `Reasoner(config, pretrained=False)` reads."""
        write_reasoner(folder, self.model.config, self.tokenizer, self.image_processor)

    def generate(
        self,
        prompts: list[list[int]],
        visual: Tensor,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        shapes: Tensor | None = None,
    ) -> list[list[int]]:
        """One completion a prompt, each up to and including its end-of-sequence token; shapes as in `forward`."""
        groups = collect(self.decode(prompts, visual, 1, max_new_tokens, sampling, shapes), len(prompts), 1)
        return [completion for (completion,) in groups]
