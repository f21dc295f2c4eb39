"""What a fleet of a million models asks of S3 and of its driver; docs/scale.md holds what this prints.

    python benchmarks/fleet/arithmetic.py

Requests per model are counted: two fleets, one larger than the other, are driven by the product's own code, with steps
that compute nothing (noop_fleet.py). Times and bytes of the driver are those that scale.py measured. The rest is
multiplication: what is assumed stands in the constants below.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from markdown_table import table
from memory_store import PAGE_KEYS, Bucket
from noop_fleet import in_memory, make_fleet

from fleetpress.jobs.driver.run import run_fleet
from fleetpress.jobs.report.fleet_table import LISTED
from fleetpress.jobs.spec.fleet_spec import Spec
from fleetpress.jobs.threads import AT_ONCE

MODELS = 1_000_000
SMALL, LARGE = 60, 100  # the fleets that are counted; both more than what is asked for one by one
KINDS = ("GET", "HEAD", "PUT", "conditional PUT", "DELETE")

# As scale.py measured them at 10,000 models, on one core: per model.
FIRST_CPU_MS, UNCHANGED_CPU_MS = 4.5, 0.2  # the first one with the tasks of its workers
KEPT_BYTES, SUMMARY_BYTES, PAGE_BYTES = 27_500, 431, 600
STATUS_SECONDS, REPORT_SECONDS = 0.5, 1.4  # of CPU, in all

# S3: requests a second below one prefix before it has split any, and list prices in dollars, AWS us-east-1, as known
# in 2025: look them up before relying on them. A DELETE is free.
PUTS_PER_SECOND, GETS_PER_SECOND = 3500, 5500
PUT_DOLLARS, GET_DOLLARS = 0.005 / 1000, 0.0004 / 1000
LATENCY_SECONDS, PAGE_SECONDS = 0.02, 0.1  # of a request, of a page of a listing


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one run asks per model: by who asks and kind; and how many keys it lists."""

    requests: Counter[tuple[str, str]]
    keys: float

    def count(self, *kinds: str, who: str | None = None) -> float:
        """Requests per model of these kinds."""
        return sum(
            number
            for (asking, kind), number in self.requests.items()
            if kind in kinds and who in (None, asking)
        )

    @property
    def gets(self) -> float:
        """What S3 counts and bills as GETs."""
        return self.count("GET", "HEAD")

    @property
    def puts(self) -> float:
        """What S3 counts and bills as PUTs, listings left out."""
        return self.count("PUT", "conditional PUT")

    @property
    def pages(self) -> float:
        """Listings of a page each, per model."""
        return self.keys / PAGE_KEYS

    @property
    def dollars(self) -> float:
        """Of a model's requests."""
        return (self.puts + self.pages) * PUT_DOLLARS + self.gets * GET_DOLLARS


def counted(*, explicit: bool) -> tuple[Run, Run]:
    """A first and an unchanged run, from the difference of two fleets: what every fleet asks once cancels out."""
    (first_small, again_small), (first_large, again_large) = (
        _counts(size, explicit=explicit) for size in (SMALL, LARGE)
    )
    return _per_model(first_small, first_large), _per_model(again_small, again_large)


def _counts(size: int, *, explicit: bool) -> list[Counter[tuple[str, str]]]:
    with in_memory() as bucket:
        spec = make_fleet(bucket, size, explicit=explicit)
        return [
            _run(bucket, spec, listed)
            for listed in (("models", "output/records"), ("models", "output/models"))
        ]


def _run(bucket: Bucket, spec: Spec, listed: Sequence[str]) -> Counter[tuple[str, str]]:
    """Requests of a run; what it tells of itself depends on time and is left out. Keys listed count as kind `keys`."""
    bucket.requests.clear()
    by_pattern = len(spec.models) == 1
    found: Counter[tuple[str, str]] = Counter()
    for place in listed:
        if place != "models" or by_pattern:
            found["driver", "keys"] += len(bucket.below(f"memory/{place}/"))
    run_fleet(spec, executor="inline")
    for (who, kind, place), number in bucket.requests.items():
        if place != "runs" and kind != "LIST":
            found[who, kind] += number
    return found


