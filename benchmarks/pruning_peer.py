"""Structured pruning of ResNet-50 against torch-pruning: time from model to smaller model, and the parameters left.

    python benchmarks/pruning_peer.py [--pairs 5]

Both sides delete half of all channels but the classifier's by magnitude, in turn, on one thread, in one process. Ours
is analysis, selection and surgery of an exported program; theirs is dependency graph, pruner and step on a module.
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=5)
    pairs = parser.parse_args().pairs
    torch.set_num_threads(1)
    model, sample = resnet50(), torch.randn(1, 3, 224, 224)
    program = torch.export.export(model, (sample,))
    ours, theirs = [], []
    for _ in range(pairs + 1):  # the first pair warms both up
        start = time.perf_counter()
        smaller = delete(program, prune(program, PruneOptions(method="magnitude", sparsity=0.5)).removed)
        ours.append(time.perf_counter() - start)
        theirs_model = copy.deepcopy(model)
        start = time.perf_counter()
        torch_pruning.pruner.MagnitudePruner(
            theirs_model,
            sample,
            importance=torch_pruning.importance.MagnitudeImportance(p=2),
            pruning_ratio=0.5,
            ignored_layers=[theirs_model[-1]],  # type: ignore[index]
        ).step()
        theirs.append(time.perf_counter() - start)
    ratios = [one / other for one, other in zip(ours[1:], theirs[1:], strict=True)]
    print(f"fleetpress    {statistics.median(ours[1:]):.3f} s  parameters {cost.parameters(smaller):,}")
    left = sum(value.numel() for value in theirs_model.parameters())
    print(f"torch-pruning {statistics.median(theirs[1:]):.3f} s  parameters {left:,}")
    print(f"ratio {statistics.median(ratios):.2f} (n={pairs}, {min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
