"""Train a program, collect its gradient statistics: the same for any number of data-parallel ranks."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.func import functional_call

from fleetpress.compression.batches import (
    TARGETS,
    Arrays,
    batches_in_order,
    cast,
    check_arrays,
    check_differentiable,
    check_rows,
    count,
    seeded,
    shuffled_batches,
)
from fleetpress.compression.collectives import ALONE, Collective, SynchronizedBatchNorm, share_first
from fleetpress.compression.device import CPU, batch_on, deterministic, random_devices, to_device
from fleetpress.compression.distilling import distance
from fleetpress.compression.errors import DataMismatchError, MethodError, TrainingDivergedError
from fleetpress.compression.evaluation import Runner, is_about_memory, run
from fleetpress.compression.gradual import GradualOptions, Zeros
from fleetpress.compression.losses import LOSSES, Loss, sampled_loss
from fleetpress.compression.modes import fixed_batch, state_of, training_module
from fleetpress.compression.optimizers import OPTIMIZERS, SCHEDULES, TrainOptions
from fleetpress.compression.outputs import meaning
from fleetpress.compression.program import aliases, tensors, trainable
from fleetpress.compression.quantization.aware import AwareWeight, QuantizedForward, TrainedScales
from fleetpress.compression.statistics import GradientCollector, GradientStatistics
from fleetpress.compression.teaching import TEACHER, teacher_runner, with_outputs

__all__ = ["OPTIMIZERS", "SCHEDULES", "TrainOptions", "TrainResult", "collect", "train"]

Progress = Callable[[int, int, float], None]
"""Batches done, batches in all, loss of the last one."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """`values`: trained tensors and buffers by state name. `losses`: mean of each epoch. `batch_size`: the one used,
    which is the program's own where it was exported with one that it cannot do without. `masks` (True = kept) and
    `scales` by state name: where weights are zero, and what weights that were trained for their codes quantize with.
    """

    values: dict[str, Tensor]
    statistics: GradientStatistics | None
    losses: list[float]
    batch_size: int
    masks: dict[str, Tensor] = field(default_factory=dict)
    scales: dict[str, TrainedScales] = field(default_factory=dict)


def train(
    program: ExportedProgram,
    arrays: Arrays,
    options: TrainOptions,
    *,
    loss: str,
    seed: int,
    teacher: ExportedProgram | None = None,
    collect: bool = False,
    masks: Mapping[str, Tensor] | None = None,
    products: bool = False,
    recurrent: bool = False,
    weights: bool = False,
    gradual: GradualOptions | None = None,
    quantized: Mapping[str, AwareWeight] | None = None,
    collective: Collective = ALONE,
    progress: Progress | None = None,
    device: torch.device = CPU,
) -> TrainResult:
    """Train in train mode, on the `device`; the program itself stays as it is.

    `teacher` gives the targets of a loss that needs none (`distillation`), and the outputs that `distill` keeps near.
    Weights stay zero where `masks` (bool, by state name) are False, and become zero as `gradual` says; those named in
    `quantized` are trained for their codes, and come out as what their codes mean. Every rank of `collective` takes
    its slice of each global batch, so that summed gradients and batch statistics are those of one process (dropout
    draws differ).
    float16 and bfloat16 weights are trained in float32 and cast back. With `collect` the gradients of every batch are
    counted before its step, with `products` those with the weights, with `recurrent` those of recurrent layers, too,
    with `weights` those of single weights instead.
    Raises TrainingDivergedError for a loss or weight that is not finite, DataMismatchError for arrays that do not fit,
    MethodError for options that do not go together.
    """
    run = _Run(
        program,
        arrays,
        options,
        loss=LOSSES[loss],
        teacher=teacher,
        collect=collect,
        masks=masks or {},
        products=products,
        recurrent=recurrent,
        weights=weights,
        gradual=gradual,
        quantized=quantized or {},
        collective=collective,
        device=device,
    )
    done, losses = 0, []
    with torch.random.fork_rng(devices=random_devices(device)), deterministic(device):
        torch.manual_seed((seed * 1_000_003 + collective.rank) % 2**63)
        for epoch in range(options.epochs):
            total = counted = 0.0
            for index, batch in enumerate(shuffled_batches(run.arrays, run.batch_size, seed, epoch)):
                if count(batch) < run.smallest:
                    break
                value, weight = run.step(batch)
                if not math.isfinite(value):
                    raise _diverged(f"the loss became {value}", epoch, index, run.lr)
                total, counted, done = total + value * weight, counted + weight, done + 1
                if progress is not None:
                    progress(done, run.batches * options.epochs, value)
            losses.append(total / counted if counted else math.nan)
    given = tensors(program)
    coded, scales = run.forward.result({name: value.dtype for name, value in given.items()})
    values = state_of(run.module, program) | coded
    values |= {name: values[owner] for name, owner in aliases(given).items() if owner in coded}
    # Masks may hold infinities from the start; only what became infinite tells of a divergence.
    broken = [
        name for name, value in values.items() if not value.isfinite().all() and given[name].isfinite().all()
    ]
    if broken:
        raise _diverged(
            f"{broken[0]} holds values that are not finite", options.epochs - 1, run.batches - 1, run.lr
        )
    return TrainResult(
        values=values,
        statistics=run.collector.statistics() if run.collector else None,
        losses=losses,
        batch_size=run.batch_size,
        masks={name: mask.cpu() for name, mask in run.zeros.masks.items()},
        scales=scales,
    )


def _diverged(what: str, epoch: int, batch: int, lr: float) -> TrainingDivergedError:
    return TrainingDivergedError(
        f"training diverged: {what} in epoch {epoch + 1}, batch {batch + 1}, with lr {lr:g}; lower lr "
        f"(try {lr / 10:g}), and look for NaN or very large numbers in the data"
    )


class _Run:
    """One rank's module, optimizer and statistics."""

    def __init__(
        self,
        program: ExportedProgram,
        arrays: Arrays,
        options: TrainOptions,
        *,
        loss: Loss,
        teacher: ExportedProgram | None,
        collect: bool,
        masks: Mapping[str, Tensor],
        products: bool,
        recurrent: bool,
        weights: bool,
        gradual: GradualOptions | None,
        quantized: Mapping[str, AwareWeight],
        collective: Collective,
        device: torch.device,
    ) -> None:
        check_arrays(program, arrays, loss.needs_targets, loss=loss.name)
        check_differentiable(program)
        fixed = _whole_batches(program, arrays, collective)
        self.batch_size = fixed or options.batch_size
        self.smallest = fixed or _smallest_batch(program)
        self.batches = _batches(count(arrays), self.batch_size, self.smallest)
        self._program, self._loss, self._collective = program, loss, collective
        self._device = device
        self._options = options
        self._teacher = teacher_runner(loss, teacher, collect, options.distill, device)
        self.arrays = arrays
        if self._teacher is not None and options.epochs > collective.size:
            self.arrays = with_outputs(arrays, self._teacher, self.batch_size)
        self.module = training_module(program)
        self._norms = _synchronize(self.module, collective) if collective.size > 1 else []
        to_device(self.module, device)
        self._params = _parameters(self.module, program)
        if not self._params:
            raise MethodError(
                "the program has no floating-point parameter: there is nothing to train; leave it out"
            )
        steps = self.batches * options.epochs
        self.zeros = Zeros(self._params, masks, gradual, steps)
        self.forward = QuantizedForward(self._params, quantized, self.zeros.masks)
        started = [name for name, weight in quantized.items() if weight.statistics is not None]
        share_first([self._params[name] for name in started], collective)
        share_first([self.forward.leaf(name) for name in started], collective)
        self._leaves = [*self._params.values(), *self.forward.leaves]
        self._optimizer = OPTIMIZERS[options.optimizer](_groups(self._params, self.forward), options)
        self.lr = float(self._optimizer.param_groups[0]["lr"])
        self._schedule = SCHEDULES[options.schedule](self._optimizer, steps)
        self.collector = (
            GradientCollector(program, device, products=products, recurrent=recurrent, weights=weights)
            if collect
            else None
        )

    def step(self, batch: Arrays) -> tuple[float, int]:
        """One optimizer step on a global batch: its mean loss, and the number of samples (or labels) in that mean."""
        mine, empty = _slice(batch, self._collective)
        for norm in self._norms:
            norm.share = 0.0 if empty else 1.0
        total = self._loss.weight(batch[TARGETS]) if self._loss.needs_targets else count(batch)
        inputs = batch_on(self._device, cast(self._program, mine, widen=True))
        outputs = self._outputs(inputs)
        given = self._teacher_outputs(mine) if self._teacher is not None else None
        targets = inputs[TARGETS] if self._loss.needs_targets else given
        assert targets is not None
        check_rows(outputs, targets)
        own = 0 if empty else self._loss.weight(targets)
        value = self._loss.compute(outputs, targets) * (own / max(total, 1))
        if self._loss.needs_targets and given is not None:
            apart = distance(self._loss.name, outputs, given, targets, self._options.distill_temperature)
            share = self._options.distill
            value = (1 - share) * value + share * apart * (0 if empty else count(mine) / count(batch))
        found = _gradients(value, self._leaves)
        reported = value.detach().clone()
        self._collective.sum_([*found, reported])
        gradients = dict(zip(self._params, found, strict=False))
        if self.collector is not None:
            self.collector.update(gradients, self._params)
        for leaf, gradient in zip(self._leaves, found, strict=True):
            leaf.grad = gradient
        result = float(reported)
        if math.isfinite(result):
            self._optimizer.step()
            self._schedule.step()
            self.zeros.after_step()
        return result, total

    def _outputs(self, inputs: Mapping[str, Tensor]) -> Tensor:
        arrays = {name: value for name, value in inputs.items() if name != TARGETS}
        values = self.forward.values()
        if not values:
            return run(self.module, self._program, arrays)
        return run(
            lambda *args, **kwargs: functional_call(self.module, values, args, kwargs), self._program, arrays
        )

    def _teacher_outputs(self, batch: Arrays) -> Tensor:
        assert self._teacher is not None
        if TEACHER in batch:
            return batch[TEACHER].to(self._device)
        with torch.no_grad():
            return self._teacher.outputs(batch)


