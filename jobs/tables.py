"""What verbs print on stdout: plain text that a script can cut, and the same with colours on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any, Protocol

from .runs.figures import (
    MISSING,
    counted,
    elapsed,
    measured,
    metric_of,
    one_line,
    sized,
    three_digits,
)
from .runs.results import (
    FleetResult,
    ModelResult,
    counts,
    number,
    published_bytes,
)
from .runs.run_lines import RunLine

if TYPE_CHECKING:
    from .doctor import Finding
    from .gc import Leftover, Leftovers
    from .methods import Described

_DRAWN_ROWS = 500  # more of them are nobody's to look at, and fitting them to a terminal takes seconds
_STATE_STYLES = {
    "published": "green",
    "unchanged": "cyan",
    "planned": "green",
    "running": "blue",
    "rejected": "yellow",
    "failed": "red",
}
_ENDED = ("published", "unchanged", "rejected", "failed")
_GAP = "  "
_SHORTEST_NAME = 12


class _Preview(Protocol):
    def as_dict(self) -> dict[str, Any]: ...


def print_result(result: FleetResult) -> None:
    """The fleet before and after, one line per model; below it why models were rejected or failed."""
    _line(f"{result.name}: {result.state}, run {result.run}, {elapsed(result.seconds)}")
    if not result.models:
        _line("no models yet")
        return
    metrics = {metric for model in result.models if (metric := metric_of(model)) is not None}
    common = metrics.pop() if len(metrics) == 1 else None
    rows = [_result_row(model, common) for model in result.models]
    headers = ("model", "state", common or "metric", "parameters", "MACs", "bytes", "ratio")
    _table(headers, rows, right=range(2, 7))
    _line("")
    for model in result.models:
        if model.reason:
            _line(f"{model.state} {model.name}: {model.reason}", _STATE_STYLES.get(model.state))
    _line(_summary(result.models))


def print_runs(runs: Sequence[RunLine]) -> None:
    """The runs of an output, one line each, the latest last."""
    if not runs:
        _line("no runs are told of here")
        return
    rows = [
        (
            line.run,
            line.name,
            line.state,
            *(str(line.models.get(state, 0)) for state in _ENDED),
            f"{sized(line.bytes_before)} -> {sized(line.bytes_after)}" if line.bytes_before else "-",
            sized(line.bytes_before - line.bytes_after) if line.bytes_before else "-",
            elapsed(line.seconds),
        )
        for line in runs
    ]
    _table(("run", "spec", "state", *_ENDED, "bytes", "saved", "time"), rows, right=range(3, 10))


def print_published(found: Sequence[Mapping[str, Any]]) -> None:
    """The models of an output, one line each."""
    if not found:
        _line("no models are published here")
        return
    rows = [
        (
            item["name"],
            item["kind"],
            _metric(item.get("before"), item.get("after"), None),
            _change(item.get("before"), item.get("after"), "bytes", sized),
            _ratio(number(item, "compression_ratio")),
            _or_dash(three_digits(number(item, "bits_per_weight"))),
            str(item["digest"]),
        )
        for item in found
    ]
    headers = ("model", "kind", "metric", "bytes", "ratio", "bits/weight", "digest")
    _table(headers, rows, right=range(2, 6))


def print_jobs(found: Sequence[Mapping[str, Any]]) -> None:
    """Jobs of a cluster, or those that an output has kept, one line each."""
    if not found:
        _line("no jobs of fleetpress are known here")
        return
    columns = [name for name in ("job", "state", "exit_code", "run", "name", "output") if name in found[0]]
    rows = [[MISSING if job[name] is None else str(job[name]) for name in columns] for job in found]
    _table(tuple(name.replace("_", " ") for name in columns), rows, right=())


def print_preview(preview: _Preview | Mapping[str, Any]) -> None:
    """What a run would do: the models, the layers it would touch, and what stands in the way."""
    plan = preview if isinstance(preview, Mapping) else preview.as_dict()
    if plan["models"]:
        _table(
            ("model", "kind", "state", "tasks", "layers", "source", "to read", "quantized"),
            [_planned_row(model) for model in plan["models"]],
            right=range(3, 8),
        )
    for model in plan["models"]:
        if model["layers"]:
            _line("")
            _line(model["name"], "bold")
            if model.get("forecast"):
                _line(_forecast_line(model["forecast"]), indent=2)
            _table(
                ("layer", "kind", "prune", "quantize", "skipped"),
                [
                    (
                        layer["name"],
                        layer["kind"],
                        *(layer[key] or "-" for key in ("prune", "quantize", "skipped")),
                    )
                    for layer in model["layers"]
                ],
                indent=2,
            )
        for warning in model.get("warnings", ()):
            _line(f"warning: {warning}", "yellow", indent=2)
    if plan["models"] and plan["problems"]:
        _line("")
    for problem in plan["problems"]:
        _line(f"problem {problem['model']}: {problem['reason']}", "red")
    if not plan["models"] and not plan["problems"]:
        _line("no models")
    if plan.get("requests"):
        told = ", ".join(f"{number} {kind}" for kind, number in plan["requests"].items())
        _line(f"nothing to do: a run asks the storage {sum(plan['requests'].values())} times: {told}")


def print_methods(found: Described) -> None:
    """The method tables; methods that were asked for by name are printed in full."""
    for index, (table, entries) in enumerate(found.items()):
        if index:
            _line("")
        if any("options" in entry for entry in entries):
            for entry in entries:
                _print_method(table, entry)
            continue
        headers = [key for key in entries[0] if key != "paper"]
        _line(table, "bold")
        rows = [tuple(_word(entry[key]) for key in headers) for entry in entries]
        _table([key.replace("_", " ") for key in headers], rows, indent=2)


def print_findings(findings: Sequence[Finding]) -> None:
    """One line per finding: whether it is as it should be, what was looked at, what was seen."""
    for finding in findings:
        mark, style = ("ok", "green") if finding.ok else ("problem", "red")
        _line(f"{mark} {finding.name}: {finding.detail}", style)


def print_leftovers(leftovers: Leftovers, *, deleted: bool) -> None:
    """What is left over, one thing a line; below it what was done with it."""
    found = leftovers.found
    for run in leftovers.busy:
        _line(f"run {run} is under way: what it may be working on is kept")
    if not found:
        _line("nothing is left over")
        return
    rows = [
        (item.what, _leftover_state(item), _or_dash(sized(item.bytes)), item.key, item.why) for item in found
    ]
    _table(("what", "", "bytes", "key", "why"), rows, right=(2,))
    gone = [item for item in found if (item.deleted if deleted else not item.kept)]
    size = sized(sum(item.bytes or 0 for item in gone))
    what = f"{len(gone)} of {len(found)} leftovers, {size}"
    _line(f"{what}: deleted" if deleted else f"{what}: would be deleted with --delete")


def _leftover_state(item: Leftover) -> str:
    return "kept" if item.kept else "deleted" if item.deleted else "unneeded"


def _result_row(model: ModelResult, common: str | None) -> tuple[str, ...]:
    before, after = model.before, model.after
    return (
        model.name,
        model.state,
        _metric(before, after, common),
        _change(before, after, "parameters", counted),
        _change(before, after, "macs", counted),
        _change(before, after, "bytes", sized),
        _ratio(model.compression_ratio),
    )


def _metric(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None, common: str | None) -> str:
    change = _change(before, after, "value", measured)
    name = (before or {}).get("metric")
    return change if common or not name else f"{name} {change}"


def _change(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None, key: str, write: Any) -> str:
    first, second = number(before, key), number(after, key)
    if first is None and second is None:
        return "-"
    left, right = _or_dash(write(first)), _or_dash(write(second))
    unit = right.partition(" ")[2]
    return f"{left.removesuffix(f' {unit}') if unit else left} -> {right}"  # 247 -> 20.2 kB


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{three_digits(value)}x"


def _or_dash(text: str) -> str:
    """ASCII only: what is piped may end in a program with another encoding."""
    return "-" if text == MISSING else text


def _summary(models: Sequence[ModelResult]) -> str:
    text = ", ".join(f"{count} {state}" for state, count in counts(models).items())
    before, after = published_bytes(models)
    return f"{text}; {sized(before)} -> {sized(after)} ({three_digits(before / after)}x)" if after else text


def _planned_row(model: Mapping[str, Any]) -> tuple[str, ...]:
    touched = sum(bool(layer["prune"] or layer["quantize"]) for layer in model["layers"])
    layers = f"{touched} of {len(model['layers'])}" if model["layers"] else "-"
    sizes = (model["source_bytes"], model["read_bytes"], model["quantized_bytes"])
    return (
        model["name"],
        model["kind"],
        model["state"],
        str(model["tasks"]),
        layers,
        *(_or_dash(sized(size)) for size in sizes),
    )


def _forecast_line(forecast: Mapping[str, Any]) -> str:
    return (
        f"reads {sized(forecast['read_bytes'])} in {_counted(forecast['source_ranges'], 'range')}, "
        f"writes {sized(forecast['written_bytes'])} in {_counted(forecast['uploads'], 'part')} "
        f"of {_counted(len(forecast['shards']), 'file')}; {sized(forecast['memory_bytes'])} of memory a task"
        + (
            f"; runs the model in {_counted(forecast['runs'], 'task')}, which read {sized(forecast['run_bytes'])}"
            if forecast.get("runs")
            else ""
        )
    )


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _print_method(table: str, entry: Mapping[str, Any]) -> None:
    _line(f"{entry['name']} ({table})", "bold")
    for key, value in entry.items():
        if key not in ("name", "options"):
            _line(f"{key.replace('_', ' ')}: {_word(value)}", indent=2)
    if entry["options"]:
        _line("options:", indent=2)
        rows = [(option["name"], _word(option["default"]), option["meaning"]) for option in entry["options"]]
        _table(("name", "default", "meaning"), rows, indent=4)


def _word(value: Any) -> str:
    if value is None:
        return "-"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _table(
    headers: Sequence[str], rows: Iterable[Sequence[str]], *, right: Iterable[int] = (), indent: int = 0
) -> None:
    """Columns in spaces; on a terminal cells that do not fit are folded, elsewhere nothing ever is."""
    cells = [[one_line(cell) for cell in row] for row in rows]
    numeric = set(right)
    if sys.stdout.isatty() and len(cells) <= _DRAWN_ROWS:
        _drawn_table(headers, cells, numeric, indent)
    else:
        _plain_table(headers, cells, numeric, indent)


def _plain_table(
    headers: Sequence[str], cells: Sequence[Sequence[str]], numeric: Set[int], indent: int
) -> None:
    from rich.cells import cell_len

    lines = [headers, *cells]
    widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
    for row in lines:
        padded = []
        for index, (cell, width) in enumerate(zip(row, widths, strict=True)):
            space = " " * (width - cell_len(cell))
            padded.append(space + cell if index in numeric else cell + space)
        print((" " * indent + _GAP.join(padded)).rstrip())


def _drawn_table(
    headers: Sequence[str], cells: Sequence[Sequence[str]], numeric: Set[int], indent: int
) -> None:
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table(box=None, pad_edge=False, padding=(0, len(_GAP), 0, 0), header_style="bold")
    for index, header in enumerate(headers):
        table.add_column(header, justify="right" if index in numeric else "left", overflow="fold")
    for row in cells:
        table.add_row(*(Text(cell, _STATE_STYLES.get(cell, "")) for cell in row))
    if numeric:  # names are folded before numbers are
        widths = [max(map(len, column)) + len(_GAP) for column in zip(headers, *cells, strict=True)]
        excess = indent + sum(widths) - console.width
        table.columns[0].max_width = max(_SHORTEST_NAME, widths[0] - len(_GAP) - max(0, excess))
    with console.capture() as captured:
        console.print(Padding(table, (0, 0, 0, indent), expand=False))
    for line in captured.get().splitlines():
        print(line.rstrip())


def _line(text: str, style: str | None = None, indent: int = 0) -> None:
    """One line, however long: a reason that is folded into a column cannot be searched for."""
    text = " " * indent + one_line(text)
    if style is None or not sys.stdout.isatty():
        print(text)
        return
    from rich.console import Console

    Console().print(text, style=style, markup=False, highlight=False, soft_wrap=True)
