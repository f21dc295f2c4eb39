"""What a program is worth on data: one metric, in eval mode, exact whatever the batch size."""

from collections.abc import Callable

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from fleetpress.compression.batches import (
    TARGETS,
    Arrays,
    batches_in_order,
    cast,
    check_arrays,
    check_rows,
    count,
    padded,
)
from fleetpress.compression.device import CPU, batch_on, to_device
from fleetpress.compression.errors import DataMismatchError, MethodError
from fleetpress.compression.metrics import METRICS
from fleetpress.compression.modes import eval_module, fixed_batch
from fleetpress.compression.outputs import first_output
from fleetpress.compression.program import bind
from fleetpress.compression.smoke import smoke_inputs

__all__ = ["Runner", "evaluate", "smoke_inputs"]


def run(module: Callable[..., object], program: ExportedProgram, values: Arrays) -> Tensor:
    """The first output of the program's `module` for arrays named like its inputs, in its dtypes.

    Raises DataMismatchError where the arrays have the right shapes and the program still cannot work with them.
    """
    args, kwargs = bind(program, values)
    try:
        outputs = first_output(module(*args, **kwargs))
    except IndexError as error:
        raise DataMismatchError(
            f"the program looks up a number of the data that it does not know ({error}); whole-number inputs, such as "
            "tokens, must be smaller than the table they are looked up in"
        ) from None
    except RuntimeError as error:
        if is_about_memory(error):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise DataMismatchError(
            f"the program does not run on the data ({reason}); give it data like those it was exported with"
        ) from error
    if outputs.dim() == 0:
        raise DataMismatchError("the program's first output is a single number; it needs one row a sample")
    return outputs


def is_about_memory(error: RuntimeError) -> bool:
    """Whether torch had no room, which says nothing about program and data."""
    return any(sign in str(error) for sign in ("memory", "allocate"))


class Runner:
    """A program in eval mode over named arrays; batches are padded where it was exported with one batch size.

    Arrays come from the processor's memory; outputs lie on the `device`.
    """

    def __init__(self, program: ExportedProgram, *, widen: bool = False, device: torch.device = CPU) -> None:
        self.program = program
        self.module: fx.GraphModule = eval_module(program, widen=widen)
        self.batch_size = fixed_batch(program)
        self._widen = widen
        self._device = device
        to_device(self.module, device)

    def outputs(self, batch: Arrays) -> Tensor:
        """The program's first output tensor for at most `batch_size` samples."""
        samples = count(batch)
        inputs = cast(
            self.program, {name: array for name, array in batch.items() if name != TARGETS}, widen=self._widen
        )
        if self.batch_size is not None:
            inputs = padded(inputs, self.batch_size)
        return run(self.module, self.program, batch_on(self._device, inputs))[:samples]


def all_outputs(runner: Runner, arrays: Arrays, *, batch_size: int = 64) -> Tensor:
    """The program's first output for all samples, without gradients."""
    with torch.no_grad():
        batches = batches_in_order(arrays, min(batch_size, runner.batch_size or batch_size))
        return torch.cat([runner.outputs(batch) for batch in batches])


def evaluate(
    program: ExportedProgram | Runner,
    arrays: Arrays,
    metric: str,
    *,
    reference: ExportedProgram | Runner | None = None,
    batch_size: int = 64,
) -> float:
    """The metric's value over all samples; `reference` is the original program for `agreement` and `cosine`.

    A runner in place of its program saves building its module again. Raises DataMismatchError when the arrays do not
    fit.
    """
    rule = METRICS[metric]
    if rule.needs == "reference" and reference is None:
        raise MethodError(f"the metric {metric} compares with the original model; give it as the reference")
    runner = _runner(program)
    check_arrays(runner.program, arrays, rule.needs == "targets", metric=metric)
    original = _runner(reference) if rule.needs == "reference" and reference is not None else None
    sizes = [one.batch_size for one in (runner, original) if one is not None and one.batch_size is not None]
    sums = rule.start()
    with torch.no_grad():
        for batch in batches_in_order(arrays, min([batch_size, *sizes])):
            outputs = runner.outputs(batch)
            if original is None:
                expected = batch[TARGETS]
            else:
                expected = outputs if reference is program else original.outputs(batch)
            check_rows(outputs, expected)
            rule.update(sums, outputs, expected)
    return rule.value(sums)


def _runner(program: ExportedProgram | Runner) -> Runner:
    return program if isinstance(program, Runner) else Runner(program)
