"""What is done to a model: the steps of a recipe, in their fixed order, and their one canonical form."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from fleetpress.compression.scheme import DEFAULT_METHOD

from .fields import (
    Count,
    Drop,
    Equalizer,
    NotNegative,
    Optimizer,
    PatternNM,
    Patterns,
    Positive,
    Pruner,
    Quantizer,
    Scheme,
    Share,
    Size,
    Structures,
    mistake,
)
from .yaml_lines import write_yaml

CHANGING_STEPS = ("train", "auto", "prune", "finetune", "quantize")
DEFAULT_FORMAT = "pt2"
TRAINING_STEPS = ("train", "auto", "collect", "finetune", "calibrate")
CHOSEN_STEPS = ("collect", "prune", "finetune", "calibrate", "quantize")  # by `auto`
BUDGETS = ("compression_ratio", "size_bytes", "macs", "latency_ms")


class Strict(BaseModel):
    """A part of the spec: unknown keys and near-miss types are errors, values never change."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


def _none_for(*plain: Any) -> AfterValidator:
    """Values that mean what leaving the key out means are left out: two spellings of a recipe are one recipe."""
    return AfterValidator(lambda value: None if value in plain else value)


def _filled(raw: Any, key: str, needed: bool, default: Any) -> Any:
    """A step as it was written, with a default that has a meaning only beside another key."""
    return {**raw, key: default} if needed and raw.get(key) is None else raw


class TrainStep(Strict):
    """Gradient descent over the train data; `lr` and `weight_decay` as torch.optim means them.

    `distill` is the share of the loss that is the distance to the model before pruning (in `train`: to the source).
    """

    epochs: Count = 1
    batch_size: Count = 64
    optimizer: Optimizer = "adamw"
    lr: Positive = 1e-3
    weight_decay: NotNegative = 0.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    schedule: Annotated[Literal["constant", "cosine", "one_cycle"] | None, _none_for("constant")] = None
    distill: Annotated[Annotated[float, Field(ge=0, le=1)] | None, _none_for(0.0)] = None
    distill_temperature: Positive | None = None

    @model_validator(mode="before")
    @classmethod
    def _softened(cls, raw: Any) -> Any:
        return (
            _filled(raw, "distill_temperature", bool(raw.get("distill")), 2.0)
            if isinstance(raw, dict)
            else raw
        )


class FinetuneStep(TrainStep):
    """Training after pruning; `quantization_aware` trains weights for the codes that `quantize` makes of them."""

    quantization_aware: Annotated[bool | None, _none_for(False)] = None


class CollectStep(Strict):
    """Gradient statistics at fixed weights: one pass over the train data in file order."""

    batch_size: Count = 64


class LayerShare(Strict):
    """How much of one layer goes; 0 leaves it alone."""

    sparsity: Annotated[float, Field(ge=0, lt=1)]


class ZerosStep(Strict):
    """Weights of what is left after units were deleted: the smallest become zero, ever more of them, during `finetune`.

    A share of every tensor, or of all together (scope global), or of single `layers` by name; reached after `ramp` of
    the steps.
    """

    sparsity: Share | None = None
    scope: Literal["layer", "global"] = "layer"
    ramp: Annotated[float, Field(gt=0, le=1)] = 0.5
    interval: Count = 32
    layers: dict[str, LayerShare] = {}
    targets: Patterns = ()
    ignore: Patterns = ()


