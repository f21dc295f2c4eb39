"""What is done to a model: the steps of a recipe, in their fixed order, and their one canonical form."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from fleetpress.compression.scheme import DEFAULT_METHOD

from .spec_fields import (
    Count,
    Drop,
    NotNegative,
    Optimizer,
    PatternNM,
    Patterns,
    Positive,
    Pruner,
    Quantizer,
    Scheme,
    Share,
    mistake,
)
from .spec_lines import write_yaml

CHANGING_STEPS = ("train", "prune", "finetune", "quantize")
DEFAULT_FORMAT = "pt2"
TRAINING_STEPS = ("train", "collect", "finetune")


class Strict(BaseModel):
    """A part of the spec: unknown keys and near-miss types are errors, values never change."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class TrainStep(Strict):
    """Gradient descent over the train data; `lr` and `weight_decay` as torch.optim means them."""

    epochs: Count = 1
    batch_size: Count = 64
    optimizer: Optimizer = "adamw"
    lr: Positive = 1e-3
    weight_decay: NotNegative = 0.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0


class CollectStep(Strict):
    """Gradient statistics at fixed weights: one pass over the train data in file order."""

    batch_size: Count = 64


class PruneStep(Strict):
    """Units of a program to delete: a share (`sparsity`), or those whose gradients stay below both thresholds.

    Or weights of a checkpoint to zero: a share of every tensor, or all but N of M neighbours (`pattern` N:M).
    """

    method: Pruner = "gradient_stability"
    sparsity: Share | None = None
    pattern: PatternNM | None = None
    mean_threshold: Positive | None = None
    std_threshold: Positive | None = None
    scope: Literal["layer", "global"] = "layer"
    targets: Patterns = ()
    ignore: Patterns = ()


class QuantizeStep(Strict):
    """Weights to few-bit integers: a `scheme` by name, or `num_bits`; None means as in the preset of that many bits.

    Schemes of checkpoints are also 8-bit floats (FP8) and plain casts (BF16, FP16); `format` is the layout of integers
    there, pack-quantized if it is None. An explicit `group_size: null` is read as what it means, `strategy: channel`.
    """

    scheme: Scheme | None = None
    num_bits: Annotated[int, Field(ge=2, le=8)] | None = None
    symmetric: bool | None = None
    group_size: Count | None = None
    strategy: Literal["tensor", "channel", "group"] | None = None
    method: Quantizer = DEFAULT_METHOD
    format: Literal["pack-quantized", "int-quantized"] | None = None
    targets: Patterns = ()
    ignore: Patterns = ()

    @model_validator(mode="before")
    @classmethod
    def _null_means_per_channel(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and raw.get("group_size", ...) is None and raw.get("strategy") is None:
            return {**raw, "strategy": "channel"}
        return raw


class ValidateStep(Strict):
    """How much the metric may get worse: a difference, or as text (`"1%"`) a share of the metric before."""

    max_drop: Drop = 0.01


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
    collect: Annotated[CollectStep | None, _GIVEN] = None
    prune: Annotated[PruneStep | None, _GIVEN] = None
    finetune: Annotated[TrainStep | None, _GIVEN] = None
    quantize: Annotated[QuantizeStep | None, _GIVEN] = None
    validation: Annotated[ValidateStep, _GIVEN] = Field(default=ValidateStep(), alias="validate")
    format: Literal["pt2", "archive"] | None = None

    def canonical(self) -> dict[str, Any]:
        """The steps as plain JSON values, defaults filled in, what is not given left out.

        Equal for two spellings of one recipe; `Recipe.model_validate` of it gives the recipe back.
        """
        steps = self.model_dump(mode="json", by_alias=True, exclude_none=True)
        form = steps.pop("format", DEFAULT_FORMAT)
        found = {
            step: {key: value for key, value in options.items() if value != []}
            for step, options in steps.items()
        }
        # What is left out is as good as named: recipes from before there was a choice keep their digests.
        return found if form == DEFAULT_FORMAT else {**found, "format": form}


def recipe_yaml(recipe: Recipe) -> str:
    """The recipe as it is stored beside an artifact; pasted below a name in `recipes` it does the same again."""
    return write_yaml(recipe.canonical())
