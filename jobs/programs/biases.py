"""Biases of quantized layers: those that make good what rounding the weights shifts outputs by, and rounded ones."""

from collections.abc import Collection

from torch import Tensor
from torch.export import ExportedProgram

from fleetpress.compression.calibration import WeightStatistics
from fleetpress.compression.layers import layers, matrices
from fleetpress.compression.program import aliases, tensors, with_tensors
from fleetpress.compression.quantization import QuantizedWeight
from fleetpress.compression.quantization.bias_correction import corrected_bias
from fleetpress.compression.quantization.rounded_biases import rounded
from fleetpress.compression.selection import Layer

from ..handover import Payload, record
from .materials import stored_tensors

CORRECTED = "bias/"  # prefix of corrected biases among a quantize task's tensors


class Biases:
    """The biases of a program's layers under correction; `uncorrected` has the reason for every layer without."""

    def __init__(self, program: ExportedProgram) -> None:
        self._values = tensors(program)
        self._tied = aliases(self._values)
        self._users: dict[str, int] = {}
        for layer in layers(program):
            for bias in layer.biases:
                owner = self._tied.get(bias, bias)
                self._users[owner] = self._users.get(owner, 0) + 1
        self.corrected: dict[str, Tensor] = {}
        self.uncorrected: dict[str, str] = {}

    def correct(
        self, layer: Layer, name: str, quantized: QuantizedWeight, known: WeightStatistics | None
    ) -> None:
        """Correct the bias of a layer for its quantized weight `name`, or note why not."""
        matrix = next(one for one in matrices(layer) if name in one.weights)
        reason = self._unfit(matrix, quantized, known)
        if reason is not None:
            self.uncorrected[layer.name] = reason
            return
        assert known is not None
        (bias,) = matrix.biases
        self.corrected[bias] = corrected_bias(self._values[bias], self._values[name], quantized, known.inputs)

    def _unfit(self, layer: Layer, quantized: QuantizedWeight, known: WeightStatistics | None) -> str | None:
        if known is None:
            return f"inputs of {layer.kind} layers are not observed" if layer.biases else "it has no bias"
        if not layer.biases:
            return "it has no bias"
        (bias,) = layer.biases
        if self._users[self._tied.get(bias, bias)] > 1:
            return f"its bias {bias} is also that of another layer"
        if self._values[bias].shape != (quantized.codes.shape[0],):
            return f"its bias {bias} is no vector of its {quantized.codes.shape[0]} units"
        return None


def corrected_program(payload: Payload, program: ExportedProgram) -> ExportedProgram:
    """The program with the biases that the quantize tasks corrected; nothing is read if the recipe asks for none."""
    if not payload["recipe"].get("quantize", {}).get("bias_correction"):
        return program
    found: dict[str, Tensor] = {}
    for digest in payload["stages"].get("quantize", ()):
        values = stored_tensors(payload, digest)
        found |= {
            name.removeprefix(CORRECTED): value
            for name, value in values.items()
            if name.startswith(CORRECTED)
        }
    return with_tensors(program, found) if found else program


def rounded_program(payload: Payload, program: ExportedProgram, weights: Collection[str]) -> ExportedProgram:
    """The program with the biases of the layers that own `weights` as the recipe's `biases` has them; else as it is."""
    form = payload["recipe"].get("quantize", {}).get("biases")
    if form is None:
        return program
    values = tensors(program)
    tied = aliases(values)
    chosen = {
        tied.get(bias, bias)
        for layer in layers(program)
        if set(layer.weights) & set(weights)
        for bias in layer.biases
    }
    coarse = {owner: rounded(values[owner], form) for owner in chosen}
    # Tied names hold one object, before and after.
    return with_tensors(
        program, {name: coarse[tied.get(name, name)] for name in values if tied.get(name, name) in chosen}
    )


def uncorrected(payload: Payload) -> dict[str, str]:
    """Layers whose bias was to be corrected and was not, with the reason."""
    found: dict[str, str] = {}
    for digest in payload["stages"].get("quantize", ()):
        found |= record(payload, digest).result.get("uncorrected", {})
    return found
