"""What the three benchmarks share: one command line, one way to run a spec, one kind of table."""

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from fleetpress.jobs import run_fleet
from fleetpress.jobs.driver.run import Event
from fleetpress.jobs.runs.figures import (
    counted,
    sized,
    three_digits,
)
from fleetpress.jobs.runs.results import (
    FleetResult,
    ModelResult,
    number,
)
from fleetpress.jobs.spec.fleet_spec import parse_spec

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, kw_only=True)
class Options:
    """Where everything lies, and where tasks run."""

    folder: Path
    executor: Literal["ray", "inline"]
    more: argparse.Namespace = field(default_factory=argparse.Namespace)


def options(
    description: str | None, add: Callable[[argparse.ArgumentParser], object] = lambda parser: None
) -> Options:
    """The command line of a benchmark, to which it may `add`. Afterwards FOLDER is the working folder: paths in specs
    start there.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help="for packages, models, data and output; reused"
    )
    parser.add_argument("--executor", choices=("ray", "inline"), default="ray")
    add(parser)
    parsed = parser.parse_args()
    folder = parsed.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    return Options(folder=folder, executor=parsed.executor, more=parsed)


def run(text: str, name: str, chosen: Options, *, allow_code: bool = False) -> FleetResult:
    """Run a spec, with what happens on stderr. SystemExit if a model failed: then there is no table to believe."""
    spec = parse_spec(text, name)
    result = run_fleet(spec, executor=chosen.executor, allow_code=allow_code, listener=_tell)
    failed = [f"{model.name}: {model.reason}" for model in result.models if model.state == "failed"]
    if failed:
        raise SystemExit("\n".join(failed))
    say(f"{name}: {len(result.models)} models in {result.seconds:.0f} s, executor {chosen.executor}")
    return result


def _tell(event: Event, result: FleetResult) -> None:
    if event.kind == "finished" and (event.seconds or 0) > 1:
        say(f"{result.seconds:6.0f} s  {event.task} took {event.seconds:.1f} s")


def say(text: str) -> None:
    """One line on stderr."""
    print(text, file=sys.stderr, flush=True)


def by_name(result: FleetResult) -> dict[str, ModelResult]:
    """The models of a run."""
    return {model.name: model for model in result.models}


def table(title: str, head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a markdown table: the first column left, numbers right."""
    print(f"\n**{title}**\n")
    print(f"| {' | '.join(head)} |")
    print(f"|---|{'--:|' * (len(head) - 1)}")
    for row in rows:
        print(f"| {' | '.join(str(cell) for cell in row)} |")


ROAD = [
    "model",
    "state",
    "metric",
    "before",
    "after",
    "parameters",
    "MACs",
    "bytes",
    "latency ms",
    "ratio",
    "bits/weight",
]


def road_row(model: ModelResult) -> list[object]:
    """Everything before -> after, as `ROAD` names it."""
    before, after = model.before or {}, model.after or {}
    pairs = [f"{a} → {b}" for a, b in zip(sizes(before), sizes(after), strict=True)]
    values = [before["metric"], f"{before['value']:.4f}", f"{after['value']:.4f}"]
    return [
        model.name,
        model.state,
        *values,
        *pairs,
        f"{model.compression_ratio:.2f}",
        f"{model.bits_per_weight:.2f}",
    ]


def sizes(facts: Mapping[str, Any] | None) -> list[str]:
    """Parameters, MACs, bytes and latency of one side of a model."""
    known = facts or {}
    return [
        counted(number(known, "parameters")),
        counted(number(known, "macs")),
        sized(number(known, "bytes")),
        three_digits(number(known, "latency_ms")),
    ]


def print_machine(started: float) -> None:
    """Versions, cores, and what the whole command took."""
    torch_, ray_, python = version("torch"), version("ray"), platform.python_version()
    seconds = time.monotonic() - started
    print(
        f"\nfleetpress {version('fleetpress')}, torch {torch_}, Ray {ray_}, Python {python}, "
        f"{os.cpu_count()} cores ({platform.machine()}), {seconds:.0f} s in all"
    )
