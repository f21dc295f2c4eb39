"""Equalization: scales that move between layers before quantization and leave the program's outputs as they are."""

from collections.abc import Mapping

from torch.export import ExportedProgram

from fleetpress.compression.calibration import WeightStatistics
from fleetpress.compression.equalization import activation_aware, cross_layer
from fleetpress.compression.equalization.method import EqualizeContext, EqualizeMethod
from fleetpress.compression.equalization.pairs import places
from fleetpress.compression.equalization.scaling import Equalization
from fleetpress.compression.layers import layers
from fleetpress.compression.program import tensors
from fleetpress.compression.scheme import QuantScheme

__all__ = ["EQUALIZERS", "Equalization", "EqualizeMethod", "equalize"]

EQUALIZERS: dict[str, EqualizeMethod] = {
    "activation_aware": activation_aware.METHOD,
    "cross_layer": cross_layer.METHOD,
}


def equalize(
    program: ExportedProgram,
    method: EqualizeMethod,
    quantized: Mapping[str, QuantScheme],
    statistics: Mapping[str, WeightStatistics] | None = None,
) -> Equalization:
    """Tensors under which the program computes what it did, and its weights lose less in the schemes of `quantized`.

    `statistics` are those of the program as it is, by weight. A program without any place keeps all its tensors.
    """
    context = EqualizeContext(
        values=tensors(program),
        places=places(program),
        quantized=quantized,
        axes={name: layer.axis for layer in layers(program) for name in layer.weights},
        statistics=statistics or {},
    )
    return method.equalize(context)
