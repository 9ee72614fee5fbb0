"""The training pass: a group's completions behind one prompt in one sequence, for log-probs and `<seg>` states."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from lab.model.decoding import Prompt, token_log_probs
from lab.model.reasoner import Reasoner

LOGITS_AT_ONCE = 1024
"""Tokens whose logits over the whole vocabulary exist at a time, here and in the backward pass."""


class GroupPass(NamedTuple):
    """What one forward pass says of the G completions of an image."""

    log_probs: Tensor
    """(G, T) of the completions' tokens, padded on the right with zeros."""
    entropy: Tensor
    """(G, T) of the distributions that the tokens were drawn from, in nats; without gradient."""
    mask: Tensor
    """(G, T), 1 for tokens."""
    seg_states: Tensor
    """(M, D), the hidden states of the first `<seg>` of the completions that have one; or of queries, (M, Q, D)."""
    seg_rows: Tensor
    """(M,) which completions those are."""


def group_pass(
    reasoner: Reasoner,
    prompt: Prompt,
    completions: list[list[int]],
    temperature: float,
    queries: Tensor | None = None,
) -> GroupPass:
    """Run the prompt once and all completions behind it; logits are made of completion tokens only.

    Args:
        reasoner: The policy.
        prompt: Of one image, without padding (`Reasoner.prompt` of one row).
        completions: G rows of tokens, none of them empty.
        temperature: At which the completions were sampled.
        queries: (Q, D), read after each completion, whose states take the place of that of `<seg>`.
    """
    device, length = prompt.embeds.device, prompt.embeds.shape[1]
    tail = [reasoner.pad_id] * (0 if queries is None else len(queries))  # no completion holds padding
    tokens = torch.tensor([token for completion in completions for token in completion + tail], device=device)
    sizes = [len(completion) + len(tail) for completion in completions]
    owner = torch.arange(len(sizes), device=device).repeat_interleave(torch.tensor(sizes, device=device))
    place = torch.cat([torch.arange(size, device=device) for size in sizes])
    behind = (owner[:, None] == owner) & (place[:, None] >= place)
    sight = torch.cat(
        [
            torch.cat([prompt.sight[0, 0], torch.zeros(length, len(tokens), dtype=torch.bool, device=device)], dim=1),
            torch.cat([torch.ones(len(tokens), length, dtype=torch.bool, device=device), behind], dim=1),
        ]
    )
    model = reasoner.language_model
    embeds, is_query = model.get_input_embeddings()(tokens), torch.zeros_like(tokens, dtype=torch.bool)
    if queries is not None:
        is_query = tokens == reasoner.pad_id
        embeds = embeds.masked_scatter(is_query[:, None], queries.to(embeds.dtype).repeat(len(completions), 1))
    hidden = model(
        inputs_embeds=torch.cat([prompt.embeds, embeds[None]], dim=1),
        attention_mask=sight[None, None],
        position_ids=torch.cat([prompt.positions, prompt.positions[..., -1:] + 1 + place], dim=-1),
        use_cache=False,
    ).last_hidden_state[0]
    of_tokens = hidden[length:]  # (S, D), all completions one after the other
    before = torch.where(place[:, None] > 0, of_tokens.roll(1, 0), hidden[length - 1])[~is_query]
    said, lengths = tokens[~is_query], [len(completion) for completion in completions]
    parts = [
        checkpoint(token_stats, reasoner, states, next_tokens, temperature, use_reentrant=False)
        for states, next_tokens in zip(before.split(LOGITS_AT_ONCE), said.split(LOGITS_AT_ONCE))
    ]
    log_probs, entropy = (torch.cat(values) for values in zip(*parts))
    is_seg = tokens == reasoner.seg_id
    rows = owner[is_seg].unique()
    first = torch.stack([(is_seg & (owner == row)).int().argmax() for row in rows]) if len(rows) else rows
    of_queries = of_tokens[is_query].unflatten(0, (len(completions), -1)) if tail else None
    return GroupPass(
        *(pad_sequence(list(values.split(lengths)), batch_first=True) for values in (log_probs, entropy)),
        mask=pad_sequence([torch.ones(size, device=device) for size in lengths], batch_first=True),
        seg_states=(of_tokens[first] if of_queries is None else of_queries[rows]).float(),
        seg_rows=rows,
    )


def token_stats(reasoner: Reasoner, states: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities (S,) of the tokens that follow states (S, D), and the entropy (S,) of what they came from."""
    every = token_log_probs(reasoner.model.lm_head(states).float(), temperature, reasoner.forbidden)
    with torch.no_grad():
        entropy = torch.special.entr(every.exp()).sum(1)
    return every.gather(1, tokens[:, None])[:, 0], entropy
