"""The Semantic-Guided Prompt Adapter: `<seg>` hidden state to prompt tokens of the mask decoder."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn


@dataclass
class AdapterConfig:
    """Sizes of the adapter; the paper states none of them. Kinds other than `paper` are baselines and ablations."""

    kind: Literal["paper", "linear", "mlp", "queries"] = "paper"
    """`paper`: ResMLP and AttnPool; `linear`: one linear map; `mlp`: two layers and one token, as LISA has; `queries`:
    learnable queries that the language model reads after the completion, and a connector, as LENS has."""
    state: Literal["seg", "mean"] = "seg"
    """What is adapted: the hidden state of `<seg>`, or the mean over the completion (`queries`: neither)."""
    prompt_tokens: int = 4
    """Prompt tokens handed to the mask decoder (a box is 2)."""
    slots: int = 8
    """Parts that the state is split into, for the attention pool to choose from."""
    depth: int = 2
    """Residual blocks of the ResMLP."""
    heads: int = 4
    """Attention heads of the pool, or of the connector."""
    queries: int = 16
    """`queries`: how many."""


class ResidualMlp(nn.Module):
    """x + MLP(norm(x)), the block of the ResMLP."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def adapter_for(config: AdapterConfig, hidden_size: int, prompt_dim: int) -> nn.Module:
    """Hidden states (M, hidden_size) to prompt tokens (M, N, prompt_dim), N as configured (`mlp`: 1).

    That of `queries` takes the states of its own queries, (M, queries, hidden_size).
    """
    if config.kind == "paper":
        return PromptAdapter(config, hidden_size, prompt_dim)
    if config.kind == "queries":
        return QueryAdapter(config, hidden_size, prompt_dim)
    if config.kind == "linear":
        linear = nn.Linear(hidden_size, config.prompt_tokens * prompt_dim)
        return nn.Sequential(linear, nn.Unflatten(-1, (config.prompt_tokens, prompt_dim)))
    mlp = nn.Linear(hidden_size, hidden_size), nn.ReLU(), nn.Linear(hidden_size, prompt_dim)
    return nn.Sequential(*mlp, nn.Unflatten(-1, (1, prompt_dim)))


class PromptAdapter(nn.Module):
    """ResMLP over the `<seg>` state, then AttnPool: learned queries cross-attend to its parts."""

    def __init__(self, config: AdapterConfig, hidden_size: int, prompt_dim: int) -> None:
        super().__init__()
        self.slots, self.prompt_dim = config.slots, prompt_dim
        self.res_mlp = nn.Sequential(
            *(ResidualMlp(hidden_size) for _ in range(config.depth)), nn.LayerNorm(hidden_size)
        )
        self.to_slots = nn.Linear(hidden_size, config.slots * prompt_dim)
        self.queries = nn.Embedding(config.prompt_tokens, prompt_dim)
        nn.init.normal_(self.queries.weight, std=0.02)  # the prompt starts as what the state says, not as a constant
        self.attention = nn.MultiheadAttention(prompt_dim, config.heads, batch_first=True)
        self.norm = nn.LayerNorm(prompt_dim)
        self.out = ResidualMlp(prompt_dim)

    def forward(self, seg_states: Tensor) -> Tensor:
        """Hidden states of `<seg>` (M, hidden_size) to semantic prompts (M, prompt_tokens, prompt_dim)."""
        slots = self.to_slots(self.res_mlp(seg_states)).unflatten(-1, (self.slots, self.prompt_dim))
        queries = self.queries.weight.expand(len(slots), -1, -1)
        pooled, _ = self.attention(queries, slots, slots, need_weights=False)
        return self.out(self.norm(queries + pooled))


class QueryAdapter(nn.Module):
    """Learnable queries for the language model, and the connector that makes prompt tokens of their states (LENS)."""

    def __init__(self, config: AdapterConfig, hidden_size: int, prompt_dim: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(hidden_size**-0.5 * torch.randn(config.queries, hidden_size))
        layer = nn.TransformerEncoderLayer(
            hidden_size, config.heads, 4 * hidden_size, dropout=0.0, batch_first=True, norm_first=True
        )
        self.connector = nn.TransformerEncoder(layer, config.depth, enable_nested_tensor=False)
        self.out = nn.Linear(hidden_size, prompt_dim)

    def forward(self, states: Tensor) -> Tensor:
        """States of the queries (M, queries, hidden_size) to prompts (M, queries, prompt_dim)."""
        return self.out(self.connector(states))
