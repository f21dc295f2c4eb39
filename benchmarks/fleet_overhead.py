"""What a run costs beyond the models' own compute: many tiny models, one run, all cores.

    python benchmarks/fleet_overhead.py [--models 50] [--executors inline ray]

Own compute of a model is what its recipe asks for, called bare: collect, choose, delete, fine-tune, quantize, pack, and
the metric of source and result, on programs and arrays in memory, without any file, record, or second look. Everything
else is overhead, and so are the archive's reading and writing, latencies, the proof of what was published, the report:

    overhead per model = (seconds of the run * cores - own compute of all models) / models

Own compute is CPU time of one thread, which is its wall time on an idle machine; the run is wall time. On a busy
machine the run waits for others, and that shows as overhead. The cluster is started, and its workers have run two other
models, before the clock starts. Own compute is the median of nine models, which differ in their weights only, measured
in as many processes at once as the run has cores.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.synchronize import Barrier
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.export import ExportedProgram

from fleetpress.compression.evaluation import evaluate
from fleetpress.compression.layers import layers
from fleetpress.compression.program import tensors, with_tensors
from fleetpress.compression.pruning import PruneOptions, delete, prune
from fleetpress.compression.quantization import QUANTIZERS, quantize_layer
from fleetpress.compression.quantization.packed_program import pack_program
from fleetpress.compression.scheme import resolve
from fleetpress.compression.training import TrainOptions, collect, train
from fleetpress.jobs import run_fleet
from fleetpress.jobs.demo import npz_bytes
from fleetpress.jobs.driver.run import Event
from fleetpress.jobs.executors import ExecutorName
from fleetpress.jobs.runs.results import FleetResult
from fleetpress.jobs.spec.fleet_spec import parse_spec
from fleetpress.storage.programs import load_program, module_to_program, save_program

GOAL_SECONDS = 0.2
TIMED_MODELS = 9
SPEC = """\
version: 1
name: overhead
output: {place}/{output}
models:
  - {{source: "{place}/{models}/*.pt2", data: digits, recipe: all}}
data:
  digits: {{train: "{place}/train.npz", eval: "{place}/test.npz", loss: cross_entropy, metric: accuracy}}
recipes:
  all:
    collect: {{batch_size: 64}}
    prune: {{method: gradient_stability, sparsity: 0.5}}
    finetune: {{epochs: 1, batch_size: 64, lr: 1.0e-3}}
    quantize: {{scheme: W4A16}}
    validate: {{max_drop: 1.0}}
"""

Samples = dict[str, Tensor]
_barrier: Barrier


def digits() -> tuple[Samples, Samples]:
    """Scikit-learn's digits: 1,257 to train on, 540 to test on."""
    raw = load_digits()
    images = torch.from_numpy(raw.data).float().div(16)
    labels = torch.from_numpy(raw.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train_set, test_set = (
        {"inputs": images[rows], "targets": labels[rows]} for rows in (order[540:], order[:540])
    )
    return train_set, test_set


def make_fleet(place: Path, count: int, sets: tuple[Samples, Samples]) -> None:
    """Write `count` perceptrons 64-32-10, the two that warm the workers up, and the data."""
    for name in ("models", "warm"):
        (place / name).mkdir()
    for name, samples in zip(("train", "test"), sets, strict=True):
        (place / f"{name}.npz").write_bytes(npz_bytes(samples))
    torch.manual_seed(0)
    first = module_to_program(
        nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)), [sets[0]["inputs"][:2]]
    )
    for index in range(count + 2):
        values = {name: torch.randn_like(value) / 8 for name, value in tensors(first).items()}
        data = save_program(with_tensors(first, values), compress=False)
        warm = index >= count
        (place / ("warm" if warm else "models") / f"model-{index:03}.pt2").write_bytes(data)