def _gradients(value: Tensor, parameters: list[Tensor]) -> tuple[Tensor, ...]:
    try:
        return torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
    except RuntimeError as error:
        if is_about_memory(error):
            raise
        reason = str(error).partition(":")[0]
        raise MethodError(
            f"the program has no gradient ({reason}); export the model without changes in place, or leave out steps "
            "that train or collect gradients"
        ) from error


def collect(
    program: ExportedProgram,
    arrays: Arrays,
    batch_size: int,
    *,
    loss: str,
    seed: int,
    first_batch: int = 0,
    products: bool = False,
    recurrent: bool = False,
    weights: bool = False,
    device: torch.device = CPU,
) -> GradientStatistics:
    """Gradient statistics at fixed weights, in eval mode and file order, on the `device`.

    With `products` those of weights and gradients, with `recurrent` those of recurrent layers, too, with `weights`
    those of single weights instead.

    A loss without targets (`distillation`) has no gradient at the original weights: the targets are then drawn from
    the program's own predictions, for each batch by (seed, its number), where `first_batch` is the number of the first
    batch of these arrays in the whole. A program with a fixed batch size uses that one and drops a smaller last batch.
    """
    rule = LOSSES[loss]
    check_arrays(program, arrays, rule.needs_targets, loss=loss)
    check_differentiable(program)
    runner = Runner(program, widen=True, device=device)
    fixed = _whole_batches(program, arrays, ALONE)
    collector = GradientCollector(program, device, products=products, recurrent=recurrent, weights=weights)
    params = _parameters(runner.module, program)
    wanted = {name: params[name] for name in collector.names}
    kind = meaning(program)
    with deterministic(device):
        for index, batch in enumerate(batches_in_order(arrays, fixed or batch_size)):
            if fixed is not None and count(batch) < fixed:
                break
            outputs = runner.outputs(batch)
            targets = batch[TARGETS].to(device) if rule.needs_targets else outputs
            check_rows(outputs, targets)
            value = (
                rule.compute(outputs, targets)
                if rule.needs_targets
                else sampled_loss(outputs.to(CPU), seeded(seed, first_batch + index), meaning=kind)
            )
            if not value.isfinite():
                raise TrainingDivergedError(
                    f"the loss of batch {first_batch + index + 1} is {float(value.detach())} while collecting "
                    "gradient statistics; look for NaN or very large numbers in the data and the weights"
                )
            gradients = _gradients(value, list(wanted.values()))
            collector.update(dict(zip(wanted, gradients, strict=True)), wanted)
    return collector.statistics()


