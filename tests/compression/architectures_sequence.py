"""Small nets that read sequences: encoders, language models, recurrent nets."""

import math

import torch
from fleetpress_test_architectures import (  # by this name conftest.py loads architectures.py
    Architecture,
    features,
    tokens,
)
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812, everyone's name for it


class Attention(nn.Module):
    """Attention with its products written out."""

    def __init__(self, wide: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(wide, wide) for _ in range(3))
        self.out = nn.Linear(wide, wide)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, wide = x.shape
        q, k, v = (
            layer(x).view(batch, length, self.heads, wide // self.heads).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        scores = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(wide // self.heads), -1)
        return self.out((scores @ v).transpose(1, 2).contiguous().view(batch, length, wide))


class EncoderLayer(nn.Module):
    def __init__(self, wide: int) -> None:
        super().__init__()
        self.attention, self.norm1, self.norm2 = Attention(wide, 4), nn.LayerNorm(wide), nn.LayerNorm(wide)
        self.intermediate, self.output = nn.Linear(wide, 32), nn.Linear(32, wide)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.output(F.gelu(self.intermediate(x))))


class Bert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(30, 16), nn.Embedding(12, 16)
        self.norm = nn.LayerNorm(16)
        self.layers = nn.Sequential(EncoderLayer(16), EncoderLayer(16))
        self.pooler, self.classifier = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.words(ids) + self.places(torch.arange(ids.shape[1])))
        return self.classifier(torch.tanh(self.pooler(self.layers(x)[:, 0])))


class TorchEncoder(nn.Module):
    """torch's own encoder, in which the three projections are one."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


class GPTBlock(nn.Module):
    def __init__(self, wide: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(wide), nn.LayerNorm(wide)
        self.qkv, self.proj = nn.Linear(wide, 3 * wide), nn.Linear(wide, wide)
        self.up, self.down = nn.Linear(wide, 4 * wide), nn.Linear(4 * wide, wide)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, wide = x.shape
        q, k, v = (
            part.view(batch, length, 4, wide // 4).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).split(wide, 2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(batch, length, wide))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(30, 16), nn.Parameter(torch.randn(1, 6, 16))
        self.blocks, self.norm = nn.Sequential(GPTBlock(16), GPTBlock(16)), nn.LayerNorm(16)
        self.head = nn.Linear(16, 30, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.tokens(ids) + self.places)))


class LlamaBlock(nn.Module):
    """Grouped-query attention with rotary positions, and a gated feed-forward."""

    def __init__(self, wide: int = 16, heads: int = 4, shared: int = 2) -> None:
        super().__init__()
        self.heads, self.shared, self.size = heads, shared, wide // heads
        self.norm1, self.norm2 = nn.Parameter(torch.rand(wide) + 0.5), nn.Parameter(torch.rand(wide) + 0.5)
        self.q, self.o = nn.Linear(wide, wide, bias=False), nn.Linear(wide, wide, bias=False)
        self.k, self.v = (nn.Linear(wide, shared * self.size, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(wide, 24, bias=False) for _ in range(2))
        self.down = nn.Linear(24, wide, bias=False)
        self.register_buffer("angles", torch.rand(6, self.size))

    def rms(self, x: Tensor, weight: Tensor) -> Tensor:
        return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    def rotate(self, x: Tensor) -> Tensor:
        one, other = x[..., : self.size // 2], x[..., self.size // 2 :]
        return x * self.angles.cos() + torch.cat((-other, one), -1) * self.angles.sin()

    def forward(self, x: Tensor) -> Tensor:
        batch, length, wide = x.shape
        y = self.rms(x, self.norm1)
        q = self.rotate(self.q(y).view(batch, length, -1, self.size).transpose(1, 2))
        k = self.rotate(self.k(y).view(batch, length, -1, self.size).transpose(1, 2))
        v = self.v(y).view(batch, length, -1, self.size).transpose(1, 2)
        times = self.heads // self.shared
        k, v = (
            t[:, :, None]
            .expand(batch, self.shared, times, length, self.size)
            .reshape(batch, -1, length, self.size)
            for t in (k, v)
        )
        y = (
            F.scaled_dot_product_attention(q, k, v, is_causal=True)
            .transpose(1, 2)
            .reshape(batch, length, wide)
        )
        x = x + self.o(y)
        y = self.rms(x, self.norm2)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def llama() -> nn.Module:
    return nn.Sequential(
        nn.Embedding(30, 16), LlamaBlock(), LlamaBlock(), nn.LayerNorm(16), nn.Linear(16, 30)
    )


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.before, self.rnn = nn.Linear(6, 12), kind(12, 10, 2, batch_first=True, bidirectional=True)
        self.after, self.head = nn.Linear(20, 14), nn.Linear(14, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(F.relu(self.before(x)))
        return self.head(F.relu(self.after(y[:, -1])))


ARCHITECTURES = {
    "bert": Architecture(build=Bert, inputs=tokens(30, 6), reached=9),
    "torch_encoder": Architecture(build=TorchEncoder, inputs=features(6, 16), reached=4),
    "gpt": Architecture(build=GPT, inputs=tokens(30, 6), reached=4),
    "llama": Architecture(build=llama, inputs=tokens(30, 6), reached=10),
    "lstm": Architecture(build=lambda: Recurrent(nn.LSTM), inputs=features(3, 6), reached=2),
    "gru": Architecture(build=lambda: Recurrent(nn.GRU), inputs=features(3, 6), reached=2),
}
