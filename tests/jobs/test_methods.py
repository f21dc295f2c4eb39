"""`methods` reads the tables themselves, so it cannot forget one."""

import json
from collections.abc import Mapping

import pytest

from fleetpress.compression.equalization import EQUALIZERS
from fleetpress.compression.losses import LOSSES
from fleetpress.compression.metrics import METRICS
from fleetpress.compression.pruning import PRUNERS
from fleetpress.compression.quantization import QUANTIZERS
from fleetpress.compression.scheme import CASTS, SCHEMES
from fleetpress.compression.sparsity import SPARSIFIERS
from fleetpress.compression.training import OPTIMIZERS
from fleetpress.jobs.errors import UsageError
from fleetpress.jobs.methods import described
from fleetpress.jobs.spec.recipe import (
    FinetuneStep,
    PruneStep,
    QuantizeStep,
)

GRADUAL = ("ramp", "interval")
ROUNDS = ("normalize", "compensate", "rounds", "zeros")
TABLES: dict[str, Mapping[str, object]] = {
    "pruning": PRUNERS,
    "sparsity": SPARSIFIERS,
    "quantization": QUANTIZERS,
    "equalization": EQUALIZERS,
    "schemes": {**SCHEMES, **CASTS},
    "losses": LOSSES,
    "metrics": METRICS,
    "optimizers": OPTIMIZERS,
}
OF_UNITS = (
    "normalize",
    "compensate",
    "schedule",
    "rounds",
    "zeros",
)  # options that only the deletion of units has


def test_every_name_of_every_table() -> None:
    found = {table: [entry["name"] for entry in entries] for table, entries in described().items()}
    assert found == {table: list(names) for table, names in TABLES.items()}


@pytest.mark.parametrize("name", sorted({name for names in TABLES.values() for name in names}))
def test_each_can_be_asked_for(name: str) -> None:
    found = described(name.upper())
    assert set(found) == {table for table, names in TABLES.items() if name in names}
    for (entry,) in found.values():
        assert entry["name"] == name
        assert "options" in entry
    json.dumps(found)


@pytest.mark.parametrize(
    ("name", "step", "besides"),
    [
        ("gradient_stability", PruneStep, {"method", "pattern", *GRADUAL}),
        (
            "magnitude_n_m",
            PruneStep,
            {
                "method",
                "sparsity",
                "mean_threshold",
                "std_threshold",
                "scope",
                "structure",
                "layers",
                *OF_UNITS,
                *GRADUAL,
            },
        ),
        (
            "magnitude_unstructured",
            PruneStep,
            {"method", "pattern", "mean_threshold", "std_threshold", "structure", *ROUNDS},
        ),
        (
            "wanda",
            PruneStep,
            {"method", "mean_threshold", "std_threshold", "scope", "structure", *OF_UNITS, *GRADUAL},
        ),
        (
            "fisher_unstructured",
            PruneStep,
            {"method", "mean_threshold", "std_threshold", "structure", *GRADUAL}
            | set(OF_UNITS) - {"normalize"},
        ),
        ("round_to_nearest", QuantizeStep, {"method"}),
        ("sgd", FinetuneStep, {"optimizer"}),
    ],
)
def test_options_are_those_of_the_recipe(name: str, step: type, besides: set[str]) -> None:
    ((entry,),) = described(name).values()
    fields = step.model_fields  # type: ignore[attr-defined]
    assert {option["name"] for option in entry["options"]} == set(fields) - besides
    for option in entry["options"]:
        assert option["default"] == (
            fields[option["name"]].default if fields[option["name"]].default != () else None
        )


def test_thresholds_belong_to_methods_that_have_a_spread() -> None:
    for name, method in PRUNERS.items():
        ((entry,),) = described(name).values()
        names = {option["name"] for option in entry["options"]}
        assert ("mean_threshold" in names) == (method.spread is not None)
        assert entry["paper"] == method.paper


def test_bits_per_weight_counts_scales_and_zero_points() -> None:
    (entry,) = described("W4A16_ASYM")["schemes"]
    assert entry["bits_per_weight"] == round(4 + (16 + 4) / 128, 4)
    found = {entry["name"]: entry["bits_per_weight"] for entry in described()["schemes"]}
    assert (found["FP8"], found["BF16"], found["FP16"]) == (round(8 + 16 / 4096, 4), 16, 16)


def test_an_unknown_name_is_told_the_nearest() -> None:
    with pytest.raises(UsageError, match="unknown method `magnitud`; did you mean `magnitude`\\?"):
        described("magnitud")