def _whole_batches(program: ExportedProgram, arrays: Arrays, collective: Collective) -> int | None:
    fixed = fixed_batch(program)
    if fixed is not None and collective.size > 1:
        raise MethodError(
            f"the program was exported for batches of exactly {fixed}, which {collective.size} workers cannot share; "
            "export it with a dynamic batch size, or train with workers: 1"
        )
    if fixed is not None and count(arrays) < fixed:
        raise DataMismatchError(
            f"the program was exported for batches of exactly {fixed}, but there are {count(arrays)} samples; "
            "give more, or export it with a dynamic batch size"
        )
    return fixed


def _smallest_batch(program: ExportedProgram) -> int:
    """A single sample has no variance: batch normalization cannot train on what one leaves over at the end."""
    return 2 if any("batch_norm" in str(node.target) for node in program.graph.nodes) else 1


def _batches(samples: int, size: int, smallest: int) -> int:
    return samples // size + (samples % size >= smallest and samples % size > 0)


def _groups(params: Mapping[str, Tensor], forward: QuantizedForward) -> list[dict[str, object]]:
    """Weights as one group, trained scales and codebooks as another: pulling a scale towards 1 is no weight decay."""
    groups: list[dict[str, object]] = [{"params": list(params.values())}]
    if forward.leaves:
        groups.append({"params": forward.leaves, "weight_decay": 0.0})
    return groups


