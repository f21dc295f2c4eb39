"""Structured pruning of ResNet-50 and ViT-B/16 against torch-pruning: CPU time to the smaller model, and what is left.

    python benchmarks/pruning_peer.py [--pairs 5]

Both sides delete by magnitude, in turn, on one thread, in one process: of the ResNet half of all channels but the
classifier's, of the ViT half of the heads and of the feed-forward units, or of the residual stream, too. Ours is
analysis, selection and surgery of an exported program; theirs is dependency graph, pruner and step on a module.
"""

import argparse
import copy
import statistics
import time

import torch
import torch_pruning
from torch import Tensor, nn

from fleetpress.compression import cost
from fleetpress.compression.pruning import PruneOptions, delete, prune


class Bottleneck(nn.Module):
    def __init__(self, wide_in: int, middle: int, stride: int) -> None:
        super().__init__()
        wide_out = 4 * middle
        self.conv1, self.bn1 = nn.Conv2d(wide_in, middle, 1, bias=False), nn.BatchNorm2d(middle)
        self.conv2, self.bn2 = nn.Conv2d(middle, middle, 3, stride, 1, bias=False), nn.BatchNorm2d(middle)
        self.conv3, self.bn3 = nn.Conv2d(middle, wide_out, 1, bias=False), nn.BatchNorm2d(wide_out)
        self.down: nn.Module = nn.Identity()
        if stride != 1 or wide_in != wide_out:
            self.down = nn.Sequential(
                nn.Conv2d(wide_in, wide_out, 1, stride, bias=False), nn.BatchNorm2d(wide_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(torch.relu(self.bn2(self.conv2(y)))))
        return torch.relu(y + self.down(x))


def resnet50() -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    layers.append(nn.MaxPool2d(3, 2, 1))
    wide = 64
    for count, middle, stride in ((3, 64, 1), (4, 128, 2), (6, 256, 2), (3, 512, 2)):
        for i in range(count):
            layers.append(Bottleneck(wide, middle, stride if i == 0 else 1))
            wide = 4 * middle
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(wide, 1000)).eval()


class Attention(nn.Module):
    def __init__(self, wide: int, heads: int) -> None:
        super().__init__()
        self.heads, self.size = heads, wide // heads
        self.qkv, self.proj = nn.Linear(wide, 3 * wide), nn.Linear(wide, wide)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        # The number of heads stands in the code, so torch-pruning's user sets it anew: -1 does it here.
        parts = self.qkv(x).reshape(batch, length, 3, -1, self.size).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(*parts.unbind(0))
        return self.proj(y.transpose(1, 2).reshape(batch, length, -1))


class Layer(nn.Module):
    def __init__(self, wide: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = (
            nn.LayerNorm(wide),
            Attention(wide, heads),
            nn.LayerNorm(wide),
        )
        self.up, self.down = nn.Linear(wide, 4 * wide), nn.Linear(4 * wide, wide)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Vit(nn.Module):
    def __init__(self, wide: int = 768, heads: int = 12, depth: int = 12) -> None:
        super().__init__()
        self.patches, self.first = nn.Conv2d(3, wide, 16, 16), nn.Parameter(torch.randn(1, 1, wide) * 0.02)
        self.places = nn.Parameter(torch.randn(1, 197, wide) * 0.02)
        self.layers = nn.Sequential(*(Layer(wide, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(wide), nn.Linear(wide, 1000)

    def forward(self, x: Tensor) -> Tensor:
        y = self.patches(x).flatten(2).transpose(1, 2)
        y = torch.cat([self.first.expand(y.shape[0], -1, -1), y], 1) + self.places
        return self.head(self.norm(self.layers(y))[:, 0])


def theirs_of(model: nn.Module, sample: Tensor, kept: list[str]) -> nn.Module:
    """Half of the channels, and of the heads where there are any; `kept` layers keep their outputs."""
    attentions = [part for part in model.modules() if isinstance(part, Attention)]
    torch_pruning.pruner.MagnitudePruner(
        model,
        sample,
        importance=torch_pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=[model.get_submodule(name) for name in kept],
        num_heads={part.qkv: part.heads for part in attentions},
        prune_num_heads=bool(attentions),
        prune_head_dims=False,
        head_pruning_ratio=0.5,
    ).step()
    return model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=5)
    pairs = parser.parse_args().pairs
    torch.set_num_threads(1)
    resnet, vit = resnet50(), Vit().eval()
    stream = [
        name for name, part in vit.named_modules() if name.endswith(("proj", "down", "patches", "head"))
    ]
    compare("ResNet-50, channels", resnet, ["22"], (), pairs=pairs)
    compare("ViT-B/16, heads and channels", vit, stream, ("head", "channel"), pairs=pairs)
    compare("ViT-B/16, and the stream", vit, ["head"], ("head", "channel", "normalized"), pairs=pairs)


def compare(title: str, model: nn.Module, kept: list[str], structure: tuple[str, ...], *, pairs: int) -> None:
    """Prints medians of both sides, what is left, and the median of the ratios of pairs."""
    sample = torch.randn(1, 3, 224, 224)
    program = torch.export.export(model, (sample,))
    options = PruneOptions(method="magnitude", sparsity=0.5, structure=structure)
    ours, theirs = [], []
    for _ in range(pairs + 1):  # the first pair warms both up
        start = time.process_time()
        smaller = delete(program, prune(program, options).removed, structure)
        ours.append(time.process_time() - start)
        model_there = copy.deepcopy(model)
        start = time.process_time()
        theirs_of(model_there, sample, kept)
        theirs.append(time.process_time() - start)
    ratios = [one / other for one, other in zip(ours[1:], theirs[1:], strict=True)]
    left = sum(value.numel() for value in model_there.parameters())
    print(title)
    print(f"  fleetpress    {statistics.median(ours[1:]):.3f} s  parameters {cost.parameters(smaller):,}")
    print(f"  torch-pruning {statistics.median(theirs[1:]):.3f} s  parameters {left:,}")
    print(f"  ratio {statistics.median(ratios):.2f} (n={pairs}, {min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
