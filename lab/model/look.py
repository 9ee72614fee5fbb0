"""The first look of a language model that has never seen: where in the picture is what the words ask for?"""

import torch
from torch import Tensor, nn

from lab.model.small import INIT_STD


class Look(nn.Module):
    """A small transformer over the words of a query, as the language model understands them, and the visual tokens.

    By its own attention a pretrained language model brings its words to the picture after many hundreds of steps, if at
    all; this takes some two hundred (docs/results.md). It teaches the words nothing: they mean what they meant.
    """

    def __init__(self, hidden_size: int, width: int = 256, layers: int = 4) -> None:
        """
        Args:
            hidden_size: D, channels of words and visual tokens.
            width: Channels within; a head for each 64.
            layers: Of the transformer.
        """
        super().__init__()
        self.words = nn.Sequential(nn.LayerNorm(hidden_size), nn.Linear(hidden_size, width))
        self.picture = nn.Sequential(nn.LayerNorm(hidden_size), nn.Linear(hidden_size, width))
        layer = nn.TransformerEncoderLayer(
            width, width // 64, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.relevance = nn.Linear(width, 1)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=INIT_STD)

    def forward(self, words: Tensor, mask: Tensor, visual: Tensor) -> Tensor:
        """Logits (B, V) of whether each visual token shows some of what is asked for.

        Args:
            words: (B, W, D) states of the language model.
            mask: (B, W), 1 for real words.
            visual: (B, V, D).
        """
        both = torch.cat([self.words(words), self.picture(visual)], dim=1)
        is_padding = torch.cat([mask == 0, mask.new_zeros(visual.shape[:2], dtype=torch.bool)], dim=1)
        states = self.layers(both, src_key_padding_mask=is_padding)
        return self.relevance(states[:, words.shape[1] :])[..., 0].float()
