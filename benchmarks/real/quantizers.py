"""Every way to quantize a trained net at 8, 4, 3 and 2 bits, ours and peers': what it is worth, and what is lost.

    python benchmarks/real/quantizers.py FOLDER [--nets char-gpt ...] [--peer PYTHON] [--seeds N]
        [--only PATTERN] [--columns PATTERN] [--show]

FOLDER is that of fetch.py. All Linear layers and convolutions are quantized, embeddings are not. Calibrated on data
that the measure never sees (trained.py). With --peer, the interpreter of quantizers_peer.py's environment, peers
quantize the same layers with the same groups from the same data, and are measured by the same code. Numbers are kept
in FOLDER/bits-NET.json: begun again, it goes on.
"""

import time
from collections.abc import Callable
from functools import partial

import peers
import side_by_side
from side_by_side import Case, Way
from torch import Tensor
from torch.export import ExportedProgram

from fleetpress.compression.equalization import EQUALIZERS, equalize
from fleetpress.compression.program import tensors, with_tensors
from fleetpress.compression.quantization import QUANTIZERS, quantize_layer
from fleetpress.compression.quantization.aware import AwareWeight
from fleetpress.compression.quantization.bias_correction import corrected_bias
from fleetpress.compression.quantization.weight import from_rows, predicted_bytes, to_rows
from fleetpress.compression.scheme import resolve
from fleetpress.compression.training import train

SETTINGS = {
    "8 bits": resolve("W8A16"),
    "4 bits": resolve("W4A16", strategy="channel"),
    "4 bits, groups": resolve("W4A16_ASYM"),
    "3 bits, groups": resolve("W3A16_ASYM"),
    "2 bits, groups": resolve("W2A16_ASYM"),
}
Made = tuple[ExportedProgram, float] | str


def naive(case: Case, column: str) -> Made:
    """Symmetric integers, one scale an output channel from its largest weight: the floor of models-data."""
    start = time.process_time()
    largest = 2 ** (SETTINGS[column].num_bits - 1) - 1
    values, made = tensors(case.net.program), {}
    for layer, name in peers.chosen(case):
        rows = to_rows(values[name].detach(), layer.axis)
        scale = rows.abs().amax(1, keepdim=True) / largest
        made[name] = from_rows((rows / scale).round() * scale, tuple(values[name].shape), layer.axis)
    return with_tensors(case.net.program, made), time.process_time() - start


def ours(
    case: Case,
    column: str,
    *,
    method: str,
    equalizer: str | None = None,
    bias_correction: bool = False,
    by_importance: bool = False,
) -> Made:
    """The program with the weights that are read back from their codes."""
    known = case.read(by_importance=by_importance)
    start = time.process_time()
    program, scheme = case.net.program, SETTINGS[column]
    if equalizer:
        schemes = {name: scheme for _, name in peers.chosen(case)}
        found = equalize(program, EQUALIZERS[equalizer], schemes, known)
        program = with_tensors(program, found.tensors)
        known = found.rescaled(case.statistics).weights
    values = tensors(program)
    made: dict[str, Tensor] = {}
    for layer in dict.fromkeys(layer for layer, _ in peers.chosen(case)):
        for name, weight in quantize_layer(layer, values, scheme, QUANTIZERS[method], known).items():
            made[name] = weight.dequantize()
            if bias_correction and layer.biases and name in known:
                bias = layer.biases[0]
                made[bias] = corrected_bias(values[bias], values[name], weight, known[name].inputs)
    return with_tensors(program, made), time.process_time() - start


def tuned(case: Case, column: str) -> Made:
    """From the codes of coordinate descent on, weights and scales are trained for their codes."""
    start = time.process_time()
    begun = ours(case, column, method="coordinate_descent", bias_correction=True)
    assert not isinstance(begun, str)
    scheme, rule, net = SETTINGS[column], QUANTIZERS["smallest_error"], case.net
    coded = {
        name: AwareWeight(axis=layer.axis, scheme=scheme, method=rule) for layer, name in peers.chosen(case)
    }
    options = net.options
    found = train(
        begun[0], net.tuning, options, loss=net.loss, seed=case.seed, teacher=net.program, quantized=coded
    )
    return with_tensors(begun[0], found.values), time.process_time() - start


def by_layers(case: Case, column: str, *, method: str) -> Made:
    """A peer's layers."""
    return peers.by_layers(case, method, SETTINGS[column])


def by_network(case: Case, column: str, *, method: str) -> Made:
    """A peer's network."""
    return peers.by_network(case, method, SETTINGS[column])


def stored_bytes(case: Case, column: str) -> int:
    """Of the quantized layers: codes, scales, zero points."""
    values = tensors(case.net.program)
    return sum(
        predicted_bytes(tuple(values[name].shape), layer.axis, SETTINGS[column], values[name].dtype)
        for layer, name in peers.chosen(case)
    )


def _ways() -> dict[str, Way]:
    ways: dict[str, Way] = {"naive floor": naive}
    for name in ("round_to_nearest", "smallest_error", "half_quadratic", "gptq", "coordinate_descent"):
        ways[f"`{name}`"] = partial(ours, method=name)
    for name in ("gptq", "coordinate_descent"):
        ways[f"`{name}`, by importance"] = partial(ours, method=name, by_importance=True)
    for name in ("round_to_nearest", "coordinate_descent"):
        ways[f"`{name}` + bias"] = partial(ours, method=name, bias_correction=True)
    for name in ("round_to_nearest", "coordinate_descent"):
        ways[f"`{name}` after `activation_aware`"] = partial(ours, method=name, equalizer="activation_aware")
    ways["`learned_rounding`"] = partial(ours, method="learned_rounding")
    ways["`coordinate_descent` + bias, tuned"] = tuned
    layered: dict[str, Callable[..., Made]] = {"gptq": by_layers, "hqq": by_layers, "torchao": by_layers}
    labels = {
        "gptq": "llm-compressor 0.14, GPTQ",
        "hqq": "hqq 0.2.8",
        "torchao": "torchao 0.18, IntxWeightOnly",
    }
    for name, label in labels.items():
        ways[label] = partial(layered[name], method=name)
    ways["llm-compressor 0.14, AWQ"] = partial(by_network, method="awq")
    ways["AutoRound 0.15, layer by layer"] = partial(by_layers, method="autoround")
    ways["AutoRound 0.15, block by block"] = partial(by_network, method="autoround")
    return ways


if __name__ == "__main__":
    side_by_side.run(__doc__, "bits", _ways(), list(SETTINGS), size=stored_bytes)
