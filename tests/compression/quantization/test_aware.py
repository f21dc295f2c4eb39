"""The forward pass is that of quantized weights, the backward pass LSQ's, and what comes out keeps its codes."""

import pytest
import torch
from torch import Tensor, nn

from fleetpress.compression.calibration import InputStatistics, WeightStatistics
from fleetpress.compression.errors import MethodError, QuantizationError
from fleetpress.compression.quantization import QUANTIZERS, affine, quantize_weight
from fleetpress.compression.quantization.aware import AwareWeight, QuantizedForward, with_scales
from fleetpress.compression.quantization.weight import to_rows
from fleetpress.compression.scheme import QuantScheme
from fleetpress.compression.training import TrainOptions, train

SCHEMES = {
    "tensor": QuantScheme(num_bits=3, strategy="tensor"),
    "channel": QuantScheme(num_bits=4),
    "asymmetric": QuantScheme(num_bits=4, symmetric=False),
    "groups_with_a_shorter_last": QuantScheme(num_bits=2, strategy="group", group_size=8, symmetric=False),
}


def weight(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def forward(
    value: Tensor, scheme: QuantScheme, method: str = "smallest_error", axis: int = 0
) -> QuantizedForward:
    return QuantizedForward(
        {"w": nn.Parameter(value)}, {"w": AwareWeight(axis=axis, scheme=scheme, method=QUANTIZERS[method])}
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("axis", [0, 1])
def test_what_comes_out_quantizes_to_the_codes_of_the_last_forward(
    scheme: QuantScheme, axis: int, dtype: torch.dtype
) -> None:
    aware = forward(weight(6, 3, 7), scheme, axis=axis)
    with torch.no_grad():
        aware.logarithms["w"] += 0.1  # scales have moved since the start
    seen = to_rows(aware.values()["w"].detach(), axis)
    values, scales = aware.result({"w": dtype})
    again = quantize_weight("w", values["w"], axis, scheme, with_scales(scales["w"]))
    assert values["w"].dtype == again.dtype == dtype
    assert torch.equal(again.dequantize(), values["w"])
    trained = aware.logarithms["w"].detach().exp()
    assert torch.equal(seen, affine.dequantize(again.codes, trained, again.zero_point, scheme))


def test_zero_stays_zero() -> None:
    value = weight(4, 9)
    value[:, ::2] = 0
    for scheme in SCHEMES.values():
        assert (forward(value.clone(), scheme).values()["w"][:, ::2] == 0).all()


def test_gradients_are_those_of_learned_step_size_quantization() -> None:
    # Esser et al. 2020, equations 3 and 5; the logarithm's gradient is the scale's times the scale.
    value, scheme = weight(5, 40), SCHEMES["tensor"]
    aware = forward(value, scheme)
    with torch.no_grad():
        aware.logarithms["w"].fill_(-1.0)
    upstream = torch.randn(5, 40, generator=torch.Generator().manual_seed(1))
    aware.values()["w"].backward(upstream)  # type: ignore[no-untyped-call]
    scale = torch.tensor(-1.0).exp()
    moved = value / scale
    below, above = moved < -4, moved > 3
    inside = ~(below | above)
    assert below.any()
    assert above.any()
    assert torch.equal(aware._params["w"].grad, upstream * inside)
    step = torch.where(inside, moved.round() - moved, torch.where(below, -4.0, 3.0))
    torch.testing.assert_close(aware.logarithms["w"].grad.sum(), (upstream * step).sum() * scale)  # type: ignore[union-attr]


def test_scales_start_where_the_method_puts_them() -> None:
    value = weight(6, 10)
    for method in ("round_to_nearest", "smallest_error"):
        first = forward(value, SCHEMES["channel"], method).logarithms["w"].exp()
        torch.testing.assert_close(first, QUANTIZERS[method].quantize(value, SCHEMES["channel"]).scale)


def test_with_statistics_training_starts_from_the_codes_of_the_method() -> None:
    value, x = weight(6, 40), weight(200, 40) @ weight(40, 40)
    value[:, 3] = 0
    known = WeightStatistics(
        inputs=InputStatistics(
            rows=200,
            total=x.double().sum(0)[None],
            squares=x.double().square().sum(0)[None],
            gram=(x.T @ x)[None, None],
            range=torch.stack([x.min(), x.max()]),
        )
    )
    scheme, method = SCHEMES["tensor"], QUANTIZERS["gptq"]
    coded = AwareWeight(axis=0, scheme=scheme, method=method, statistics=known)
    first = QuantizedForward({"w": nn.Parameter(value.clone())}, {"w": coded}).values()["w"]
    found = quantize_weight("w", value, 0, scheme, method, statistics=known).dequantize()
    assert not torch.equal(found, forward(value, scheme).values()["w"])
    torch.testing.assert_close(first, found.masked_fill(value == 0, 0))
    assert (first[:, 3] == 0).all()


def test_errors_name_the_weight() -> None:
    with pytest.raises(QuantizationError, match="w: "):
        forward(torch.full((2, 2), torch.nan), SCHEMES["tensor"])
    with pytest.raises(MethodError, match="no trained parameter"):
        QuantizedForward(
            {}, {"w": AwareWeight(axis=0, scheme=SCHEMES["tensor"], method=QUANTIZERS["smallest_error"])}
        )
    with pytest.raises(MethodError, match="integer codes"):
        AwareWeight(
            axis=0, scheme=QuantScheme(num_bits=8, type="float"), method=QUANTIZERS["round_to_nearest"]
        )


class Sum(nn.Module):
    """Scores of two inputs added up; `forward` takes both by place or by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Scores [N, 3] of two [N, 6]."""
        return self.head(first + second)  # type: ignore[no-any-return]


def test_training_for_codes_takes_several_inputs_and_keywords() -> None:
    example = {"first": weight(8, 6), "second": weight(8, 6).flip(0)}
    data = {**example, "targets": torch.arange(8) % 3}
    net = Sum().eval()
    exported = [
        torch.export.export(net, tuple(example.values())),
        torch.export.export(net, (), example),
        torch.export.export(net, (example["first"],), {"second": example["second"]}),
    ]
    coded = {
        "head.weight": AwareWeight(axis=0, scheme=SCHEMES["tensor"], method=QUANTIZERS["smallest_error"])
    }
    found = [
        train(
            program, data, TrainOptions(epochs=2, batch_size=8), loss="cross_entropy", seed=0, quantized=coded
        )
        for program in exported
    ]
    for other in found[1:]:
        assert torch.equal(found[0].values["head.weight"], other.values["head.weight"])
    assert len(found[0].values["head.weight"].unique()) <= 8
