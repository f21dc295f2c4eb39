"""What there is to choose from, read off the method tables themselves: names, summaries, papers, options."""

from collections.abc import Iterable
from typing import Any

from .errors import UsageError
from .spec.fields import nearest
from .spec.recipe import (
    FinetuneStep,
    PruneStep,
    QuantizeStep,
    Strict,
)
from .spec.training_checks import GRADUAL_METHODS

Described = dict[str, list[dict[str, Any]]]

_SHAPE = (4096, 4096)  # of the layer that a scheme's bits per weight are given for
_TARGETS = {
    "targets": "layers to work on: names, kinds such as Linear, or re:<pattern>; all that can be, if left out",
    "ignore": "layers to leave alone, named in the same ways",
}
_PRUNE = {
    "sparsity": "share of the units to delete, above 0 and below 1",
    "mean_threshold": "instead of a sparsity: delete units whose gradient_mean is below this and",
    "std_threshold": "whose gradient_std is below this",
    "scope": "layer: the share of every layer; global: of all units together",
    "normalize": "none; mean: scope global compares scores over the mean of their layer's",
    "structure": "kinds of units: channel, head, head_dim, recurrent, normalized; channel and head, if left out",
    "compensate": "none; bias: add the means of deleted units where they were read; least_squares: fit what reads "
    "them; either only in layers where the outputs are nearer with it",
    "schedule": "one_shot; iterative: in rounds of pruning and fine-tuning, much at first and ever less",
    "rounds": "of an iterative schedule; the epochs of finetune are split over them",
    "layers": "single layers of a program by name, with a sparsity of their own, from 0",
    "zeros": "zeros that grow during finetune in what is left: sparsity, scope, ramp, interval, layers, targets",
    **_TARGETS,
}
_GRADUAL = {
    "scope": "layer: the share of every tensor; global: of all weights together (schedule gradual)",
    "schedule": "one_shot: zero before finetune; gradual: zeros grow during finetune (programs)",
    "ramp": "share of the steps of finetune over which zeros grow, with schedule gradual (default 0.5)",
    "interval": "steps of finetune from one growth to the next, with schedule gradual (default 32)",
}
_SCORED = {"normalize": "none; mean: scope global compares scores over the mean of their tensor's"}
_THRESHOLDS = ("mean_threshold", "std_threshold")
_ZERO = {
    "pattern": "N:M, such as 2:4: of every M neighbours in a row the N largest stay",
    "sparsity": "share of every tensor's weights to zero, above 0 and below 1",
    "scope": "layer: the share of every tensor; global: of all together, by one threshold (programs)",
    "layers": "single layers of a program by name, with a sparsity of their own, from 0",
    **_TARGETS,
}
_QUANTIZE = {
    "scheme": "a preset by name; the options below replace parts of it",
    "num_bits": "bits of a code, 2 to 8; of a codebook from 1",
    "symmetric": "true: a scale only; false: also a zero point",
    "group_size": "weights in a row that share a scale; null: one scale per output unit",
    "strategy": "tensor, channel or group: what shares a scale",
    "equalize": "scales that move between layers before: none, activation_aware or cross_layer; programs only",
    "bias_correction": "true: biases make good the mean error of each output; needs calibration data",
    "biases": "BF16 or FP8: biases of programs are rounded to so many digits, which an archive stores in few bytes",
    "layers": "single layers of a program by name, with a scheme, bits or method of their own",
    "format": "layout of integers in a checkpoint: pack-quantized, or int-quantized (8 bits only)",
    **_TARGETS,
}
_FORMATS = {
    "W8A8": "8 bits, inputs too, on integer kernels, of programs",
    "FP8": "8-bit floats (e4m3)",
    "NF4": "16 quantiles of the normal distribution, of programs",
    "MXFP4": "4-bit floats (e2m1) that share exponents (e8m0), of programs",
    "TERNARY": "-1, 0, 1 times a scale, of programs",
    "BINARY": "-1, 1 times a scale, of programs",
}
_TRAIN = {
    "epochs": "passes over the train data",
    "batch_size": "samples in a global batch",
    "lr": "learning rate",
    "weight_decay": "as torch.optim means it",
    "momentum": "as torch.optim means it",
    "schedule": "learning rate over the steps: constant, cosine (falls to 0), one_cycle (rises, then falls)",
    "distill": "share of the loss that is distance to the model before pruning; in train: to the source",
    "distill_temperature": "what softens scores of classes before they are compared, with distill (default 2.0)",
    "quantization_aware": "in finetune: true trains weights for the codes that quantize makes of them, "
    "from those that gptq and the like find",
}


def described(name: str | None = None) -> Described:
    """Every method by table; with a `name` those of that name alone, in full: paper and options too.

    Raises UsageError for an unknown name, with the nearest one.
    """
    tables = _tables()
    if name is None:
        return {table: [_brief(entry) for entry in entries] for table, entries in tables.items()}
    wanted = {
        table: [entry for entry in entries if entry["name"].lower() == name.lower()]
        for table, entries in tables.items()
    }
    found = {table: entries for table, entries in wanted.items() if entries}
    if not found:
        names = {entry["name"] for entries in tables.values() for entry in entries}
        raise UsageError(f"unknown method `{name}`; {nearest(name, names)}")
    return found


