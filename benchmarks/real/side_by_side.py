"""A table of methods (rows) and amounts (columns) on one trained net, over seeds; what is measured already is kept."""

import argparse
import os
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import bench
import torch
from results_file import Results
from torch.export import ExportedProgram
from trained import TRAINED, Measure, Trained

from fleetpress.compression.calibration import CalibrationStatistics, WeightStatistics
from fleetpress.jobs.runs.figures import MISSING

ORIGINAL, _BYTES = "the original", "bytes of these layers"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A net of one seed, what its layers read, and the interpreter of the peers' environment, if there is one."""

    net: Trained
    seed: int
    statistics: CalibrationStatistics
    peer: str | None
    made: dict[str, ExportedProgram] = field(default_factory=dict)  # what other rows start from

    @cached_property
    def _important(self) -> CalibrationStatistics:
        return self.net.statistics(by_importance=True)

    def read(self, *, by_importance: bool) -> Mapping[str, WeightStatistics]:
        """What each weight reads; with `by_importance` what moves the net's outputs more counts more."""
        return (self._important if by_importance else self.statistics).weights


# A number about a column, or about a program; shown in the table.
Size = Callable[[Case, str], int]
Fact = Callable[[Case, ExportedProgram], float]
# The program and the CPU seconds it took; or why there is none.
Way = Callable[[Case, str], tuple[ExportedProgram, float] | str]


class Table:
    """Rows by label; a cell is a way's program for a column's name, measured.

    `size` tells the bytes of a column, the same for all rows; `fact` what else is told of a cell, in brackets.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        file: str,
        columns: Sequence[str],
        *,
        size: Size | None,
        fact: Fact | None,
    ) -> None:
        self.name = name
        self._columns = columns
        self._folder = folder
        self._results = Results(folder / f"{file}-{name}.json")
        self._size, self._fact = size, fact

    def fill(self, ways: Mapping[str, Way], columns: Sequence[str], seeds: int, peer: str | None) -> None:
        """Measure what is missing, seed by seed."""
        for seed in range(seeds):
            wanted = [(row, column) for row in ways for column in columns]
            wanted = [at for at in wanted if self._key(seed, *at) not in self._results.rows]
            if not wanted:
                continue
            net = TRAINED[self.name](self._folder, seed)
            case = Case(net=net, seed=seed, statistics=net.statistics(), peer=peer)
            measure = Measure(net)
            if self._key(seed, ORIGINAL, "") not in self._results.rows:
                values = measure.of(net.program)
                self._results.add(
                    self._key(seed, ORIGINAL, ""), {"values": values[:-1], "metrics": net.metrics}
                )
            if self._size is not None:
                for column in self._columns:
                    sized = {"bytes": self._size(case, column)}
                    self._results.rows.setdefault(f"{_BYTES}|{column}", sized)
            for row, column in wanted:
                found = ways[row](case, column)
                if isinstance(found, str):
                    self._results.add(self._key(seed, row, column), {"reason": found})
                    continue
                program, seconds = found
                told: dict[str, Any] = {"values": measure.of(program), "seconds": round(seconds, 2)}
                if self._fact is not None:
                    told["fact"] = round(self._fact(case, program), 3)
                self._results.add(self._key(seed, row, column), told)

    def show(self, ways: Mapping[str, Way], seeds: int, title: str) -> None:
        """Print the means of the seeds; the first metric with its spread."""
        columns = self._columns
        kept = [self._results.rows.get(self._key(seed, ORIGINAL, "")) for seed in range(seeds)]
        known = [item for item in kept if item]
        if not known:
            return
        metrics = " / ".join([*known[0]["metrics"], "SQNR (dB)"])
        head = [metrics, *columns, "s"]
        original = " / ".join(_number(value) for value in known[0]["values"])
        rows: list[list[str]] = [[f"{ORIGINAL}: {original}", *[""] * (len(columns) + 1)]]
        if self._size is not None:
            sizes = [self._results.rows.get(f"{_BYTES}|{column}", {}).get("bytes") for column in columns]
            rows.append([_BYTES, *(MISSING if size is None else f"{size:,}" for size in sizes), ""])
        reasons: list[str] = []
        for row in ways:
            cells = [list(self._found(row, column, seeds)) for column in columns]
            if not any(cells):
                continue
            reasons += [f"{row}: {item['reason']}" for cell in cells for item in cell if "reason" in item]
            shown = [
                _shown([item["values"] for item in cell if "values" in item]) + _told(cell) for cell in cells
            ]
            times = [item["seconds"] for cell in cells for item in cell if "seconds" in item]
            rows.append([row, *shown, f"{statistics.median(times):.1f}" if times else ""])
        bench.table(f"{self.name}: {title}", head, rows)
        for reason in dict.fromkeys(reasons):
            print(f"- {reason}")

    def _found(self, row: str, column: str, seeds: int) -> Iterator[dict[str, Any]]:
        for seed in range(seeds):
            item = self._results.rows.get(self._key(seed, row, column))
            if item is not None:
                yield item

    @staticmethod
    def _key(seed: int, row: str, column: str) -> str:
        return f"{seed}|{row}|{column}"


def _told(cell: Sequence[Mapping[str, Any]]) -> str:
    facts = [item["fact"] for item in cell if "fact" in item]
    return f" ({statistics.fmean(facts):.2f})" if facts else ""


def _shown(values: Sequence[Sequence[float]]) -> str:
    """Metrics to three digits behind the point, the SQNR to one; of several seeds their means, ± the deviation."""
    if not values:
        return MISSING
    *metrics, sqnr = zip(*values, strict=True)
    parts = [_number(statistics.fmean(column)) for column in metrics]
    if len(values) > 1:
        parts[0] += f" ± {_number(statistics.stdev(metrics[0]))}"
    return " / ".join([*parts, f"{statistics.fmean(sqnr):.1f}"])


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"


def options(description: str | None) -> argparse.Namespace:
    """FOLDER and what to do in it; the folder is entered, and torch takes one thread."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--nets", nargs="+", choices=list(TRAINED), default=list(TRAINED))
    parser.add_argument("--peer", metavar="PYTHON", help="the interpreter of the peers' environment")
    parser.add_argument("--only", default="", metavar="PATTERN", help="rows whose name matches it")
    parser.add_argument("--columns", default="", metavar="PATTERN", help="columns whose name matches it")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--show", action="store_true", help="print what is measured already")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    chosen.folder = chosen.folder.resolve()
    os.chdir(chosen.folder)
    return chosen


def run(
    description: str | None,
    file: str,
    ways: Mapping[str, Way],
    columns: Sequence[str],
    *,
    size: Size | None = None,
    fact: Fact | None = None,
) -> None:
    """The command: measure what matches the patterns, then print the whole table of each net."""
    chosen = options(description)
    for name in chosen.nets:
        table = Table(name, chosen.folder, file, columns, size=size, fact=fact)
        if not chosen.show:
            some = {label: way for label, way in ways.items() if re.search(chosen.only, label)}
            wanted = [column for column in columns if re.search(chosen.columns, column)]
            table.fill(some, wanted, chosen.seeds, chosen.peer)
        table.show(ways, chosen.seeds, file)
