"""Options of training steps that need another step, or another option, beside them."""

from collections.abc import Iterator

from fleetpress.compression.scheme import CASTS, LEARNING_METHODS, SCHEMES

from .recipe import (
    FinetuneStep,
    PruneStep,
    QuantizeStep,
    TrainStep,
)

GRADUAL_METHODS = ("magnitude_unstructured",)
"""Pruning methods whose zeros can grow while a program is fine-tuned."""


def check_training(step: TrainStep) -> Iterator[tuple[str, str]]:
    """Of a `train` or `finetune` step: keys without a meaning, and why."""
    if step.momentum and step.optimizer != "sgd":
        yield "momentum", f"has no meaning for {step.optimizer}; delete it, or take optimizer: sgd"
    if step.distill_temperature is not None and step.distill is None:
        yield "distill_temperature", "softens what distill compares; delete it, or add distill, such as 0.5"


def check_finetune(
    finetune: FinetuneStep, quantize: QuantizeStep | None, is_there: bool
) -> Iterator[tuple[str, str]]:
    """Of a `finetune` step beside its `quantize` step (`is_there` if wrong in itself)."""
    yield from check_training(finetune)
    if not finetune.quantization_aware:
        return
    if quantize is None:
        if not is_there:
            what = "trains for the codes of quantize, which is no step here; add quantize, or delete it"
            yield "quantization_aware", what
    elif quantize.method not in LEARNING_METHODS and not _has_integers(quantize.scheme):
        what = f"trains for integer codes or a learned codebook, which {quantize.scheme} does not have; take a scheme "
        yield "quantization_aware", what + "such as W4A16, or method k_means"
    elif quantize.equalize or quantize.bias_correction:
        name = "equalize" if quantize.equalize else "bias_correction"
        what = f"trains for the codes as they are, which {name} would change after it; delete one of them"
        yield "quantization_aware", what


def check_gradual(prune: PruneStep, finetunes: bool) -> Iterator[tuple[str, str]]:
    """Of a `prune` step; `finetunes` says that the recipe has a step in which zeros can grow."""
    if prune.schedule != "gradual":
        for name in ("ramp", "interval"):
            if getattr(prune, name) is not None:
                yield name, "says how zeros grow; delete it, or add schedule: gradual"
        return
    if prune.method not in GRADUAL_METHODS:
        what = f"gradual has no meaning for {prune.method}; delete it, or take {', '.join(GRADUAL_METHODS)}"
        yield "schedule", what
    elif not finetunes:
        yield "schedule", "gradual lets zeros grow during finetune, which is no step here; add finetune"


def _has_integers(scheme: str | None) -> bool:
    return scheme is None or (scheme not in CASTS and SCHEMES[scheme].type == "int")