def _brief(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key not in ("paper", "options")}


def _tables() -> Described:
    """Full entries. The tables lie behind torch, so they are imported here."""
    from fleetpress.compression.equalization import EQUALIZERS
    from fleetpress.compression.losses import LOSSES
    from fleetpress.compression.metrics import METRICS
    from fleetpress.compression.pruning import PRUNERS
    from fleetpress.compression.quantization import QUANTIZERS
    from fleetpress.compression.sparsity import SPARSIFIERS
    from fleetpress.compression.training import OPTIMIZERS

    return {
        "pruning": [
            {
                "name": name,
                "needs_gradients": method.needs_gradients,
                "needs_inputs": method.needs_inputs,
                "summary": method.summary,
                "paper": method.paper,
                "options": _options(PruneStep, _PRUNE, without=() if method.spread else _THRESHOLDS),
            }
            for name, method in PRUNERS.items()
        ],
        "sparsity": [
            {
                "name": name,
                "needs_gradients": method.needs_gradients,
                "needs_inputs": method.needs_inputs,
                "summary": method.summary,
                "paper": method.paper,
                "options": _options(
                    PruneStep,
                    _ZERO
                    | (_GRADUAL if name in GRADUAL_METHODS else {})
                    | (_SCORED if method.needs_gradients else {}),
                    without=_not_taken(method),
                ),
            }
            for name, method in SPARSIFIERS.items()
        ],
        "quantization": [
            {
                "name": name,
                "needs_inputs": method.needs_inputs,
                "summary": method.summary,
                "paper": method.paper,
                "options": _options(QuantizeStep, _QUANTIZE),
            }
            for name, method in QUANTIZERS.items()
        ],
        "equalization": [
            {
                "name": name,
                "needs_inputs": method.needs_inputs,
                "summary": method.summary,
                "paper": method.paper,
                "options": [],
            }
            for name, method in EQUALIZERS.items()
        ],
        "schemes": _schemes(),
        "losses": [
            {"name": name, "needs_targets": loss.needs_targets, "summary": loss.summary, "options": []}
            for name, loss in LOSSES.items()
        ],
        "metrics": [
            {
                "name": name,
                "better": "higher" if metric.higher_is_better else "lower",
                "compared_with": "targets" if metric.needs == "targets" else "original model",
                "summary": metric.summary,
                "options": [],
            }
            for name, metric in METRICS.items()
        ],
        "optimizers": [
            {
                "name": name,
                "summary": f"torch.optim's, in the steps train and finetune: `optimizer: {name}`",
                "options": _options(FinetuneStep, _TRAIN, without=() if name == "sgd" else ("momentum",)),
            }
            for name in OPTIMIZERS
        ],
    }


def _not_taken(method: Any) -> set[str]:
    """Keys that have no meaning for a method that zeroes weights."""
    untaken = {"pattern", "sparsity"} - set(method.takes) | (set() if method.compares_tensors else {"scope"})
    return untaken | {"layers"} if "sparsity" in untaken else untaken


def _schemes() -> list[dict[str, Any]]:
    """Presets with the bits that a weight really takes in a layer of 4096 x 4096 with 16-bit scales; then casts."""
    from fleetpress.compression.scheme import CASTS, SCHEMES, bits_per_weight

    entries: list[dict[str, Any]] = []
    for name, scheme in SCHEMES.items():
        bits = round(bits_per_weight(scheme, _SHAPE, 16), 4)
        entry = {
            "name": name,
            "type": scheme.type,
            "num_bits": scheme.num_bits,
            "symmetric": scheme.symmetric,
            "strategy": scheme.strategy,
            "group_size": scheme.group_size,
            "bits_per_weight": bits,
            "options": [],
        }
        if name in _FORMATS:
            groups = f"groups of {scheme.group_size}" if scheme.group_size else f"per {scheme.strategy}"
            entry["summary"] = f"{_FORMATS[name]}, {groups}: {bits:.3f} bits a weight"
        entries.append(entry)
    for name, dtype in CASTS.items():
        entries.append(
            {
                "name": name,
                "type": "cast",
                "num_bits": 16,
                "symmetric": None,
                "strategy": None,
                "group_size": None,
                "bits_per_weight": 16.0,
                "options": [],
                "summary": f"a plain cast of checkpoints to {dtype}, without codes and scales: 16 bits a weight",
            }
        )
    return entries


def _options(
    step: type[Strict], meanings: dict[str, str], without: Iterable[str] = ()
) -> list[dict[str, Any]]:
    """A method's keys in a recipe, with their defaults as the recipe has them."""
    left_out = set(without)
    return [
        {"name": key, "default": _default(step, key), "meaning": meaning}
        for key, meaning in meanings.items()
        if key not in left_out
    ]


def _default(step: type[Strict], key: str) -> Any:
    value = step.model_fields[key].default
    return None if value == () else value