class PruneStep(Strict):
    """Units of a program to delete: a share (`sparsity`), or those whose gradients stay below both thresholds.

    `structure` names the kinds of units, as `fleetpress methods` tells them; without it channels and whole heads.

    Or weights to zero: a share of every tensor (or of all: scope global), or all but N of M neighbours (`pattern` N:M).
    `compensate` makes up for deleted units in the layers that read them. An `iterative` schedule reaches the sparsity
    in so many `rounds` of pruning and fine-tuning.
    With `schedule: gradual` the zeros grow during `finetune`, over the first `ramp` of its steps.
    `layers` gives single layers of a program, by name, a share of their own; without `sparsity` the others keep all.
    `zeros` grow in what is left after units were deleted.
    """

    method: Pruner = "gradient_stability"
    sparsity: Share | None = None
    pattern: PatternNM | None = None
    mean_threshold: Positive | None = None
    std_threshold: Positive | None = None
    scope: Literal["layer", "global"] = "layer"
    normalize: Literal["none", "mean"] = "none"
    structure: Structures = ()
    compensate: Literal["none", "bias", "least_squares"] = "none"
    schedule: Literal["one_shot", "iterative", "gradual"] = "one_shot"
    rounds: Annotated[int, Field(ge=2, le=100)] | None = None
    ramp: Annotated[float, Field(gt=0, le=1)] | None = None
    interval: Count | None = None
    layers: dict[str, LayerShare] = {}
    zeros: ZerosStep | None = None
    targets: Patterns = ()
    ignore: Patterns = ()

    @model_validator(mode="before")
    @classmethod
    def _growing(cls, raw: Any) -> Any:
        if not isinstance(raw, dict) or raw.get("schedule") != "gradual":
            return raw
        return _filled(_filled(raw, "ramp", True, 0.5), "interval", True, 32)


class LayerScheme(Strict):
    """What a layer has otherwise than the rest of its model; what is not given is as there."""

    scheme: Scheme | None = None
    num_bits: Annotated[int, Field(ge=1, le=8)] | None = None
    symmetric: bool | None = None
    group_size: Count | None = None
    strategy: Literal["tensor", "channel", "group"] | None = None
    method: Quantizer | None = None


