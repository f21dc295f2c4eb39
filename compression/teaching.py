"""The outputs of a teacher, for trainings that stay near them: computed once where there is room for all of them."""

import torch
from torch import Tensor
from torch.export import ExportedProgram

from fleetpress.compression.batches import Arrays, batches_in_order, count
from fleetpress.compression.device import CPU
from fleetpress.compression.errors import MethodError
from fleetpress.compression.evaluation import Runner
from fleetpress.compression.losses import Loss

TEACHER = "outputs of the teacher"  # among the arrays of a training: no program has an input of such a name
_ROOM = 4  # of the arrays' bytes, the part that the outputs may take


def teacher_runner(
    loss: Loss, teacher: ExportedProgram | None, collect: bool, distill: float, device: torch.device
) -> Runner | None:
    """Who gives the outputs that a training with this loss compares with; None if nobody does.

    Raises MethodError for options that do not go together.
    """
    if loss.needs_targets:
        if distill and teacher is None:
            raise MethodError(
                "distill compares with a teacher's outputs; give the teacher, or leave distill out"
            )
        return Runner(teacher, widen=True, device=device) if distill and teacher is not None else None
    if distill:
        raise MethodError(f"distill has no meaning for the loss {loss.name}, which is distillation alone")
    if teacher is None:
        raise MethodError(
            f"the loss {loss.name} compares with the original model; give it as the teacher, or use targets"
        )
    if collect:
        raise MethodError(
            f"the loss {loss.name} has no gradient at the original weights, so training with it gives no statistics; "
            "collect them at fixed weights (`collect`)"
        )
    return Runner(teacher, widen=True, device=device)


def with_outputs(arrays: Arrays, teacher: Runner, batch_size: int) -> Arrays:
    """The arrays and, under `TEACHER`, the teacher's outputs for all samples, if they take a small part of the room.

    Outputs as large as those of language models are not kept: the arrays then come back as they are.
    """
    found: list[Tensor] = []
    room = sum(array.nbytes for array in arrays.values()) // _ROOM
    with torch.no_grad():
        for batch in batches_in_order(arrays, min(batch_size, teacher.batch_size or batch_size)):
            outputs = teacher.outputs(batch).to(CPU)
            if len(outputs) != count(batch) or outputs[:1].nbytes * count(arrays) > room:
                return arrays
            found.append(outputs)
    return {**arrays, TEACHER: torch.cat(found)}