def _parameters(module: fx.GraphModule, program: ExportedProgram) -> dict[str, Tensor]:
    tied = aliases(tensors(program))
    params = dict(module.named_parameters(remove_duplicate=False))
    return {name: params[name].requires_grad_() for name in trainable(program) if name not in tied}


def _slice(batch: Arrays, collective: Collective) -> tuple[dict[str, Tensor], bool]:
    """This rank's share of a global batch; a rank without one gets a copy of the first sample, to count for nothing."""
    samples = count(batch)
    start = samples * collective.rank // collective.size
    stop = samples * (collective.rank + 1) // collective.size
    empty = start == stop
    return {name: array[:1] if empty else array[start:stop] for name, array in batch.items()}, empty


def _synchronize(module: fx.GraphModule, collective: Collective) -> list[SynchronizedBatchNorm]:
    norms = []
    for part in [part for part in module.modules() if isinstance(part, fx.GraphModule)]:
        for node in list(part.graph.nodes):
            if "_native_batch_norm" in str(node.target):
                raise MethodError(
                    f"{node.name} ({node.target}) cannot share its batch statistics; train with workers: 1, or export "
                    "the model without run_decompositions"
                )
            if node.target is torch.ops.aten.batch_norm.default and node.args[5]:
                norm = SynchronizedBatchNorm(collective)
                name = f"synchronized_{node.name}"
                part.add_submodule(name, norm)
                with part.graph.inserting_before(node):
                    x, weight, bias, mean, variance, _, momentum, eps, _ = node.args
                    options = {"weight": weight, "bias": bias, "running_mean": mean, "running_var": variance}
                    options |= {"momentum": momentum, "eps": eps}
                    node.replace_all_uses_with(part.graph.call_module(name, (x,), options))
                part.graph.erase_node(node)
                norms.append(norm)
        part.recompile()
    return norms
