"""`layers` of the quantize step: single layers with options of their own."""

import pytest
import torch
from torch import nn
from torch.export import export

from fleetpress.compression.errors import TargetError
from fleetpress.jobs.errors import SpecError
from fleetpress.jobs.programs.quantizing import choose
from fleetpress.jobs.spec.fleet_spec import parse_spec
from fleetpress.jobs.spec.schemes import options_of, scheme_of

_SPEC = """
version: 1
name: one
output: out
models: [{{source: net.pt2, recipe: mixed}}]
recipes:
  mixed:
    quantize: {quantize}
"""


def _options(quantize: str) -> dict[str, object]:
    spec = parse_spec(_SPEC.format(quantize=quantize), "spec.yaml")
    return dict(spec.recipes["mixed"].canonical()["quantize"])


def test_a_layer_has_its_own_scheme_and_the_rest_of_the_step() -> None:
    options = _options(
        "{scheme: W4A16, method: smallest_error, layers: {fc1: {num_bits: 8}, fc2: {group_size: 32}}}"
    )
    assert scheme_of(options_of(options, "fc1")) == scheme_of({"num_bits": 8})
    assert scheme_of(options_of(options, "fc2")) == scheme_of({"scheme": "W4A16", "group_size": 32})
    assert scheme_of(options_of(options, "fc3")) == scheme_of({"scheme": "W4A16"})
    assert options_of(options, "fc1")["method"] == "smallest_error"


def test_without_layers_the_canonical_recipe_is_as_ever() -> None:
    assert _options("{scheme: W4A16}") == {"scheme": "W4A16", "method": "round_to_nearest"}


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("{fc1: {bits: 8}}", "layers.fc1.bits"),
        ("{fc1: {num_bits: 9}}", "layers.fc1.num_bits"),
        ("{fc1: {scheme: BF16}}", "layers.fc1: is a plain cast"),
        ("{fc1: {strategy: channel, group_size: 8}}", "layers.fc1: group_size is 8"),
    ],
)
def test_wrong_options_of_a_layer_are_told_with_their_path(layers: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        _options(f"{{scheme: W4A16, layers: {layers}}}")


def test_a_layer_that_the_program_has_not_is_an_error_with_the_nearest_name() -> None:
    program = export(nn.Sequential(nn.Linear(4, 4)), (torch.zeros(1, 4),))
    with pytest.raises(TargetError, match="did you mean '0'"):
        choose(program, {"layers": {"0x": {"num_bits": 8}}})
    assert [layer.name for layer in choose(program, {"layers": {"0": {"num_bits": 8}}}).layers] == ["0"]
