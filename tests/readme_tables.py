"""The generated parts of the README, from the code itself: `python tests/readme_tables.py` writes them anew."""

import ast
import re
from pathlib import Path

from fleetpress.jobs.cli import EXIT_CODES, parser
from fleetpress.jobs.methods import described

README = Path(__file__).parent.parent / "README.md"


def verbs_table() -> str:
    """One row per verb, as `--help` says it."""
    subparsers = next(
        action for action in parser()._actions if action.dest == "==SUPPRESS==" or action.choices
    )
    rows = ["| verb | does |", "|---|---|"]
    for verb in subparsers.choices.values():  # type: ignore[union-attr]
        usage = " ".join(verb.format_usage().removeprefix("usage: fleetpress ").split())
        rows.append(f"| `{usage.replace('[-h] [--json] ', '').replace('|', ' or ')}` | {verb.description} |")
    codes = " ".join(EXIT_CODES.split())
    return "\n".join([*rows, "", f"{codes[0].upper()}{codes[1:]}."])


def methods_table() -> str:
    """One row per method, loss and metric; presets of quantization in rows of their own."""
    rows = ["| kind | name | what it does |", "|---|---|---|"]
    for kind, entries in described().items():
        rows += [
            f"| {kind} | `{entry['name']}` | {entry.get('summary') or _scheme(entry)} |" for entry in entries
        ]
    return "\n".join(rows)


def _scheme(entry: dict[str, object]) -> str:
    groups = f"groups of {entry['group_size']}" if entry["group_size"] else f"per {entry['strategy']}"
    zero = "symmetric" if entry["symmetric"] else "with zero points"
    return f"{entry['num_bits']} bits, {zero}, {groups}: {entry['bits_per_weight']:.3f} bits a weight"


def rooms_table() -> str:
    """One row per package, as its docstring begins."""
    rows = ["| folder | what is in it |", "|---|---|"]
    for top in ("jobs", "storage", "compression"):
        for path in sorted((README.parent / top).rglob("__init__.py")):
            text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            folder = path.parent.relative_to(README.parent).as_posix()
            begins = " ".join(text.split("\n\n")[0].split())
            rows.append(f"| `{folder}/` | {begins} |")
    return "\n".join(rows)


PARTS = {"verbs": verbs_table, "methods": methods_table, "rooms": rooms_table}


def part(text: str, name: str) -> str:
    """What stands between the markers of a generated part."""
    found = re.search(rf"<!-- {name} -->\n(.*?)\n?<!-- /{name} -->", text, re.DOTALL)
    assert found, f"README.md has no part <!-- {name} -->"
    return found[1]


def written(text: str) -> str:
    """The README with every generated part made anew."""
    for name, make in PARTS.items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, _, rest = text.partition(start)
        text = f"{before}{start}{make()}\n{end}{rest.partition(end)[2]}"
    return text


if __name__ == "__main__":
    README.write_text(written(README.read_text(encoding="utf-8")), encoding="utf-8")
