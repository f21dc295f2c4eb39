"""Named arrays and their mini-batches: whether they fit a program, in which order and in which dtype they go in."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.export import ExportedProgram

from fleetpress.compression.errors import DataMismatchError
from fleetpress.compression.outputs import output_node, output_shape
from fleetpress.compression.program import ProgramInput, inputs

Arrays = Mapping[str, Tensor]
"""Arrays by name; the first dimension counts the samples of every one of them."""

TARGETS = "targets"
IGNORED_LABEL = -100


def check_arrays(
    program: ExportedProgram,
    arrays: Arrays,
    needs_targets: bool,
    *,
    loss: str | None = None,
    metric: str | None = None,
) -> None:
    """Raise DataMismatchError when the arrays do not fit the program's inputs, the loss or the metric.

    Whole numbers are welcome where the program takes floating-point ones (pixels as uint8), not the other way round.
    """
    known = inputs(program)
    for item in known:
        _check_input(item, _array_of(item, known, arrays))
        _check_sizes(program, item, _array_of(item, known, arrays))
    used = {item.name: _array_of(item, known, arrays) for item in known}
    if needs_targets:
        if TARGETS not in arrays:
            raise DataMismatchError(
                f"there is no array {TARGETS!r} among {sorted(arrays)}; add it, or leave the loss and the metric out "
                "to compare with the original model's own outputs"
            )
        used[TARGETS] = arrays[TARGETS]
    lengths = {name: len(array) if array.dim() else 0 for name, array in used.items()}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise DataMismatchError(
            f"the arrays differ in their number of samples: {told}; one row per sample is needed"
        )
    if 0 in lengths.values():
        raise DataMismatchError(f"the arrays {sorted(used)} hold no sample; give at least one")
    if needs_targets:
        _check_targets(output_shape(program), arrays[TARGETS], loss, metric)


def check_differentiable(program: ExportedProgram) -> None:
    """Raise DataMismatchError when the program's first output has no gradient: decisions instead of scores."""
    dtype = output_node(program).meta["val"].dtype
    if not dtype.is_floating_point:
        raise DataMismatchError(
            f"the program's first output is {_word(dtype)}, which has no gradient; export the model so that it gives "
            "scores, or leave out steps that train or collect gradients"
        )


def check_rows(outputs: Tensor, expected: Tensor) -> None:
    """Raise DataMismatchError when a batch of outputs has not one row a sample."""
    if len(outputs) != len(expected):
        raise DataMismatchError(
            f"the program gives {len(outputs)} rows for {len(expected)} samples; "
            "its first output needs one row a sample"
        )


def _array_of(item: ProgramInput, known: tuple[ProgramInput, ...], arrays: Arrays) -> Tensor:
    if item.name in arrays:
        return arrays[item.name]
    if len(known) == 1 and "inputs" in arrays:
        return arrays["inputs"]
    wanted = "'inputs'" if len(known) == 1 else ", ".join(repr(one.name) for one in known)
    raise DataMismatchError(
        f"the program's input {item.name!r} is not among the arrays {sorted(arrays)}; name the arrays {wanted}"
    )


def _check_input(item: ProgramInput, array: Tensor) -> None:
    if not item.shape:
        raise DataMismatchError(
            f"the program's input {item.name!r} is a single number; export it with a batch first"
        )
    fits = array.dim() == len(item.shape) and all(
        wanted is None or wanted == got for wanted, got in zip(item.shape[1:], array.shape[1:], strict=True)
    )
    if not fits:
        shape = ", ".join(["samples", *("any" if size is None else str(size) for size in item.shape[1:])])
        raise DataMismatchError(
            f"array {item.name!r} has the shape {tuple(array.shape)}, but the program takes ({shape}); "
            "reshape the data, samples first"
        )
    if not _casts(array.dtype, item.dtype):
        raise DataMismatchError(
            f"array {item.name!r} is {_word(array.dtype)}, but the program takes {_word(item.dtype)}; "
            "store it as whole numbers"
        )


def _check_sizes(program: ExportedProgram, item: ProgramInput, array: Tensor) -> None:
    """Sizes that may change have limits, too: a sequence no longer than the positions that a model knows."""
    value = next(node for node in program.graph.nodes if node.name == item.name).meta["val"]
    for axis, size in enumerate(value.shape):
        limits = program.range_constraints.get(size.node.expr) if isinstance(size, torch.SymInt) else None
        if axis and limits is not None and not limits.lower <= array.shape[axis] <= limits.upper:
            raise DataMismatchError(
                f"array {item.name!r} has the shape {tuple(array.shape)}, but the program takes {limits.lower} to "
                f"{limits.upper} in dimension {axis}; cut or pad the data, or export the program for such sizes"
            )


def _casts(given: torch.dtype, wanted: torch.dtype) -> bool:
    """Whether a cast keeps what the values mean: numbers to wider kinds only (bool, whole, floating, complex)."""
    return torch.can_cast(given, wanted) or (wanted is torch.bool and not given.is_floating_point)


