"""`auto` with nothing but a goal, beside every uniform setting: small nets of each kind, a language model, real ones.

    python benchmarks/real/auto.py FOLDER [--executor ray|inline] [--models digits-mlp ...] [--drop 1%]

Every model gets `auto: {max_drop: 1%}`, and besides every uniform number of bits, by GPTQ on all its layers. The best
uniform setting is the smallest of those that pass the same gate: the drop on held-out data with one standard error.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bench
import crepe
import criteria_nets
import fetch
import minilm
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from fleetpress.compression.program import with_tensors
from fleetpress.compression.training import TrainOptions, train
from fleetpress.jobs.demo import npz_bytes
from fleetpress.jobs.runs.figures import sized
from fleetpress.jobs.runs.results import ModelResult
from fleetpress.storage.programs import module_to_program, save_program

HOME = Path("auto")
BITS = (8, 7, 6, 5, 4, 3, 2)
Arrays = dict[str, Tensor]


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


def speakers(folder: Path) -> tuple[ExportedProgram, Arrays, Arrays]:
    """Japanese vowels: 270 utterances to train, 370 to measure."""
    place = fetch.package(folder, "aeon") / "aeon" / "datasets" / "data" / "JapaneseVowels"
    known, held_out = (_utterances(place / f"JapaneseVowels_{part}.ts") for part in ("TRAIN", "TEST"))
    mean, deviation = known["inputs"].mean((0, 1)), known["inputs"].std((0, 1))
    for data in (known, held_out):
        data["inputs"] = (data["inputs"] - mean) / deviation
    torch.manual_seed(0)
    program = module_to_program(Speaker().eval(), [known["inputs"][:2]])
    return _trained(program, known, TrainOptions(epochs=40, batch_size=32, lr=5e-3)), known, held_out


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
    program: ExportedProgram, data: Arrays, options: TrainOptions, loss: str = "cross_entropy"
) -> ExportedProgram:
    return with_tensors(program, train(program, data, options, loss=loss, seed=0).values)


def small(name: str) -> Callable[[Path], tuple[ExportedProgram, Arrays, Arrays]]:
    """One of the nets that criteria are compared on, trained as there, with other data to measure on."""

    def make(folder: Path) -> tuple[ExportedProgram, Arrays, Arrays]:
        net = criteria_nets.NETS[name](folder)
        assert net.training is not None
        program = _trained(net.program(0), net.train_data, net.training, net.loss)
        return program, net.train_data, net.held_out

    return make


def pitch(folder: Path) -> tuple[ExportedProgram, Arrays, Arrays]:
    """The tiny pitch tracker as it was published; tones without their pitches."""
    program = criteria_nets.crepe_tiny(folder).program(0)
    return program, {"inputs": crepe.tones(2000, 0)[0]}, {"inputs": crepe.tones(1000, 1)[0]}


MODELS: dict[str, tuple[Callable[[Path], tuple[ExportedProgram, Arrays, Arrays]], str, str]] = {
    "digits-mlp": (small("digits-mlp"), "cross_entropy", "accuracy"),
    "mnist-cnn": (small("mnist-cnn"), "cross_entropy", "accuracy"),
    "speaker-lstm": (speakers, "cross_entropy", "accuracy"),
    "char-gpt": (small("char-gpt"), "causal_lm", "perplexity"),
    "crepe-tiny": (pitch, "", "cosine"),
}


def prepare(folder: Path, names: list[str]) -> None:
    """Write models and data that are not there yet."""
    torch.set_num_threads(1)
    for name in names:
        place = HOME / name
        if name == "minilm":
            minilm.prepare(folder)
        elif not (place / "eval.npz").exists():
            started = time.monotonic()
            place.mkdir(parents=True, exist_ok=True)
            program, known, held_out = MODELS[name][0](folder)
            (place / "model.pt2").write_bytes(save_program(program, compress=False))
            (place / "train.npz").write_bytes(npz_bytes(known))
            (place / "eval.npz").write_bytes(npz_bytes(held_out))
            bench.say(f"made {name} in {time.monotonic() - started:.0f} s")


def spec(names: list[str], drop: str) -> str:
    """Every model by `auto`, and at every number of bits."""
    models, data = [], []
    for name in names:
        source = "minilm/models/minilm.pt2" if name == "minilm" else f"auto/{name}/model.pt2"
        place = "minilm/data" if name == "minilm" else f"auto/{name}"
        loss, metric = ("", "cosine") if name == "minilm" else MODELS[name][1:]
        told = f"loss: {loss}, metric: {metric}" if loss else f"metric: {metric}"
        data.append(f"  {name}: {{train: {place}/train.npz, eval: {place}/eval.npz, {told}}}")
        for recipe in ("auto", *(f"w{bits}" for bits in BITS)):
            models.append(f"  - {{name: {name}-{recipe}, source: {source}, data: {name}, recipe: {recipe}}}")
    recipes = [f"  auto: {{auto: {{max_drop: {drop}}}}}"]
    for bits in BITS:
        groups = "group_size: 128" if bits < 8 else "strategy: channel"
        kinds = "targets: ['re:.*']"
        step = f"{{num_bits: {bits}, {groups}, method: gptq, {kinds}}}"
        recipes.append(
            f"  w{bits}: {{quantize: {step}, validate: {{max_drop: 1.0e9}}}}  # the table is the gate"
        )
    head = ["version: 1", "name: auto", "output: auto/output", "models:", *models]
    return "\n".join([*head, "data:", *data, "recipes:", *recipes, "resources: {memory_per_task: 6GiB}", ""])


def passes(model: ModelResult, drop: str) -> bool:
    """The gate of `auto`, for what was published by another recipe: one standard error to spare."""
    before, after = model.before or {}, _metrics(model)["after"]
    allowed = float(drop.rstrip("%")) / 100 * abs(before["value"]) if drop.endswith("%") else float(drop)
    found = after["drop"]
    return found["drop"] is not None and found["drop"] + found["standard_error"] <= allowed


def _metrics(model: ModelResult) -> dict[str, Any]:
    place = HOME / "output" / "models" / model.name / str(model.digest) / "metrics.json"
    return dict(json.loads(place.read_text(encoding="utf-8")))


def rows(names: list[str], models: dict[str, ModelResult], drop: str) -> Iterator[list[object]]:
    """What auto took of each model, beside its best uniform setting."""
    for name in names:
        chosen = models[f"{name}-auto"]
        uniform = [models[f"{name}-w{bits}"] for bits in BITS]
        good = [model for model in uniform if model.after and passes(model, drop)]
        best = min(good, key=lambda model: (model.after or {})["bytes"], default=None)
        before, after = chosen.before or {}, chosen.after or {}
        values = f"{before['value']:.4f} → {after['value']:.4f}"
        size = sized(after["bytes"]) if chosen.digest else chosen.state
        told = ["none", "none"] if best is None else [_short(best), f"{_ratio(best, chosen):.2f}"]
        yield [
            name,
            before["metric"],
            values,
            sized(before["bytes"]),
            size,
            f"{chosen.compression_ratio:.1f}x",
            *told,
        ]


def _short(model: ModelResult) -> str:
    return f"{model.name.rpartition('-')[2]}, {sized((model.after or {})['bytes'])}"


def _ratio(one: ModelResult, other: ModelResult) -> float:
    return float((one.after or {})["bytes"]) / float((other.after or {})["bytes"])


def main() -> None:
    """Prepare, run, print the table."""
    chosen = bench.options(
        __doc__,
        lambda parser: (
            parser.add_argument("--models", nargs="+", default=[*MODELS, "minilm"]),
            parser.add_argument("--drop", default="1%"),
        ),
    )
    started = time.monotonic()
    names, drop = chosen.more.models, chosen.more.drop
    prepare(chosen.folder, names)
    models = bench.by_name(bench.run(spec(names, drop), "auto.yaml", chosen))
    head = ["model", "metric", "value", "before", "auto", "ratio", "best uniform", "uniform / auto"]
    found = list(rows(names, models, drop))
    bench.table(f"auto, max_drop {drop}, beside the best uniform setting of the same gate", head, found)
    ratios = [float(str(row[-1])) for row in found if row[-1] != "none"]
    print(
        f"\nuniform / auto: mean {statistics.mean(ratios):.2f}, least {min(ratios):.2f}, {len(ratios)} models"
    )
    bench.print_machine(started)


if __name__ == "__main__":
    main()
