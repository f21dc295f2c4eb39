"""A codebook that is trained: its gradients are sums over those who share an entry, and what comes out is stored."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fleetpress.compression.errors import MethodError, QuantizationError
from fleetpress.compression.quantization import QUANTIZERS, quantize_weight
from fleetpress.compression.quantization.aware import AwareWeight, QuantizedForward, with_scales
from fleetpress.compression.quantization.weight import to_rows
from fleetpress.compression.scheme import QuantScheme, resolve

SCHEMES = {
    "without_scales": resolve(num_bits=3, learned=True),
    "one_bit": resolve(num_bits=1, learned=True),
    "channel": resolve(num_bits=2, strategy="channel", learned=True),
    "groups_with_a_shorter_last": resolve(num_bits=3, group_size=8, learned=True),
}


def weight(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def forward(
    value: Tensor, scheme: QuantScheme, axis: int = 0, zeroed: tuple[str, ...] = ()
) -> QuantizedForward:
    aware = AwareWeight(axis=axis, scheme=scheme, method=QUANTIZERS["k_means"])
    return QuantizedForward({"w": nn.Parameter(value)}, {"w": aware}, zeroed)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 1000),
    shape=st.tuples(st.integers(1, 6), st.integers(1, 20)),
    name=st.sampled_from(sorted(SCHEMES)),
    axis=st.integers(0, 1),
)
def test_the_gradient_of_an_entry_is_the_sum_over_its_weights(
    seed: int, shape: tuple[int, int], name: str, axis: int
) -> None:
    aware = forward(weight(*shape, seed=seed), SCHEMES[name], axis)
    shared, upstream = aware.codebooks["w"], weight(*shape, seed=seed + 1)
    start = quantize_weight("w", aware._params["w"].detach(), axis, SCHEMES[name], QUANTIZERS["k_means"])
    assert torch.equal(aware.values()["w"], start.dequantize())
    aware.values()["w"].backward(upstream)  # type: ignore[no-untyped-call]
    found = shared.entries.grad
    assert found is not None
    # What a weight takes of an entry's change: 1, or the scale of its group.
    factors = to_rows(start.dequantize(), axis) / start.codebook[start.codes.long()]  # type: ignore[index]
    rows = to_rows(upstream, axis).double() * (factors if SCHEMES[name].has_scale else 1)
    for entry in range(len(found)):
        wanted = float(rows[start.codes == entry].sum())
        assert float(found[entry]) == pytest.approx(wanted, rel=1e-4, abs=1e-4)
    # Straight through: the weights themselves get what came.
    assert torch.equal(aware._params["w"].grad, upstream)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("axis", [0, 1])
def test_what_comes_out_quantizes_to_itself(scheme: QuantScheme, axis: int, dtype: torch.dtype) -> None:
    aware = forward(weight(6, 3, 7), scheme, axis)
    with torch.no_grad():
        aware.codebooks["w"].entries += 0.3 * weight(1 << scheme.num_bits)  # moved, perhaps past one another
        seen = aware.values()["w"]
    values, scales = aware.result({"w": dtype})
    again = quantize_weight("w", values["w"], axis, scheme, with_scales(scales["w"]))
    assert values["w"].dtype == again.dtype == dtype
    assert torch.equal(again.dequantize(), values["w"])
    entries = scales["w"].entries
    assert entries is not None
    assert torch.equal(entries, entries.sort().values)
    if dtype == torch.float32:
        assert torch.equal(values["w"], seen)
    else:
        torch.testing.assert_close(values["w"].float(), seen, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_zeros_stay_and_those_that_come_find_an_entry(scheme: QuantScheme) -> None:
    value = weight(4, 12)
    value[:, ::2] = 0
    aware = forward(value.clone(), scheme)
    aware.values()["w"].sum().backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        aware.codebooks["w"].entries -= aware.codebooks["w"].entries.grad  # type: ignore[operator]
    assert (aware.values()["w"][:, ::2] == 0).all()
    assert (aware.result({"w": torch.float32})[0]["w"][:, ::2] == 0).all()
    assert 0 in aware.codebooks["w"].entries.tolist()
    later = forward(weight(4, 12), scheme, zeroed=("w",))
    with torch.no_grad():
        later._params["w"][1:3] = 0
    assert (later.values()["w"][1:3] == 0).all()
    assert (later.result({"w": torch.float32})[0]["w"][1:3] == 0).all()


def test_weights_that_move_change_their_codes() -> None:
    aware = forward(weight(4, 12), SCHEMES["without_scales"])
    before = aware.codebooks["w"].codes()
    with torch.no_grad():
        aware._params["w"] += 0.5
    after, entries = aware.codebooks["w"].codes(), aware.codebooks["w"].entries.detach()
    assert (after != before).any()
    apart = (aware._params["w"].detach().unsqueeze(-1) - entries).abs()
    assert torch.equal(after, apart.argmin(-1))
    assert torch.equal(aware.values()["w"].detach(), entries[after])


def test_errors_name_the_weight_and_the_way_out() -> None:
    with pytest.raises(QuantizationError, match="w: "):
        forward(torch.full((2, 2), torch.nan), SCHEMES["without_scales"])
    with pytest.raises(
        MethodError, match="learned codebooks only; take a scheme such as W4A16 or method k_m"
    ):
        AwareWeight(axis=0, scheme=resolve("NF4"), method=QUANTIZERS["round_to_nearest"])
