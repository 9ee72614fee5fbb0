"""The row of a new token, trained while the embedding and the head that it belongs to stay frozen."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RowOfEmbedding(nn.Module):
    """A frozen embedding but for the row of one token."""

    def __init__(self, base: nn.Embedding, token: int, row: nn.Parameter) -> None:
        super().__init__()
        self.base, self.token, self.row, self.active = base, token, row, True

    def forward(self, ids: Tensor) -> Tensor:
        """(..., ) ids to (..., D)."""
        embeds = self.base(ids)
        if not self.active:
            return embeds
        return torch.where((ids == self.token)[..., None], self.row.to(embeds.dtype), embeds)


class RowOfHead(nn.Module):
    """A frozen language head but for the row of one token."""

    def __init__(self, base: nn.Linear, token: int, row: nn.Parameter) -> None:
        super().__init__()
        self.base, self.token, self.row, self.active = base, token, row, True

    def forward(self, states: Tensor) -> Tensor:
        """(..., D) states to (..., vocabulary) logits."""
        logits = self.base(states)
        if self.active:
            logits[..., self.token] = F.linear(states, self.row.to(states.dtype)[None])[..., 0]
        return logits


def train_row(model: nn.Module, token: int) -> None:
    """Put trained rows in place of a token's own, in the embedding and the head of a Hugging Face model; where the two
    are tied, it is one row."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    row = nn.Parameter(embedding.weight[token].detach().float().clone())
    tied = head.weight is embedding.weight
    model.set_input_embeddings(RowOfEmbedding(embedding, token, row))
    model.lm_head = RowOfHead(head, token, row if tied else nn.Parameter(head.weight[token].detach().float().clone()))


@torch.no_grad()
def settle_row(model: nn.Module) -> None:
    """Make the trained rows, where there are any, part of the weights."""
    embedding, head = model.get_input_embeddings(), model.lm_head
    if isinstance(head, RowOfHead):
        for layer in (embedding, head):
            layer.base.weight[layer.token] = layer.row.to(layer.base.weight.dtype)
        model.set_input_embeddings(embedding.base)
        model.lm_head = head.base
