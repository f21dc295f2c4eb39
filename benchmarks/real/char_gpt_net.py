"""A language model of characters. Needs torch alone: peers build it, too."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class _Block(nn.Module):
    """Causal attention and a perceptron of four times the width, both behind a normalization."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.size = width // heads  # of a head; how many there are is not said, so that some can be deleted
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[samples, tokens, width] in and out."""
        count, length, _ = x.shape
        parts = self.qkv(self.norm1(x)).view(count, length, 3, -1, self.size)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(count, length, -1))
        result: Tensor = x + self.down(functional.gelu(self.up(self.norm2(x))))
        return result


class CharGpt(nn.Module):
    """A language model of characters; two blocks of width 64 unless told otherwise."""

    def __init__(self, symbols: int, length: int, width: int = 64, blocks: int = 2) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(symbols, width), nn.Parameter(torch.zeros(length, width))
        self.blocks = nn.ModuleList(_Block(width, 4) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, symbols)
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores [samples, tokens, symbols] of the next characters."""
        x = self.tokens(tokens) + self.places
        for block in self.blocks:
            x = block(x)
        scores: Tensor = self.head(self.norm(x))
        return scores