def _check_targets(
    outputs: tuple[int | None, ...], targets: Tensor, loss: str | None, metric: str | None
) -> None:
    if loss == "causal_lm" or metric in ("token_accuracy", "perplexity"):
        _check_tokens(outputs, targets, loss or metric or "")
    elif loss == "cross_entropy" or (metric == "accuracy" and loss is None):
        _check_labels(outputs, targets)
    elif not _same(outputs, tuple(targets.shape)):
        raise DataMismatchError(
            f"targets have the shape {tuple(targets.shape)}, but the program's outputs are {_shape(outputs)}: "
            f"{loss or metric} compares them entry by entry; reshape the targets"
        )


def _check_labels(outputs: tuple[int | None, ...], targets: Tensor) -> None:
    if _same(outputs, tuple(targets.shape)):
        return
    for axis in (1, len(outputs) - 1):
        if len(outputs) > axis > 0 and _same((*outputs[:axis], *outputs[axis + 1 :]), tuple(targets.shape)):
            _check_range(targets, outputs[axis], "targets")
            return
    raise DataMismatchError(
        f"targets have the shape {tuple(targets.shape)}, but the program's outputs are {_shape(outputs)}: "
        "give one whole-number label for each set of class scores, or probabilities in the shape of the outputs"
    )


def _check_tokens(outputs: tuple[int | None, ...], targets: Tensor, name: str) -> None:
    if len(outputs) != 3 or targets.dim() != 2 or not _same(outputs[:2], tuple(targets.shape)):
        raise DataMismatchError(
            f"{name} needs outputs (samples, tokens, vocabulary) and targets (samples, tokens); "
            f"outputs are {_shape(outputs)}, targets {tuple(targets.shape)}"
        )
    _check_range(targets, outputs[2], "target tokens")


def _check_range(labels: Tensor, classes: int | None, what: str) -> None:
    if labels.is_floating_point():
        raise DataMismatchError(
            f"{what} are {_word(labels.dtype)}; class labels are whole numbers: store them as int64"
        )
    # uint8 knows no -100: it would take 156 for it.
    labels = labels.long()
    valid = labels[labels != IGNORED_LABEL]
    if classes is not None and valid.numel():
        low, high = int(valid.min()), int(valid.max())
        if low < 0 or high >= classes:
            raise DataMismatchError(
                f"{what} go from {low} to {high}, but the program gives scores for {classes} classes: "
                f"labels must lie in 0 to {classes - 1} ({IGNORED_LABEL} is ignored)"
            )


def _same(expected: tuple[int | None, ...], given: tuple[int, ...]) -> bool:
    """Whether shapes agree but for the number of samples; (N,) and (N, 1) do."""
    left, right = expected[1:] or (1,), given[1:] or (1,)
    return len(left) == len(right) and all(a is None or a == b for a, b in zip(left, right, strict=True))


def count(arrays: Arrays) -> int:
    """Number of samples."""
    return min(len(array) for array in arrays.values())


def batches_in_order(arrays: Arrays, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """Mini-batches in the order of the arrays; the last one may be smaller."""
    for start in range(0, count(arrays), batch_size):
        yield {name: array[start : start + batch_size] for name, array in arrays.items()}


def evenly(arrays: Arrays, most: int) -> dict[str, Tensor]:
    """At most `most` samples, evenly spread over all: what is sorted by class stays a fair choice."""
    samples = count(arrays)
    if samples <= most:
        return dict(arrays)
    chosen = torch.arange(most) * samples // most
    return {name: array[chosen] for name, array in arrays.items()}


def shuffled_batches(arrays: Arrays, batch_size: int, seed: int, epoch: int) -> Iterator[dict[str, Tensor]]:
    """Mini-batches of all samples in an order that depends on seed and epoch alone; the last one may be smaller."""
    order = torch.randperm(count(arrays), generator=seeded(seed, epoch))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        yield {name: array[chosen] for name, array in arrays.items()}


def seeded(seed: int, number: int) -> torch.Generator:
    """A generator of its own for each (seed, number): streams must not depend on what was drawn before."""
    return torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + number * 0xBF58476D1CE4E5B9) % 2**63)


def padded(batch: Arrays, size: int) -> dict[str, Tensor]:
    """The batch filled up to `size` samples with copies of its last one."""
    return {
        name: torch.cat([array, array[-1:].expand(size - len(array), *array.shape[1:])])
        if len(array) < size
        else array
        for name, array in batch.items()
    }


def cast(program: ExportedProgram, batch: Arrays, *, widen: bool = False) -> dict[str, Tensor]:
    """The batch in the dtypes of the program's inputs; `widen` gives float32 where the program takes less."""
    known = inputs(program)
    result = {TARGETS: batch[TARGETS]} if TARGETS in batch else {}
    for item in known:
        dtype = torch.float32 if widen and item.dtype in (torch.float16, torch.bfloat16) else item.dtype
        result[item.name] = _array_of(item, known, batch).to(
            dtype, copy=True
        )  # a program may write into its inputs
    return result


def _shape(outputs: tuple[int | None, ...]) -> str:
    return "(" + ", ".join(["samples", *("any" if size is None else str(size) for size in outputs[1:])]) + ")"


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
