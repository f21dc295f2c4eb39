"""How far a program's outputs are from what they were, on few samples: what a change costs, measured."""

from collections.abc import Mapping

from torch import Tensor
from torch.export import ExportedProgram

from fleetpress.compression.batches import Arrays, evenly
from fleetpress.compression.cost import sample_macs
from fleetpress.compression.evaluation import Runner, all_outputs
from fleetpress.compression.outputs import meaning
from fleetpress.compression.program import with_tensors
from fleetpress.compression.sensitivity import divergence

_SAMPLES = 64  # that a measurement looks at; of large nets fewer,
_LEAST_SAMPLES = 8
_METERED = 2e10  # as many as take so many multiply-accumulates


class Meter:
    """Measures by how much the outputs of a program diverge when some of its tensors, or its graph, change."""

    def __init__(self, program: ExportedProgram, arrays: Arrays) -> None:
        self._program = program
        fitting = int(_METERED // sample_macs(program, arrays))
        self._samples = evenly(arrays, max(_LEAST_SAMPLES, min(_SAMPLES, fitting)))
        self._before: Tensor | None = None

    def increase(self, changed: Mapping[str, Tensor]) -> float:
        """Mean divergence of a sample's outputs, in the unit of the expected increase; infinite where they are none."""
        return self.increase_of(with_tensors(self._program, changed))

    def increase_of(self, program: ExportedProgram) -> float:
        """The same of another program with these outputs."""
        if self._before is None:
            self._before = self._outputs(self._program)
        return divergence(self._before, self._outputs(program), meaning(self._program))

    def _outputs(self, program: ExportedProgram) -> Tensor:
        return all_outputs(Runner(program), self._samples)
