"""What metrics say of a comparison, and when it is a refusal."""

import math

import pytest

from fleetpress.compression.confidence import Difference
from fleetpress.jobs.validation import Quality, drop_facts, refusal


def found(before: float, after: float) -> Difference:
    return Difference(
        before=before,
        after=after,
        drop=before - after,
        standard_error=0.01,
        low=0.0,
        high=math.inf,
        samples=100,
    )


def test_what_json_cannot_say_is_nothing() -> None:
    drop = drop_facts(found(0.9, 0.8))
    assert drop == {"drop": pytest.approx(0.1), "standard_error": 0.01, "low": 0.0, "high": None}
    quality = Quality(metric="perplexity", before=math.inf, after=math.nan, drop=drop, verdict=None)
    before, after = quality.facts()
    assert before == {"metric": "perplexity", "value": None}
    assert after == {"metric": "perplexity", "value": None, "drop": drop}


def test_a_refusal_names_numbers_and_the_remedy() -> None:
    assert refusal("accuracy", found(0.9, 0.895), 0.01, "use more bits") is None
    assert refusal("accuracy", found(0.9, 0.8), "1%", "use more bits") == (
        "accuracy went from 0.9000 to 0.8000, more than max_drop 1% allows; use more bits"
    )
