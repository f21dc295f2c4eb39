"""What collecting gradient statistics adds to the plain forward and backward passes.

    python benchmarks/collect_cost.py [--pairs 60]

CPU time of one thread, batch 64; medians of pairs run in turn. A ratio of 1.25 means 25 % more.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fleetpress.compression.modes import training_module
from fleetpress.compression.program import trainable
from fleetpress.compression.statistics import GradientCollector

BATCH, CLASSES, TOKENS, WIDTH = 64, 10, 32, 128


class Encoder(nn.Module):
    """A small transformer encoder over token embeddings, with a classifier on the mean token."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.classifier = nn.Linear(WIDTH, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        """Class scores of [samples, tokens, width]."""
        scores: Tensor = self.classifier(self.encoder(tokens).mean(1))
        return scores


def mlp() -> nn.Module:
    """784-512-512-10."""
    return nn.Sequential(
        nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, CLASSES)
    )


def cnn() -> nn.Module:
    """Two convolutions with batch norm and two linear layers on 28 x 28."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 49, 128),
        nn.ReLU(),
        nn.Linear(128, CLASSES),
    )


@dataclass(frozen=True)
class Cost:
    """Median milliseconds of a batch without and with statistics, and the median of the pairs' ratios."""

    plain_ms: float
    collect_ms: float
    ratio: float
    lowest: float
    highest: float


def measure(model: nn.Module, inputs: Tensor, pairs: int, *, products: bool) -> Cost:
    """Run plain and collecting batches in turn; `products` with the weights are what taylor and fisher need."""
    program = torch.export.export(model.eval(), (inputs,))
    module = training_module(program)
    params = dict(module.named_parameters())
    names = [name for name in trainable(program) if name in params]
    learned = [params[name] for name in names]
    targets = torch.randint(0, CLASSES, (len(inputs),))
    collector = GradientCollector(program, products=products)

    def plain() -> None:
        torch.autograd.grad(functional.cross_entropy(module(inputs), targets), learned)

    def collecting() -> None:
        gradients = torch.autograd.grad(functional.cross_entropy(module(inputs), targets), learned)
        collector.update(dict(zip(names, gradients, strict=True)), params)

    for _ in range(5):
        plain()
        collecting()
    timed = [(_milliseconds(plain), _milliseconds(collecting)) for _ in range(pairs)]
    ratios = sorted(with_it / without for without, with_it in timed)
    return Cost(
        plain_ms=statistics.median(without for without, _ in timed),
        collect_ms=statistics.median(with_it for _, with_it in timed),
        ratio=statistics.median(ratios),
        lowest=ratios[len(ratios) // 10],
        highest=ratios[-1 - len(ratios) // 10],
    )


def _milliseconds(call: Callable[[], None]) -> float:
    start = time.thread_time()
    call()
    return (time.thread_time() - start) * 1000


def main() -> None:
    """Print one line a model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=60)
    pairs = parser.parse_args().pairs
    torch.set_num_threads(1)
    torch.manual_seed(0)
    models = {
        "MLP 784-512-512-10": (mlp(), torch.randn(BATCH, 784)),
        "CNN with batch norm": (cnn(), torch.randn(BATCH, 1, 28, 28)),
        "transformer encoder": (Encoder(), torch.randn(BATCH, TOKENS, WIDTH)),
    }
    for products in (False, True):
        print(
            "\nwith products, for taylor and fisher"
            if products
            else "gradients alone, for gradient_stability"
        )
        print(f"{'model':22} {'plain ms':>9} {'collect ms':>11} {'ratio':>6}   10 to 90 % of {pairs} pairs")
        for name, (model, inputs) in models.items():
            cost = measure(model, inputs, pairs, products=products)
            print(
                f"{name:22} {cost.plain_ms:9.2f} {cost.collect_ms:11.2f} {cost.ratio:6.3f}   "
                f"{cost.lowest:.3f} to {cost.highest:.3f}"
            )


if __name__ == "__main__":
    main()
