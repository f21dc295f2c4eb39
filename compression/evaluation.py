"""What a program is worth on data: one metric, in eval mode, exact whatever the batch size."""

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from fleetpress.compression.batches import (
    TARGETS,
    Arrays,
    batches_in_order,
    cast,
    check_arrays,
    count,
    lookups_checked,
    padded,
)
from fleetpress.compression.errors import DataMismatchError, MethodError
from fleetpress.compression.metrics import METRICS
from fleetpress.compression.modes import eval_module, fixed_batch
from fleetpress.compression.outputs import first_output
from fleetpress.compression.program import bind
from fleetpress.compression.smoke import smoke_inputs

__all__ = ["Runner", "evaluate", "smoke_inputs"]


class Runner:
    """A program in eval mode over named arrays; batches are padded where it was exported with one batch size."""

    def __init__(self, program: ExportedProgram, *, widen: bool = False) -> None:
        self.program = program
        self.module: fx.GraphModule = eval_module(program, widen=widen)
        self.batch_size = fixed_batch(program)
        self._widen = widen

    def outputs(self, batch: Arrays) -> Tensor:
        """The program's first output tensor for at most `batch_size` samples."""
        samples = count(batch)
        inputs = cast(
            self.program, {name: array for name, array in batch.items() if name != TARGETS}, widen=self._widen
        )
        if self.batch_size is not None:
            inputs = padded(inputs, self.batch_size)
        args, kwargs = bind(self.program, inputs)
        with lookups_checked():
            return first_output(self.module(*args, **kwargs))[:samples]


def evaluate(
    program: ExportedProgram,
    arrays: Arrays,
    metric: str,
    *,
    reference: ExportedProgram | None = None,
    batch_size: int = 64,
) -> float:
    """The metric's value over all samples; `reference` is the original program for `agreement` and `cosine`.

    Raises DataMismatchError when the arrays do not fit.
    """
    rule = METRICS[metric]
    if rule.needs == "reference" and reference is None:
        raise MethodError(f"the metric {metric} compares with the original model; give it as the reference")
    check_arrays(program, arrays, rule.needs == "targets", metric=metric)
    runner = Runner(program)
    original = Runner(reference) if rule.needs == "reference" and reference is not None else None
    sizes = [one.batch_size for one in (runner, original) if one is not None and one.batch_size is not None]
    sums = rule.start()
    with torch.no_grad():
        for batch in batches_in_order(arrays, min([batch_size, *sizes])):
            outputs = runner.outputs(batch)
            expected = batch[TARGETS] if original is None else original.outputs(batch)
            if len(outputs) != len(expected):
                raise DataMismatchError(
                    f"the program gives {len(outputs)} rows for {count(batch)} samples; "
                    "its first output needs one row a sample"
                )
            rule.update(sums, outputs, expected)
    return rule.value(sums)
