"""How weights follow their gradients: optimizers by name, and how the learning rate changes over the steps."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, OneCycleLR


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """`batch_size` counts the samples of a global batch; `lr` None is the optimizer's own default.

    `schedule` names how the learning rate changes (`SCHEDULES`). `distill` is the share of the loss, 0 to 1, that is
    the distance to the teacher's outputs, softened by `distill_temperature` where they are scores of classes.
    """

    epochs: int = 1
    batch_size: int = 64
    optimizer: str = "adamw"
    lr: float | None = None
    weight_decay: float = 0.0
    momentum: float = 0.0
    schedule: str = "constant"
    distill: float = 0.0
    distill_temperature: float = 2.0


Params = Iterable[Tensor] | Iterable[dict[str, object]]


def _adamw(params: Params, options: TrainOptions) -> Optimizer:
    return AdamW(params, lr=_or(options.lr, 1e-3), weight_decay=options.weight_decay)


def _adam(params: Params, options: TrainOptions) -> Optimizer:
    return Adam(params, lr=_or(options.lr, 1e-3), weight_decay=options.weight_decay)


def _sgd(params: Params, options: TrainOptions) -> Optimizer:
    return SGD(params, lr=_or(options.lr, 1e-2), weight_decay=options.weight_decay, momentum=options.momentum)


def _or(lr: float | None, default: float) -> float:
    return default if lr is None else lr


OPTIMIZERS: Mapping[str, Callable[[Params, TrainOptions], Optimizer]] = {
    "adamw": _adamw,
    "adam": _adam,
    "sgd": _sgd,
}


def _constant(optimizer: Optimizer, steps: int) -> LRScheduler:
    return LambdaLR(optimizer, lambda step: 1.0)


def _cosine(optimizer: Optimizer, steps: int) -> LRScheduler:
    return CosineAnnealingLR(optimizer, T_max=max(1, steps))


def _one_cycle(optimizer: Optimizer, steps: int) -> LRScheduler:
    highest = [group["lr"] for group in optimizer.param_groups]
    return OneCycleLR(optimizer, max_lr=highest, total_steps=max(1, steps), cycle_momentum=False)


SCHEDULES: Mapping[str, Callable[[Optimizer, int], LRScheduler]] = {
    "constant": _constant,
    "cosine": _cosine,
    "one_cycle": _one_cycle,
}
"""Schedules over the given number of steps, torch.optim's own: `cosine` falls from lr to 0 (Loshchilov & Hutter 2017,
arXiv:1608.03983, without restarts), `one_cycle` rises from lr / 25 to lr in the first 30 % of the steps and falls to
almost nothing (Smith & Topin 2018, arXiv:1708.07120); momenta stay as they are.
"""