def own_compute(program: ExportedProgram, sets: tuple[Samples, Samples]) -> dict[str, float]:
    """Seconds of each step of the recipe, called bare."""
    train_set, test_set = sets
    took: dict[str, float] = {}
    clock = time.process_time()

    def lap(name: str) -> None:
        nonlocal clock
        took[name] = time.process_time() - clock
        clock = time.process_time()

    found = collect(program, train_set, 64, loss="cross_entropy", seed=0)
    lap("collect")
    options = PruneOptions(method="gradient_stability", sparsity=0.5)
    smaller = delete(program, prune(program, options, found.neurons()).removed)
    lap("prune")
    result = train(
        smaller, train_set, TrainOptions(epochs=1, batch_size=64, lr=1e-3), loss="cross_entropy", seed=0
    )
    final = with_tensors(smaller, result.values)
    lap("finetune")
    scheme, method, values = resolve(scheme="W4A16"), QUANTIZERS["round_to_nearest"], tensors(final)
    weights = {
        name: weight
        for layer in layers(final)
        for name, weight in quantize_layer(layer, values, scheme, method).items()
    }
    packed = pack_program(final, weights)
    lap("quantize")
    evaluate(program, test_set, "accuracy")
    evaluate(packed, test_set, "accuracy")
    lap("measure")
    return took


def own_compute_at_once(processes: int, place: Path, models: list[str]) -> dict[str, float]:
    """Median seconds of each step, in so many processes at the same time: cores that share caches are slower then."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(processes)
    with ProcessPoolExecutor(processes, context, initializer=_meet_at, initargs=(barrier,)) as pool:
        laps = [lap for found in pool.map(_laps, [place] * processes, [models] * processes) for lap in found]
    return {name: statistics.median(lap[name] for lap in laps) for name in laps[0]}


def _meet_at(barrier: Barrier) -> None:
    global _barrier  # noqa: PLW0603, a barrier reaches a pool's processes in no other way
    torch.set_num_threads(1)
    _barrier = barrier


def _laps(place: Path, models: list[str]) -> list[dict[str, float]]:
    sets = digits()
    programs = [load_program((place / "models" / name).read_bytes()) for name in models]
    own_compute(programs[0], sets)  # the first call of everything builds caches
    _barrier.wait()
    return [own_compute(program, sets) for program in programs]


def timed_run(place: Path, models: str, executor: ExecutorName) -> tuple[FleetResult, dict[str, float]]:
    """One run of a fleet, and the seconds its tasks took by kind."""
    tasks: dict[str, float] = defaultdict(float)

    def note(event: Event, _: FleetResult) -> None:
        if event.kind == "finished" and event.task:
            tasks[event.task.split("/")[1]] += event.seconds or 0.0

    text = SPEC.format(place=place, output=f"output-{models}-{executor}", models=models)
    result = run_fleet(parse_spec(text, "overhead.yaml"), executor=executor, listener=note)
    lost = [f"{model.name}: {model.reason}" for model in result.models if model.state != "published"]
    if lost:
        raise SystemExit("\n".join(lost))
    return result, dict(tasks)


def main() -> None:
    """Measure, and print where the time went."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=int, default=50)
    parser.add_argument("--executors", nargs="+", choices=("inline", "ray"), default=["inline", "ray"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        make_fleet(place, arguments.models, digits())
        for executor in arguments.executors:
            _print(executor, arguments.models, place)


def _print(executor: ExecutorName, models: int, place: Path) -> None:
    cores = 1 if executor == "inline" else os.cpu_count() or 1
    laps = own_compute_at_once(
        cores, place, [f"model-{index:03}.pt2" for index in range(min(TIMED_MODELS, models))]
    )
    own = sum(laps.values())
    if executor == "ray":
        from fleetpress.jobs.executors import ray_cluster

        ray_cluster.connect(None)
    timed_run(place, "warm", executor)
    cpu = time.process_time()
    result, tasks = timed_run(place, "models", executor)
    cpu = time.process_time() - cpu
    overhead = result.seconds * cores / models - own
    verdict = "within" if overhead <= GOAL_SECONDS else "MISSES"
    print(f"\n{executor}: {models} models in {result.seconds:.1f} s on {cores} core(s)")
    steps = ", ".join(f"{name} {seconds:.3f}" for name, seconds in laps.items())
    print(f"  own compute of a model: {own:.3f} s: {steps}")
    print(f"  overhead per model: {overhead:.3f} s, {verdict} the goal of {GOAL_SECONDS} s")
    if executor == "inline":
        print(f"  in CPU time, which other processes on the machine disturb less: {cpu / models - own:.3f} s")
    inside = sum(tasks.values()) / models
    print(
        f"  inside tasks {inside:.3f} s a model: "
        + ", ".join(f"{k} {v / models:.3f}" for k, v in tasks.items())
    )
    print(
        f"  between tasks (driver, scheduling, idle cores) {result.seconds * cores / models - inside:.3f} s a model"
    )


if __name__ == "__main__":
    main()
