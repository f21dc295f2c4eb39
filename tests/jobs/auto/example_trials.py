"""Trials of one family, told by what they lost and what they cost."""

from collections.abc import Iterable

from fleetpress.jobs.auto.measured import Goal, Measured

SMALLEST = Goal(goal="smallest", cost="bytes", limit=0.01)


def trials(drops_and_bytes: Iterable[tuple[float, float]], family: str = "quantize") -> list[Measured]:
    """Such trials, in which x is a thousandth of the bytes."""
    return [
        Measured(
            digest=f"{family}-{index}",
            family=family,  # type: ignore[arg-type]
            x=cost / 1000,
            recipe={},
            before=0.9,
            after=0.9 - drop,
            drop=drop,
            standard_error=0.001,
            costs={"bytes": cost},
        )
        for index, (drop, cost) in enumerate(drops_and_bytes)
    ]


def told(some: Iterable[Measured]) -> list[tuple[float, float]]:
    """The drops and bytes again."""
    return [(trial.drop, trial.costs["bytes"]) for trial in some]
