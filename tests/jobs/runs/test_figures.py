"""Numbers for people: digits, units, directions."""

import math

import pytest

from fleetpress.compression.metrics import METRICS, drop
from fleetpress.jobs.runs.figures import (
    LOWER_IS_BETTER,
    MISSING,
    counted,
    elapsed,
    lost,
    measured,
    one_line,
    share,
    sized,
    three_digits,
)
from fleetpress.jobs.runs.results import (
    ModelResult,
    ModelState,
    number,
    published_bytes,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, MISSING),
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (12_345, "12.3 kB"),
        (9_996, "10.0 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (1_234_567_890, "1.23 GB"),
        (7 * 10**15, "7000 TB"),
    ],
)
def test_bytes(value: float | None, text: str) -> None:
    assert sized(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(84, "84"), (61_706, "61.7k"), (1_204_000_000, "1.20G"), (None, MISSING)]
)
def test_counts(value: float | None, text: str) -> None:
    assert counted(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.98125, "0.9812"),
        (0.0, "0.0000"),
        (0.005555, "0.0056"),
        (0.000123456, "0.000123"),
        (24.31012, "24.310"),
        (123.456, "123.46"),
        (40_321.25, "40321.2"),
        (-0.5, "-0.5000"),
        (math.inf, "inf"),
        (math.nan, "nan"),
        (None, MISSING),
    ],
)
def test_metric_values(value: float | None, text: str) -> None:
    assert measured(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.01234, "0.0123"),
        (0.46, "0.460"),
        (4.1251, "4.13"),
        (12.345, "12.3"),
        (1234.5, "1234"),
        (None, MISSING),
    ],
)
def test_three_digits(value: float | None, text: str) -> None:
    assert three_digits(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.04, "0.0 s"), (83.4, "1 min 23 s"), (7_625, "2 h 07 min")])
def test_elapsed(seconds: float, text: str) -> None:
    assert elapsed(seconds) == text


def test_share() -> None:
    assert (share(0.0825), share(None)) == ("8.2 %", MISSING)


def test_only_a_number_is_a_number() -> None:
    fields = {"a": 1, "b": 0.5, "c": True, "d": "7", "e": None}
    assert [number(fields, key) for key in "abcdef"] == [1, 0.5, None, None, None, None]
    assert number(None, "a") is None


def test_directions_are_those_of_the_metrics() -> None:
    assert {name for name, metric in METRICS.items() if not metric.higher_is_better} == LOWER_IS_BETTER


@pytest.mark.parametrize("metric", METRICS)
def test_what_was_lost_is_what_validation_compares(metric: str) -> None:
    model = ModelResult(
        name="m",
        state="published",
        before={"metric": metric, "value": 0.75},
        after={"metric": metric, "value": 0.5},
    )
    assert lost(model) == drop(metric, 0.75, 0.5) != 0


def test_nothing_is_lost_without_a_metric() -> None:
    assert lost(ModelResult(name="m", state="failed")) is None


def test_only_published_models_save_bytes() -> None:
    def model(state: ModelState) -> ModelResult:
        return ModelResult(name=state, state=state, before={"bytes": 100}, after={"bytes": 10})

    states: tuple[ModelState, ...] = ("published", "unchanged", "rejected", "failed")
    assert published_bytes(map(model, states)) == (200, 20)


def test_foreign_text_cannot_move_the_cursor() -> None:
    assert one_line("a\n  b\x1b[31m\x07 ü") == "a b?[31m? ü"
