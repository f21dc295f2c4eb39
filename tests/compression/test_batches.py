"""Arrays that do not fit are told with name and remedy; batches come in an order that the seed decides."""

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from fleetpress.compression.batches import batches_in_order, cast, check_arrays, padded, shuffled_batches
from fleetpress.compression.errors import DataMismatchError
from fleetpress.compression.smoke import smoke_inputs


@pytest.fixture(scope="module")
def classifier() -> ExportedProgram:
    """Three classes from five numbers."""
    return torch.export.export(nn.Linear(5, 3), (torch.zeros(2, 5),), dynamic_shapes=({0: Dim.DYNAMIC},))


@pytest.fixture(scope="module")
def language_model() -> ExportedProgram:
    """Seven tokens; batch and length change."""
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7))
    shapes = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},)
    return torch.export.export(model, (torch.zeros(2, 3, dtype=torch.int64),), dynamic_shapes=shapes)


class TwoInputs(nn.Module):
    """Image and mask."""

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        """Masked image."""
        return image * mask


@pytest.fixture(scope="module")
def two_inputs() -> ExportedProgram:
    """A program that takes `image` and a bool `mask`."""
    example = (torch.zeros(2, 4), torch.ones(2, 4, dtype=torch.bool))
    return torch.export.export(TwoInputs(), example, dynamic_shapes=({0: Dim.DYNAMIC}, {0: Dim.DYNAMIC}))


LABELS = torch.zeros(6, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"targets": LABELS}, ["'inputs'", "targets"]),
        ({"inputs": torch.zeros(6, 4), "targets": LABELS}, ["(6, 4)", "(samples, 5)"]),
        ({"inputs": torch.zeros(6), "targets": LABELS}, ["(6,)", "(samples, 5)"]),
        ({"inputs": torch.zeros(6, 5)}, ["'targets'", "add it"]),
        ({"inputs": torch.zeros(5, 5), "targets": LABELS}, ["input has 5", "targets has 6"]),
        ({"inputs": torch.zeros(0, 5), "targets": LABELS[:0]}, ["no sample"]),
        ({"inputs": torch.zeros(6, 5), "targets": LABELS + 3}, ["3 to 3", "3 classes", "0 to 2"]),
        ({"inputs": torch.zeros(6, 5), "targets": LABELS - 1}, ["-1 to -1", "-100 is ignored"]),
        ({"inputs": torch.zeros(6, 5), "targets": LABELS.float()}, ["float32", "int64"]),
        ({"inputs": torch.zeros(6, 5), "targets": torch.zeros(6, 2)}, ["(6, 2)", "(samples, 3)"]),
        ({"inputs": torch.zeros(6, 5, dtype=torch.complex64), "targets": LABELS}, ["complex64", "float32"]),
    ],
    ids=[
        "no_inputs",
        "wrong_size",
        "wrong_dims",
        "no_targets",
        "lengths_differ",
        "empty",
        "label_too_high",
        "label_negative",
        "labels_float",
        "targets_shape",
        "complex",
    ],
)
def test_what_does_not_fit_is_told(
    classifier: ExportedProgram, arrays: dict[str, Tensor], words: list[str]
) -> None:
    with pytest.raises(DataMismatchError) as caught:
        check_arrays(classifier, arrays, True, loss="cross_entropy")
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float64, torch.bool, torch.float16])
def test_numbers_become_the_programs(classifier: ExportedProgram, dtype: torch.dtype) -> None:
    arrays = {"inputs": torch.ones(6, 5).to(dtype), "targets": torch.tensor([0, 1, 2, -100, 0, 1])}
    check_arrays(classifier, arrays, True, loss="cross_entropy")
    ready = cast(classifier, arrays)
    assert ready["input"].dtype is torch.float32
    assert torch.equal(ready["input"], torch.ones(6, 5))


def test_fractions_are_no_tokens(language_model: ExportedProgram) -> None:
    with pytest.raises(DataMismatchError, match="float32, but the program takes int64"):
        check_arrays(language_model, {"inputs": torch.zeros(2, 3)}, False)


def test_tokens_are_checked_against_the_vocabulary(language_model: ExportedProgram) -> None:
    tokens = torch.tensor([[0, 6, -100], [7, 0, 0]])
    with pytest.raises(DataMismatchError, match="0 to 7, but the program gives scores for 7 classes"):
        check_arrays(language_model, {"inputs": tokens.clamp(0), "targets": tokens}, True, loss="causal_lm")
    with pytest.raises(DataMismatchError, match="causal_lm needs outputs"):
        check_arrays(language_model, {"inputs": tokens, "targets": tokens[:, 0]}, True, loss="causal_lm")


def test_several_inputs_are_known_by_name(two_inputs: ExportedProgram) -> None:
    check_arrays(two_inputs, {"image": torch.zeros(3, 4), "mask": torch.ones(3, 4, dtype=torch.int64)}, False)
    with pytest.raises(DataMismatchError, match=r"'mask' is not among .* 'image', 'mask'"):
        check_arrays(two_inputs, {"image": torch.zeros(3, 4)}, False)


@pytest.mark.parametrize("loss", ["mse", "l1", "bce_with_logits"])
def test_distances_want_the_shape_of_the_outputs(classifier: ExportedProgram, loss: str) -> None:
    inputs = torch.zeros(6, 5)
    check_arrays(classifier, {"inputs": inputs, "targets": torch.zeros(6, 3)}, True, loss=loss)
    with pytest.raises(DataMismatchError, match=f"{loss} compares them entry by entry"):
        check_arrays(classifier, {"inputs": inputs, "targets": torch.zeros(6)}, True, loss=loss)


def test_batches_in_order_hold_every_sample_once() -> None:
    batches = list(batches_in_order({"inputs": torch.arange(10), "targets": torch.arange(10) * 2}, 4))
    assert [len(batch["inputs"]) for batch in batches] == [4, 4, 2]
    assert torch.cat([batch["targets"] for batch in batches]).tolist() == list(range(0, 20, 2))


def test_shuffled_batches_hold_every_sample_once_in_an_order_of_their_own() -> None:
    arrays = {"inputs": torch.arange(100), "targets": -torch.arange(100)}

    def order(seed: int, epoch: int) -> list[int]:
        batches = list(shuffled_batches(arrays, 32, seed, epoch))
        assert [len(batch["inputs"]) for batch in batches] == [32, 32, 32, 4]
        assert all(torch.equal(batch["inputs"], -batch["targets"]) for batch in batches)
        return [int(item) for batch in batches for item in batch["inputs"]]

    assert sorted(order(0, 0)) == list(range(100))
    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_padding_repeats_the_last_sample() -> None:
    batch = padded({"inputs": torch.tensor([[1], [2]])}, 4)
    assert batch["inputs"].tolist() == [[1], [2], [2], [2]]


def test_smoke_inputs_fit_the_program(language_model: ExportedProgram, two_inputs: ExportedProgram) -> None:
    tokens = smoke_inputs(language_model, batch=3)
    assert {name: (value.shape, value.dtype) for name, value in tokens.items()} == {
        "input": ((3, 8), torch.int64)
    }
    made = smoke_inputs(two_inputs)
    assert made["mask"].all()
    assert made["image"].shape == (2, 4)
    assert torch.equal(made["image"], smoke_inputs(two_inputs)["image"])
    assert two_inputs.module()(made["image"], made["mask"]).shape == (2, 4)
