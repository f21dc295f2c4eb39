"""Tables as RESULTS.md and docs/ show them."""

from collections.abc import Iterable


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Print a Markdown table, all but the first column to the right."""
    names = list(head)
    print(f"| {' | '.join(names)} |")
    print(f"|---{'|--:' * (len(names) - 1)}|")
    for row in rows:
        print(f"| {' | '.join(row)} |")
