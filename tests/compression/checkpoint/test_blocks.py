"""Blocks of a language model told from names, and what a treatment is without data."""

import pytest

from fleetpress.compression.checkpoint.blocks import named_blocks
from fleetpress.compression.checkpoint.data_free import needs_inputs, without_inputs
from fleetpress.compression.scheme import resolve
from fleetpress.compression.treatment import Treatment

SCHEME = resolve("W4A16")


def test_blocks_are_the_list_that_holds_most() -> None:
    shapes = {
        "vision.layers.0.fc.weight": (8, 8),
        "model.layers.0.mlp.experts.0.w1.weight": (64, 64),
        "model.layers.1.mlp.experts.7.w1.weight": (64, 64),
        "model.embed_tokens.weight": (1000, 64),
    }
    blocks = named_blocks(shapes)
    assert blocks is not None
    assert (blocks.path, blocks.count) == ("model.layers.", 2)
    assert [blocks.index_of(name) for name in shapes] == [None, 0, 1, None]
    assert blocks.index_of("model.layers.1.mlp") == 1
    del shapes["model.layers.0.mlp.experts.0.w1.weight"]
    assert named_blocks({**shapes, "model.layers.3.w.weight": (9, 9)}) is None  # 0 is missing
    assert named_blocks({"classifier.weight": (2, 2)}) is None


@pytest.mark.parametrize(
    ("treatment", "instead"),
    [
        (Treatment(scheme=SCHEME, method="gptq"), Treatment(scheme=SCHEME, method="smallest_error")),
        (Treatment(scheme=SCHEME), None),
        (
            Treatment(sparsity=(("method", "wanda"), ("pattern", "2:4"))),
            Treatment(sparsity=(("method", "magnitude_n_m"), ("pattern", "2:4"))),
        ),
        (
            Treatment(sparsity=(("method", "sparsegpt"), ("sparsity", 0.5)), scheme=SCHEME),
            Treatment(sparsity=(("method", "magnitude_unstructured"), ("sparsity", 0.5)), scheme=SCHEME),
        ),
        (Treatment(sparsity=(("method", "magnitude_unstructured"), ("sparsity", 0.5))), None),
    ],
)
def test_what_takes_the_place_of_a_method_that_needs_data(
    treatment: Treatment, instead: Treatment | None
) -> None:
    assert needs_inputs(treatment) == (instead is not None)
    assert without_inputs(treatment) == (instead or treatment)
