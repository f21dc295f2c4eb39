"""Run a program over data and look at what its layers see: the statistics of `calibration`, in one pass."""

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.nn import functional

from fleetpress.compression.arguments import arguments
from fleetpress.compression.batches import (
    TARGETS,
    Arrays,
    batches_in_order,
    check_arrays,
    check_differentiable,
    check_rows,
    count,
    seeded,
)
from fleetpress.compression.calibration import (
    NARROW_COLUMNS,
    CalibrationStatistics,
    InputStatistics,
    WeightStatistics,
    block_columns,
)
from fleetpress.compression.convolutions import each, sides
from fleetpress.compression.device import CPU, deterministic
from fleetpress.compression.errors import DataMismatchError, MethodError, TrainingDivergedError
from fleetpress.compression.evaluation import Runner
from fleetpress.compression.input_sums import InputSums
from fleetpress.compression.layers import LAYER_OPS, RECURRENT_OPS, LayerOp
from fleetpress.compression.losses import LOSSES, sampled_loss
from fleetpress.compression.outputs import meaning
from fleetpress.compression.program import aliases, tensors
from fleetpress.compression.recurrent_inputs import read_together, recurrent_inputs

_KINDS = ("Linear", "Conv1d", "Conv2d", "Conv3d")  # beside the recurrent ones
_POSITIONS = (
    256  # of a convolution's outputs, as many a sample are looked at, evenly spread: neighbours are alike
)
_PIECE_ELEMENTS = 1 << 22  # of input rows that are unfolded at a time
_WIDE_BYTES = 512 << 20  # of a program, for the products of all rows longer than NARROW_COLUMNS,
_TIMES = (
    16  # and for those of one weight so many times its own: rows of a convolution are long, its units few
)


def calibrate(
    program: ExportedProgram,
    arrays: Arrays,
    batch_size: int,
    *,
    loss: str | None = None,
    by_importance: bool = False,
    seed: int = 0,
    first_batch: int = 0,
    device: torch.device = CPU,
) -> CalibrationStatistics:
    """Statistics of every weight of Linear, Conv and recurrent layers, in eval mode and file order, on the `device`.

    With a `loss` the squared gradients of the outputs are kept, too: their mean times half the squared change of an
    output estimates what the change adds to the loss (Fisher; Kunstner et al. 2019, arXiv:1905.12558); not of recurrent
    layers, which never show what their weights give. Targets of a loss without any are drawn as in `training.collect`,
    by (seed, number of the batch). `by_importance` an input row counts as much as the squared gradients of what is made
    of it, added over all units that read it: so that an error there weighs what it does to the loss (GuidedQuant, Kim
    et al. 2025, arXiv:2505.07004, with one group a layer). Rows of recurrent layers count alike.

    A program with a fixed batch size uses that one and drops a smaller last batch. Raises DataMismatchError for arrays
    that do not fit, and where a layer reads what is not finite; MethodError for importance without a loss.
    """
    rule = LOSSES[loss] if loss else None
    if by_importance and rule is None:
        raise MethodError("the importance of what layers read is that for a loss; name one")
    check_arrays(program, arrays, rule is not None and rule.needs_targets, loss=loss)
    if rule is not None:
        check_differentiable(program)
    runner = Runner(program, widen=True, device=device)
    size = runner.batch_size or batch_size
    if count(arrays) < size and runner.batch_size is not None:
        raise DataMismatchError(
            f"the program was exported for batches of exactly {size}, but there are {count(arrays)} samples; give more"
        )
    for parameter in runner.module.parameters():
        if rule is not None and parameter.is_floating_point():
            parameter.requires_grad_()  # also of what was frozen: it may be quantized all the same
    taps = _tap(runner.module, program, gradients=rule is not None, by_importance=by_importance)
    kind = meaning(program) if rule is not None else "values"
    samples = 0
    with deterministic(device), torch.set_grad_enabled(rule is not None):
        for index, batch in enumerate(batches_in_order(arrays, size)):
            if runner.batch_size is not None and count(batch) < size:
                break
            outputs = runner.outputs(batch)
            samples += count(batch)
            if rule is None:
                continue
            targets = batch[TARGETS].to(device) if rule.needs_targets else outputs
            check_rows(outputs, targets)
            if rule.needs_targets:
                value = rule.compute(outputs, targets) * rule.weight(targets)
            else:
                mean = sampled_loss(outputs.to(CPU), seeded(seed, first_batch + index), meaning=kind)
                value = mean * _predictions(outputs, drawn=kind != "values")
            if not value.isfinite():
                raise TrainingDivergedError(
                    f"the loss of batch {first_batch + index + 1} is {float(value.detach())} while calibrating; "
                    "look for NaN or very large numbers in the data and the weights"
                )
            _add_gradients(value, taps)
    return CalibrationStatistics(weights=_statistics(taps), samples=samples)


