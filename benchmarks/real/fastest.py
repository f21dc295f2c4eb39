"""`auto` for the fewest operations, beside every uniform share of deleted units: how many of the MACs are left.

    python benchmarks/real/fastest.py FOLDER [--executor ray|inline] [--models digits-mlp ...] [--seeds 0 1 2]
        [--drop 1%] [--samples N]

Every model gets `auto: {goal: fastest, max_drop: 1%}`, and besides the same share of units deleted everywhere, by the
criterion, the refitting and the training that auto had before it chose shares group by group, at 8 bits. The best
uniform share is the one with the fewest MACs that passes the same gate: the drop on held-out data with one standard
error. Models are those of auto.py. Minutes are those of one core, of the search and what it publishes. With --samples
only so many of the train samples are given to both, of a model that was trained on all of them.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import auto
import bench
from auto import HOME, MODELS

from fleetpress.jobs.demo import npz_bytes
from fleetpress.jobs.runs.results import ModelResult

SPARSITIES = (0.5, 0.7, 0.8, 0.87, 0.92, 0.95)
NETS = ("digits-mlp", "mnist-cnn", "lenet5")


def shortened(name: str, seed: int, samples: int | None) -> Path:
    """The train data of a model, or so many of them."""
    whole = HOME / f"{name}-{seed}" / "train.npz"
    if samples is None:
        return whole
    some = whole.with_name(f"train-{samples}.npz")
    if not some.exists():
        arrays = auto._arrays(whole)
        some.write_bytes(npz_bytes({key: value[:samples].clone() for key, value in arrays.items()}))
    return some


def spec(name: str, seed: int, recipes: dict[str, str], samples: int | None) -> str:
    """A model by each of the recipes, by name."""
    place, of = HOME / f"{name}-{seed}", MODELS[name]
    train = shortened(name, seed, samples)
    lines = ["version: 1", "name: fastest", f"output: {HOME}/output-{seed}", f"seed: {seed}", "models:"]
    lines += [
        f"  - {{name: {name}-{recipe}, source: {place}/model.pt2, data: own, recipe: {recipe}}}"
        for recipe in recipes
    ]
    told = f"loss: {of.loss}, metric: {of.metric}" if of.loss else f"metric: {of.metric}"
    lines += ["data:", f"  own: {{train: {train}, eval: {place}/eval.npz, {told}}}", "recipes:"]
    lines += [f"  {recipe}: {steps}" for recipe, steps in recipes.items()]
    return "\n".join([*lines, "resources: {memory_per_task: 6GiB}", ""])


def uniform(sparsity: float, tuning: dict[str, Any]) -> str:
    """One share of all units, fine-tuned as auto's candidates are."""
    prune = (
        f"{{method: gradient_stability, sparsity: {sparsity}, structure: [channel, head, recurrent], "
        "compensate: least_squares}"
    )
    step = ", ".join(f"{key}: {value}" for key, value in tuning.items() if key != "quantization_aware")
    quantize = "{num_bits: 8, strategy: channel, method: gptq}"
    return (
        f"{{prune: {prune}, finetune: {{{step}}}, calibrate: {{samples: 512, batch_size: 32}}, "
        f"quantize: {quantize}, validate: {{max_drop: 1.0e9}}}}  # the table is the gate"
    )


@dataclass(frozen=True, kw_only=True)
class Found:
    """What one seed of a model gave."""

    auto: ModelResult
    family: str
    minutes: float
    best: ModelResult | None

    @property
    def left(self) -> float:
        """The share of the MACs that auto left, all of them if it was refused."""
        return _left(self.auto) if self.auto.digest else 1.0

    @property
    def uniform_left(self) -> float:
        """The same of the best uniform share; all of them where none passes."""
        return _left(self.best) if self.best else 1.0


def _left(model: ModelResult) -> float:
    return float((model.after or {})["macs"]) / float((model.before or {})["macs"])


def measured(name: str, seed: int, chosen: bench.Options) -> Found:
    """A model by `auto`, and at every uniform share."""
    auto.prepare(chosen.folder, name, seed)
    trials = "" if chosen.more.trials is None else f", trials: {chosen.more.trials}"
    started = auto._core_seconds()
    goal = f"{{auto: {{goal: fastest, max_drop: {chosen.more.drop}{trials}}}}}"
    samples = chosen.more.samples
    text = spec(name, seed, {"fastest": goal}, samples)
    model = bench.by_name(bench.run(text, "fastest.yaml", chosen))[f"{name}-fastest"]
    spent = HOME / f"{name}-{seed}" / f"minutes-fastest-{model.digest}"
    if not spent.exists():
        spent.write_text(f"{(auto._core_seconds() - started) / 60}")
    search = auto._metrics(model, seed)["search"] if model.digest else {}
    tuning = search["recipe"]["finetune"] if search else {"epochs": 2, "batch_size": 64, "lr": 1.0e-3}
    recipes = {f"d{round(100 * share)}": uniform(share, tuning) for share in chosen.more.sparsities}
    text = spec(name, seed, recipes, samples)
    others = recipes and bench.by_name(bench.run(text, "fastest.yaml", chosen))
    good = [one for one in others.values() if one.after and auto.passes(one, chosen.more.drop, seed)]
    families = [trial["family"] for trial in search.get("trials", ()) if trial.get("is_chosen")]
    return Found(
        auto=model,
        family=families[0] if families else "none",
        minutes=float(spent.read_text()),
        best=min(good, key=_left, default=None),
    )


HEAD = ["model", "metric", "value", "MACs", "auto: left", "family", "best uniform: left", "uniform / auto"]
HEAD += ["bytes", "minutes"]


def row(name: str, seeds: Sequence[Found]) -> list[object]:
    """What auto left of a model's operations, beside its best uniform share: means over seeds, with deviations."""
    before = [found.auto.before or {} for found in seeds]
    after = [found.auto.after or {} for found in seeds]
    told = [found.best.name.rpartition("-d")[2] + " %" if found.best else "none" for found in seeds]
    spread = auto._spread
    return [
        name,
        before[0]["metric"],
        f"{spread([facts['value'] for facts in before], 4)} → {spread([facts['value'] for facts in after], 4)}",
        f"{before[0]['macs']:,}",
        f"{spread([100 * found.left for found in seeds], 1)} %",
        "/".join(found.family for found in seeds),
        f"{spread([100 * found.uniform_left for found in seeds], 1)} % (units deleted: {', '.join(told)})",
        spread([found.uniform_left / found.left for found in seeds], 2),
        f"{statistics.mean(facts['bytes'] for facts in before) / 1000:,.0f} → "
        f"{statistics.mean(facts['bytes'] for facts in after) / 1000:,.1f} kB",
        spread([found.minutes for found in seeds], 1),
    ]


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=list(NETS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--drop", default="1%")
    parser.add_argument("--sparsities", type=float, nargs="*", default=SPARSITIES, help="uniform shares")
    parser.add_argument("--samples", type=int, help="of the train data, instead of all")
    parser.add_argument("--trials", type=int, help="fewer than a search takes by itself")


def main() -> None:
    """Prepare, run, print the table."""
    chosen = bench.options(__doc__, _arguments)
    started = time.monotonic()
    found = {
        name: [measured(name, seed, chosen) for seed in chosen.more.seeds] for name in chosen.more.models
    }
    title = f"goal: fastest, max_drop {chosen.more.drop}, beside the best uniform share of the same gate"
    bench.table(
        f"{title}, seeds {chosen.more.seeds}", HEAD, [row(name, seeds) for name, seeds in found.items()]
    )
    bench.print_machine(started)


if __name__ == "__main__":
    main()