class QuantizeStep(Strict):
    """Weights to few-bit codes: a `scheme` by name, or `num_bits`; None means as in the preset of that many bits.

    Codes are integers, 8-bit floats (FP8), or indices into a codebook, which `method` may learn. Schemes of checkpoints
    are also plain casts (BF16, FP16); `format` is the layout of integers there, pack-quantized if it is None. An
    explicit `group_size: null` is read as what it means, `strategy: channel`. `layers` gives single layers of a
    program, by name, options of their own.
    `equalize: none` and `bias_correction: false` are the defaults, written out. `biases` rounds those of the layers.
    """

    scheme: Scheme | None = None
    num_bits: Annotated[int, Field(ge=1, le=8)] | None = None
    symmetric: bool | None = None
    group_size: Count | None = None
    strategy: Literal["tensor", "channel", "group"] | None = None
    method: Quantizer = DEFAULT_METHOD
    equalize: Equalizer | None = None
    bias_correction: bool | None = None
    biases: Literal["BF16", "FP8"] | None = None
    format: Literal["pack-quantized", "int-quantized"] | None = None
    layers: dict[str, LayerScheme] = {}
    targets: Patterns = ()
    ignore: Patterns = ()

    @model_validator(mode="before")
    @classmethod
    def _null_means_per_channel(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and raw.get("group_size", ...) is None and raw.get("strategy") is None:
            return {**raw, "strategy": "channel"}
        return raw

    @model_validator(mode="before")
    @classmethod
    def _no_is_nothing(cls, raw: Any) -> Any:
        """One spelling of what is not asked for, so that it is one recipe with one digest."""
        if not isinstance(raw, dict):
            return raw
        nothing = {"equalize": "none", "bias_correction": False}
        return {key: value for key, value in raw.items() if key not in nothing or value != nothing[key]}


class CalibrateStep(Strict):
    """Statistics of what every layer reads, for methods of `prune` and `quantize` that need them: on so many samples.

    They are taken evenly from all train shards, right before the step that needs them. With `importance: gradients`
    what a layer reads counts as much as it moves the model's outputs, which takes a backward pass.
    """

    samples: Count = 512
    batch_size: Count = 32
    importance: Literal["gradients"] | None = None


class ValidateStep(Strict):
    """How much the metric may get worse: a difference, or as text (`"1%"`) a share of the metric before."""

    max_drop: Drop = 0.01


class AutoStep(Strict):
    """Let fleetpress choose: what to aim for, and within which bounds. Everything else follows from the train data.

    `smallest` and `fastest` keep the metric's drop within `max_drop`; `most_accurate`, which a budget means if no goal
    is named, keeps within that: a `compression_ratio` or `size_bytes` of the stored model, a share of its `macs`, or a
    `latency_ms` of one call.
    `trials` candidates are measured on the train data, cut into `folds`; `epochs` of fine-tuning may be spent on each,
    as many as take about a minute if nothing is said.
    """

    goal: Literal["smallest", "fastest", "most_accurate"] = "smallest"
    max_drop: Drop | None = None
    compression_ratio: Annotated[float, Field(gt=1)] | None = None
    size_bytes: Size | None = None
    macs: Share | None = None
    latency_ms: Positive | None = None
    trials: Count = 16
    folds: Annotated[int, Field(ge=2, le=20)] = 4
    epochs: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _a_budget_tells_the_goal(cls, raw: Any) -> Any:
        given = isinstance(raw, dict) and any(raw.get(name) is not None for name in BUDGETS)
        return {"goal": "most_accurate", **raw} if given else raw


_NEWER = {("prune", "normalize"): "none", ("prune", "compensate"): "none", ("prune", "schedule"): "one_shot"}


def _given(value: Any) -> Any:
    if value is None:
        raise mistake("is empty; write {} for the defaults, or delete the key")
    return value


_GIVEN = BeforeValidator(_given)


class Recipe(Strict):
    """Steps in the order they are done; a step that is None is not done. Validation is always there.

    `format` is the file that a program is published as: a `.pt2`, or entropy-coded as small as it gets (archive).
    """

    train: Annotated[TrainStep | None, _GIVEN] = None
    auto: Annotated[AutoStep | None, _GIVEN] = None
    collect: Annotated[CollectStep | None, _GIVEN] = None
    prune: Annotated[PruneStep | None, _GIVEN] = None
    finetune: Annotated[FinetuneStep | None, _GIVEN] = None
    calibrate: Annotated[CalibrateStep | None, _GIVEN] = None
    quantize: Annotated[QuantizeStep | None, _GIVEN] = None
    validation: Annotated[ValidateStep, _GIVEN] = Field(default=ValidateStep(), alias="validate")
    format: Literal["pt2", "archive"] | None = None

    def canonical(self) -> dict[str, Any]:
        """The steps as plain JSON values, defaults filled in, what is not given left out.

        Equal for two spellings of one recipe; `Recipe.model_validate` of it gives the recipe back. Options that are
        newer than artifacts are left out at their defaults: the digests of older recipes stay what they are.
        """
        steps = self.model_dump(mode="json", by_alias=True, exclude_none=True)
        form = steps.pop("format", DEFAULT_FORMAT)
        if zeros := steps.get("prune", {}).get("zeros"):
            steps["prune"]["zeros"] = {key: value for key, value in zeros.items() if value not in ([], {})}
        found = {
            step: {
                key: value
                for key, value in options.items()
                if value not in ([], {}) and _NEWER.get((step, key), ...) != value
            }
            for step, options in steps.items()
        }
        # What is left out is as good as named: recipes from before there was a choice keep their digests.
        return found if form == DEFAULT_FORMAT else {**found, "format": form}


def is_gradual(recipe: Mapping[str, Any]) -> bool:
    """Whether the zeros of a canonical recipe's `prune` grow during `finetune`, which then does both steps."""
    return bool(recipe.get("prune", {}).get("schedule") == "gradual")


def later_steps(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Options of other steps of a canonical recipe that decide what its `finetune` does, by the step's name."""
    found: dict[str, Any] = {}
    if is_gradual(recipe):
        found["prune"] = recipe["prune"]
    elif "zeros" in recipe.get("prune", {}):
        found["prune"] = recipe["prune"]["zeros"]
    if recipe["finetune"].get("quantization_aware"):
        found["quantize"] = recipe["quantize"]
    return found


def zeroes_weights(recipe: Mapping[str, Any]) -> bool:
    """Whether a canonical recipe zeroes weights, beside deleting units or instead."""
    from fleetpress.compression.sparsity import is_sparsifier

    step = recipe.get("prune", {})
    return "zeros" in step or is_sparsifier(step.get("method", ""))


def recipe_yaml(recipe: Recipe) -> str:
    """The recipe as it is stored beside an artifact; pasted below a name in `recipes` it does the same again."""
    return write_yaml(recipe.canonical())