def _predictions(outputs: Tensor, *, drawn: bool) -> int:
    """Over how many terms `sampled_loss` takes its mean: turns it into the negative log-likelihood of all samples."""
    return outputs.numel() // outputs.shape[-1] if drawn else outputs.numel()


@dataclass(kw_only=True)
class _Read:
    """What some weights read: its sums. Where rows do not count alike, each use of them in the batch at hand waits for
    its importance.
    """

    sums: InputSums = field(default_factory=InputSums)
    waits: bool = False
    waiting: dict[int, tuple["_Geometry", Tensor]] = field(default_factory=dict)
    importance: dict[int, Tensor] = field(default_factory=dict)

    def look(self, use: int, geometry: "_Geometry", x: Tensor) -> None:
        """At the input of one use."""
        with torch.no_grad():
            self.sums.add_range(x)
            if self.waits:
                self.waiting[use] = geometry, x.detach()
                return
            for rows in geometry.rows(x.detach()):
                self.sums.add(rows)

    def weigh(self, use: int, gradient: Tensor) -> None:
        """Count one use as much as the gradient of an output that was made of it, on top of others."""
        if use in self.waiting:
            found = self.waiting[use][0].squares(gradient)
            self.importance[use] = self.importance[use] + found if use in self.importance else found

    def add_waiting(self) -> None:
        """What waits, once it has its importance."""
        for use, (geometry, x) in sorted(self.waiting.items()):
            begin = 0
            for rows in geometry.rows(x):
                self.sums.add(rows, self.importance[use][begin : begin + len(rows)])
                begin += len(rows)
        self.waiting.clear()
        self.importance.clear()


@dataclass(kw_only=True)
class _Weight:
    """One weight: what it reads, and the outputs of the batch at hand with their squared gradients."""

    seen: _Read
    axis: int
    outputs: list[Tensor] = field(default_factory=list)
    squares: Tensor | None = None


class _Tap(nn.Module):
    """Shows what passes to a function."""

    def __init__(self, see: Callable[[Tensor], None]) -> None:
        super().__init__()
        self._see = see

    def forward(self, x: Tensor) -> Tensor:
        """The same tensor."""
        self._see(x)
        return x