def _per_model(small: Counter[tuple[str, str]], large: Counter[tuple[str, str]]) -> Run:
    difference = {key: (number - small[key]) / (LARGE - SMALL) for key, number in large.items()}
    keys = difference.pop(("driver", "keys"), 0.0)
    return Run(requests=Counter(difference), keys=keys)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) else f"{value:,.2f}"


def print_counts(first: Run, named: Run, pattern: Run) -> None:
    """Requests per model."""
    rows = (
        ("first run, its workers", [first.count(kind, who="worker") for kind in KINDS], 0.0),
        ("first run, its driver", [first.count(kind, who="driver") for kind in KINDS], first.keys),
        ("unchanged, each model named in the spec", [named.count(kind) for kind in KINDS], named.keys),
        ("unchanged, models found by a pattern", [pattern.count(kind) for kind in KINDS], pattern.keys),
    )
    table(
        ("requests per model", *KINDS, "keys listed"),
        [(name, *map(_number, counts), _number(keys)) for name, counts, keys in rows],
    )


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"


def print_million(first: Run, again: Run) -> None:
    """The same, times a million."""
    runs = (first, again)

    def row(name: str, *values: str) -> tuple[str, ...]:
        return name, *values

    cpu = [_hours(MODELS * ms / 1000) for ms in (FIRST_CPU_MS, UNCHANGED_CPU_MS)]
    table(
        (f"{MODELS:,} models, found by a pattern", "first run", "unchanged"),
        [
            row("GETs and HEADs, millions", *(f"{run.gets * MODELS / 1e6:.1f}" for run in runs)),
            row("PUTs, millions", *(f"{run.puts * MODELS / 1e6:.1f}" for run in runs)),
            row("pages listed, one after the other", *(f"{run.pages * MODELS:,.0f}" for run in runs)),
            row("requests, $", *(f"{run.dollars * MODELS:,.2f}" for run in runs)),
            row("pages, at 100 ms", *(_hours(run.pages * MODELS * PAGE_SECONDS) for run in runs)),
            row(
                "leases, one after the other, at 20 ms",
                _hours(first.count("conditional PUT", "DELETE", who="driver") * MODELS * LATENCY_SECONDS),
                "none",
            ),
            row(
                f"pointers, {AT_ONCE} at once, at 20 ms",
                "none",
                _hours(again.count("GET") * MODELS * LATENCY_SECONDS / AT_ONCE),
            ),
            row("CPU of one core, of the first run with its workers' tasks", *cpu),
            row("driver's memory, GB", f"{KEPT_BYTES * MODELS / 1e9:.0f}", "less"),
            row("summary.json, MB", *[f"{SUMMARY_BYTES * MODELS / 1e6:,.0f}"] * 2),
            row("report.html, MB", *[f"{PAGE_BYTES * min(MODELS, LISTED) / 1e6:,.0f}"] * 2),
        ],
    )
    print()
    rates = (PUTS_PER_SECOND / first.puts, GETS_PER_SECOND / first.gets)
    print(
        f"Below a prefix that S3 has not split yet, a first run may do {min(rates):,.0f} models a second "
        f"({PUTS_PER_SECOND:,} PUTs a second; the GETs would allow {rates[1]:,.0f}): "
        f"a million take {_hours(MODELS / min(rates))} at least."
    )
    print(f"An unchanged run may look at {GETS_PER_SECOND / again.gets:,.0f} a second.")
    print(
        f"Ten thousand models: `status` {STATUS_SECONDS} s and `report --html` {REPORT_SECONDS} s of CPU, "
        f"summary {SUMMARY_BYTES / 100:.1f} MB, page {PAGE_BYTES / 100:.1f} MB, driver {KEPT_BYTES / 100:.0f} MB, "
        f"requests of a first run {first.dollars * 10_000:.2f} $."
    )


def main() -> None:
    """Count and print."""
    _, named = counted(explicit=True)
    first, again = counted(explicit=False)
    print_counts(first, named, again)
    print()
    print_million(first, again)


if __name__ == "__main__":
    main()
