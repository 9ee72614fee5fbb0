"""Our own decode loop: a group of completions an image, over one encoded prompt that the group shares.

In Hugging Face's `generate` a row is a completion. Here it is an image: the completions of its group stand side
by side in one sequence behind the prompt, and the attention mask lets each see the prompt and itself alone, so that the
prompt's keys exist once. Finished completions leave the sequence, finished images the batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer


@dataclass
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """Keep the likeliest tokens that together reach this probability; 1 keeps all."""
    top_k: int = 0
    """Keep this many of the likeliest tokens; 0 keeps all."""
    seed: int = 0
    rows: list[tuple[int, ...]] | None = None
    """Numbers that tell the images of a batch apart, one tuple each; None counts them. An image's completions depend on
    the seed and its own numbers, not on the images beside it: several processes write what one would."""


class Prompt(NamedTuple):
    """The prompts of B images, embedded, padded on the left."""

    embeds: Tensor
    """(B, P, D)."""
    mask: Tensor
    """(B, P), 1 for real tokens."""
    positions: Tensor
    """(B, P), or (3, B, P) for M-RoPE."""
    sight: Tensor
    """(B, 1, P, P) bool, which token (row) attends to which (column)."""


class Step(NamedTuple):
    """One more token of every unfinished completion: all fields (B', A), padded where `live` is False."""

    images: Tensor
    """Which of the B images."""
    slots: Tensor
    """Which completion of its group, 0..G-1."""
    tokens: Tensor
    log_probs: Tensor
    """Of the tokens, at the sampling temperature (1 when greedy), before top-k and top-p."""
    live: Tensor


class RoomyLayer(DynamicLayer):
    """A cache layer with room for `ROOM` more tokens, where `DynamicLayer` copies all keys for every new one."""

    ROOM = 256

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self.room = torch.empty(2, *key_states.shape, dtype=self.dtype, device=self.device)[..., :0, :]
            self.length = 0
        end = self.length + key_states.shape[-2]
        if end > self.room.shape[-2]:
            larger = self.room.new_empty(*self.room.shape[:-2], end + self.ROOM, self.room.shape[-1])
            larger[..., : self.length, :] = self.room[..., : self.length, :]
            self.room = larger
        self.room[0, ..., self.length : end, :] = key_states
        self.room[1, ..., self.length : end, :] = value_states
        self.length = end
        self.keys, self.values = self.room[..., :end, :]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        self.room = self.room[:, indices]


@torch.no_grad()
def decode(
    language_model: nn.Module,
    lm_head: nn.Module,
    prompt: Prompt,
    group_size: int,
    max_new_tokens: int,
    sampling: Sampling,
    eos_id: int,
    forbidden: list[int],
) -> Iterator[Step]:
    """Write `group_size` completions for each prompt, a token at a time.

    Args:
        language_model: Takes `inputs_embeds`, a 4-d `attention_mask`, `position_ids` and a cache.
        lm_head: Hidden states to logits.
        prompt: Of B images.
        group_size: Completions of each.
        max_new_tokens: Where unfinished ones are cut.
        sampling: How tokens are chosen.
        eos_id: Ends a completion.
        forbidden: Tokens that are never written.

    Yields:
        One `Step` a token, until all are finished.
    """
    device = prompt.embeds.device
    chances = uniforms(sampling, len(prompt.embeds), group_size, max_new_tokens).to(device)
    cache = Cache(layer_class_to_replicate=RoomyLayer)
    state = language_model(
        inputs_embeds=prompt.embeds,
        attention_mask=prompt.sight,
        position_ids=prompt.positions,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state[:, -1:]
    logits = lm_head(state).expand(-1, group_size, -1)
    slots = torch.arange(group_size, device=device).expand(len(logits), -1)
    images = torch.arange(len(logits), device=device)[:, None].expand_as(slots)
    live = torch.ones_like(slots, dtype=torch.bool)
    of_prompt, positions = prompt.mask.bool(), prompt.positions[..., -1:]
    owners = slots[:, :0]  # (B', K) the completion that each key behind the prompt belongs to
    for number in range(1, max_new_tokens + 1):
        tokens, log_probs = choose(logits.float(), sampling, forbidden, chances[images, slots, number - 1])
        yield Step(images, slots, tokens, log_probs, live)
        live = live & (tokens != eos_id)
        if number == max_new_tokens or not live.any():
            return
        rows = live.any(1).nonzero()[:, 0]
        if len(rows) < len(live):
            cache.batch_select_indices(rows)
            images, slots, tokens, live = images[rows], slots[rows], tokens[rows], live[rows]
            of_prompt, owners, positions = of_prompt[rows], owners[rows], positions[..., rows, :]
        first = live.int().argsort(dim=1, descending=True, stable=True)[:, : int(live.sum(1).max())]
        images, slots, tokens, live = (field.gather(1, first) for field in (images, slots, tokens, live))
        owners = torch.cat([owners, slots.masked_fill(~live, -1)], dim=1)
        seen = torch.cat(
            [of_prompt[:, None].expand(-1, slots.shape[1], -1), owners[:, None] == slots[..., None]], dim=2
        )
        positions = positions + 1
        state = language_model(
            inputs_embeds=language_model.get_input_embeddings()(tokens),
            attention_mask=seen[:, None],
            position_ids=positions.expand(*positions.shape[:-1], slots.shape[1]),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        logits = lm_head(state)


def collect(steps: Iterator[Step], images: int, group_size: int) -> list[list[list[int]]]:
    """The tokens of all of `decode`, `[image][slot]`, end-of-sequence included."""
    tokens: list[list[list[int]]] = [[[] for _ in range(group_size)] for _ in range(images)]
    for step in steps:
        written = (field[step.live].tolist() for field in (step.images, step.slots, step.tokens))
        for image, slot, token in zip(*written):
            tokens[image][slot].append(token)
    return tokens


def uniforms(sampling: Sampling, images: int, group_size: int, length: int) -> Tensor:
    """(B, G, length) float64 in [0, 1), what `choose` decides by."""
    rows = sampling.rows or [(image,) for image in range(images)]
    drawn = [np.random.default_rng((sampling.seed, *row)).random((group_size, length)) for row in rows]
    return torch.from_numpy(np.stack(drawn))


def choose(logits: Tensor, sampling: Sampling, forbidden: list[int], chances: Tensor) -> tuple[Tensor, Tensor]:
    """Next tokens and their log-probabilities, both (B, A), from logits (B, A, vocabulary) and chances (B, A)."""
    log_probs = token_log_probs(logits, sampling.temperature, forbidden)
    if sampling.temperature == 0:
        tokens = log_probs.argmax(-1)
    else:
        ladder = truncate(log_probs, sampling).exp().double().cumsum(-1)
        tokens = torch.searchsorted(ladder, chances[..., None] * ladder[..., -1:], right=True)[..., 0]
    return tokens, log_probs.gather(-1, tokens[..., None])[..., 0]


def token_log_probs(logits: Tensor, temperature: float, forbidden: list[int]) -> Tensor:
    """Log-probabilities over the vocabulary (..., V) at a temperature (0 stands for 1), forbidden tokens left out."""
    logits = logits / (temperature or 1.0)
    return logits.index_fill(-1, torch.tensor(forbidden, device=logits.device), -torch.inf).log_softmax(-1)


def truncate(log_probs: Tensor, sampling: Sampling) -> Tensor:
    """Log-probabilities (..., V) with those outside top-k and top-p at minus infinity; the likeliest always stays."""
    if sampling.top_k:
        least = log_probs.topk(min(sampling.top_k, log_probs.shape[-1]), dim=-1).values[..., -1:]
        log_probs = log_probs.masked_fill(log_probs < least, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = log_probs.log_softmax(-1).sort(-1, descending=True)
        before = ordered.exp().cumsum(-1) - ordered.exp()
        cut = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= sampling.top_p)
        log_probs = log_probs.masked_fill(cut, -torch.inf)
    return log_probs


def pad(
    rows: list[list[int]], value: int, left: bool = False, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Token rows to ids (B, T) and attention mask (B, T)."""
    length = max(map(len, rows))
    fill = [[value] * (length - len(row)) for row in rows]
    ids = [f + row if left else row + f for f, row in zip(fill, rows)]
    mask = [[0] * len(f) + [1] * len(row) if left else [1] * len(row) + [0] * len(f) for f, row in zip(fill, rows)]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