@dataclass(frozen=True, kw_only=True)
class _Geometry:
    """How an operator makes input rows of its input; everything but convolutions just reads the last dim."""

    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()  # before and after, dim by dim
    dilation: tuple[int, ...] = ()
    groups: int = 1

    def rows(self, x: Tensor) -> Iterator[Tensor]:
        """Input rows [rows, G, columns] of x, in pieces."""
        if not self.kernel:
            yield x.reshape(-1, 1, x.shape[-1])
            return
        dims = len(self.kernel)
        if x.dim() == dims + 1:  # a convolution takes a single sample without a batch dim, too
            x = x.unsqueeze(0)
        x = functional.pad(x, [side for pair in reversed(self.padding) for side in pair]).contiguous()
        reach = [(size - 1) * step for size, step in zip(self.kernel, self.dilation, strict=True)]
        places = [
            (size - far - 1) // stride + 1
            for size, far, stride in zip(x.shape[2:], reach, self.stride, strict=True)
        ]
        by_place = [step * stride for step, stride in zip(x.stride()[2:], self.stride, strict=True)]
        by_entry = [step * apart for step, apart in zip(x.stride()[2:], self.dilation, strict=True)]
        patches = x.as_strided(
            (x.shape[0], *places, x.shape[1], *self.kernel), (x.stride(0), *by_place, x.stride(1), *by_entry)
        )
        chosen = _spread(math.prod(places), _POSITIONS)
        columns = x.shape[1] * math.prod(self.kernel)
        step = max(1, _PIECE_ELEMENTS // max(1, len(chosen) * columns))
        where: list[Any] = [slice(None), *torch.unravel_index(chosen.to(x.device), places)]
        for start in range(0, x.shape[0], step):
            piece = patches[start : start + step][tuple(where)]
            yield piece.reshape(-1, self.groups, columns // self.groups)

    def squares(self, gradient: Tensor) -> Tensor:
        """The squared gradient of what was made of every input row, float64 [rows, G], in the order of `rows`."""
        if not self.kernel:
            return gradient.reshape(-1, 1, gradient.shape[-1]).square().sum(2, dtype=torch.float64)
        if gradient.dim() == len(self.kernel) + 1:
            gradient = gradient.unsqueeze(0)
        by_place = gradient.reshape(len(gradient), self.groups, -1, gradient.shape[2:].numel())
        chosen = _spread(by_place.shape[-1], _POSITIONS).to(gradient.device)
        squares = by_place[..., chosen].square().sum(2, dtype=torch.float64)  # [N, G, places]
        return squares.transpose(1, 2).reshape(-1, self.groups)


def _spread(positions: int, most: int) -> Tensor:
    """At most `most` of so many positions, evenly spread."""
    taken = min(positions, most)
    return torch.arange(taken) * positions // max(1, taken)


def _tap(
    module: fx.GraphModule, program: ExportedProgram, *, gradients: bool, by_importance: bool
) -> dict[str, _Weight]:
    """Put taps in front of (and with `gradients` behind) every operator whose weight is stored; by state name."""
    tied = aliases(tensors(program))
    uses: dict[str, list[tuple[fx.Node, _Geometry, LayerOp]]] = {}
    shapes: dict[str, torch.Size] = {}
    for node in module.graph.nodes:
        op = LAYER_OPS.get(node.target) if node.op == "call_function" else None
        if op is None or op.kind not in _KINDS or len(node.args) <= op.weight:
            continue
        stored = node.args[op.weight]
        if isinstance(stored, fx.Node) and stored.op == "get_attr":
            weight = operator.attrgetter(str(stored.target))(module)
            if isinstance(weight, Tensor) and weight.dim() >= 2:
                name = tied.get(str(stored.target), str(stored.target))
                uses.setdefault(name, []).append((node, _geometry(node, op, weight), op))
                shapes[name] = weight.shape
    wide: dict[tuple[Any, ...], tuple[int, int, int]] = {}
    seen: dict[tuple[Any, ...], _Read] = {}
    found = {}
    for name, mine in uses.items():
        read = tuple((node.args[op.input], geometry) for node, geometry, op in mine)
        if read not in seen:
            seen[read] = _Read(waits=by_importance)
            for use, (node, geometry, op) in enumerate(mine):
                _insert(module, node.args[op.input], node, partial(seen[read].look, use, geometry))
        if (columns := shapes[name][1:].numel()) > NARROW_COLUMNS:
            before = wide[read][2] if read in wide else 0
            wide[read] = columns, mine[0][1].groups, before + shapes[name].numel()
        found[name] = _Weight(seen=seen[read], axis=-1 - len(mine[0][1].kernel))
        if gradients:
            for node, _, _ in mine:
                _insert(module, node, None, found[name].outputs.append)
    for read, (columns, groups, entries) in wide.items():
        # All are in memory at once, so each gets an equal share.
        most = min(_WIDE_BYTES // len(wide), _TIMES * 4 * entries)
        seen[read].sums.size = block_columns(columns, most // groups)
    found |= _tap_recurrent(module, tied)
    module.recompile()
    return found


class _RecurrentTap(nn.Module):
    """Shows what the weights of a recurrent operator read to `seen`, in the order of `read_together`."""

    def __init__(self, op: Callable[..., Any], seen: Sequence[_Read]) -> None:
        super().__init__()
        self._op = op
        self._seen = seen

    def forward(self, x: Tensor, state: Any, parameters: list[Tensor], *options: Any) -> Tensor:
        """The same x."""
        has_biases, num_layers, _dropout, _train, bidirectional, batch_first = options
        with torch.no_grad():
            read = recurrent_inputs(
                self._op,
                x,
                state,
                parameters,
                has_biases=has_biases,
                num_layers=num_layers,
                bidirectional=bidirectional,
                batch_first=batch_first,
            )
            for seen, rows in zip(self._seen, read, strict=True):
                seen.look(0, _Geometry(), rows)
        return x


def _tap_recurrent(module: fx.GraphModule, tied: Mapping[str, str]) -> dict[str, _Weight]:
    """Put a tap in front of every recurrent operator whose weights are stored."""
    seen: dict[tuple[str, ...], _Read] = {}
    found: dict[str, _Weight] = {}
    for node in list(module.graph.nodes):
        stored = node.args[2] if node.op == "call_function" and node.target in RECURRENT_OPS else ()
        if not stored or any(item.op != "get_attr" for item in stored):
            continue
        names = [tied.get(str(item.target), str(item.target)) for item in stored]
        together = [
            tuple(names[place] for place in places)
            for places in read_together(len(names), int(node.args[4]), bool(node.args[7]))
        ]
        read = [seen.setdefault(weights, _Read()) for weights in together]
        module.add_submodule(f"tap_{node.name}", _RecurrentTap(node.target, read))
        with module.graph.inserting_before(node):
            tap = module.graph.call_module(f"tap_{node.name}", node.args)
        node.update_arg(0, tap)
        found |= {
            name: _Weight(seen=mine, axis=-1)
            for weights, mine in zip(together, read, strict=True)
            for name in weights
        }
    return found


def _insert(module: fx.GraphModule, source: Any, user: fx.Node | None, see: Callable[[Tensor], None]) -> None:
    """A tap on what `source` gives to `user`, or to all its users."""
    name = f"tap_{len(list(module.graph.nodes))}"
    module.add_submodule(name, _Tap(see))
    with module.graph.inserting_after(source):
        tap = module.graph.call_module(name, (source,))
    if user is None:
        source.replace_all_uses_with(tap, delete_user_cb=lambda other: other is not tap)
    else:
        user.replace_input_with(source, tap)


def _geometry(node: fx.Node, op: LayerOp, weight: Tensor) -> _Geometry:
    if op.kind == "Linear":
        return _Geometry()
    told, kernel = arguments(node), tuple(weight.shape[2:])
    return _Geometry(
        kernel=kernel,
        stride=each(told["stride"], len(kernel)),
        padding=sides(node, kernel),
        dilation=each(told["dilation"], len(kernel)),
        groups=int(told["groups"]),
    )


def _add_gradients(value: Tensor, taps: dict[str, _Weight]) -> None:
    """Squares of the gradients at all outputs of this batch, unit by unit; and what waits for its importance."""
    outputs = [output for item in taps.values() for output in item.outputs]
    if not outputs:
        return
    gradients = iter(torch.autograd.grad(value, outputs, allow_unused=True, materialize_grads=True))
    for item in taps.values():
        for use, gradient in enumerate(islice(gradients, len(item.outputs))):
            units = gradient.movedim(item.axis, -1).reshape(-1, gradient.shape[item.axis])
            squares = units.square().sum(0, dtype=torch.float64)
            item.squares = squares if item.squares is None else item.squares + squares
            item.seen.weigh(use, gradient)
        item.outputs.clear()
    for item in taps.values():
        item.seen.add_waiting()


def _statistics(taps: dict[str, _Weight]) -> dict[str, WeightStatistics]:
    made: dict[int, InputStatistics | None] = {}
    found = {}
    for name, item in taps.items():
        if id(item.seen) not in made:
            made[id(item.seen)] = item.seen.sums.statistics(name)
        inputs = made[id(item.seen)]
        if inputs is not None:
            squares = None if item.squares is None else item.squares.to(CPU)
            found[name] = WeightStatistics(inputs=inputs, output_squares=squares)
    return found
