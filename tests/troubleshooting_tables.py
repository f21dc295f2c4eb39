"""The generated parts of docs/troubleshooting.md: `python tests/troubleshooting_tables.py` writes them anew."""

from pathlib import Path

from fleetpress.jobs.cli import EXIT_CODES
from fleetpress.storage import s3_errors

PAGE = Path(__file__).parent.parent / "docs" / "troubleshooting.md"


def exit_codes() -> str:
    """One row per exit code, as `--help` says it."""
    told = " ".join(EXIT_CODES.split()).removeprefix("exit codes: ")
    rows = (entry.partition(" ") for entry in told.split("; "))
    return "\n".join(
        ["| exit code | means |", "|--:|---|", *(f"| {code} | {what} |" for code, _, what in rows)]
    )


def storage() -> str:
    """One row per message about S3: what is wrong, what to do, and the server's own words for it."""
    codes: dict[str, list[str]] = {}
    for code, (_, text) in s3_errors._BY_CODE.items():
        codes.setdefault(text, []).extend([] if code.isdigit() else [code])
    for kinds, (_, text) in s3_errors._BY_TYPE:
        codes.setdefault(text, []).extend([] if len(kinds) > 3 else [kind.__name__ for kind in kinds])
    rows = []
    for text, names in codes.items():
        what, _, remedy = text.partition(": ")
        rows.append(f"| {what} | {remedy} | {', '.join(f'`{name}`' for name in names)} |")
    return "\n".join(["| it says | so | the server or its client said |", "|---|---|---|", *sorted(rows)])


PARTS = {"exit codes": exit_codes, "storage": storage}


def written(text: str) -> str:
    """The page with every generated part made anew."""
    for name, make in PARTS.items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, _, rest = text.partition(start)
        text = f"{before}{start}{make()}\n{end}{rest.partition(end)[2]}"
    return text


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
