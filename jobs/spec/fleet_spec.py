"""The spec: which models, with which data and recipes, to where. Strict; every problem of a file is told at once."""

import os
import re
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, PrivateAttr, model_validator

from fleetpress.storage.errors import InvalidUri, ObjectNotFound
from fleetpress.storage.near_misses import hint
from fleetpress.storage.sources import KIND_BY_SUFFIX
from fleetpress.storage.store import open_store
from fleetpress.storage.uri import is_s3, split

from ..errors import SpecError
from ..executors import TASK_SECONDS
from .checks import (
    check,
    collects,
    needs_inputs,
    observes,
)
from .fields import (
    Count,
    Drop,
    Duration,
    Factory,
    Key,
    Loss,
    Memory,
    Metric,
    Output,
    Place,
    Places,
    Shape,
    Size,
    Word,
    mistake,
    tuple_of,
)
from .messages import understood
from .recipe import (
    CalibrateStep,
    CollectStep,
    Recipe,
    Strict,
    ValidateStep,
)
from .yaml_lines import read_yaml

_MOST_BYTES = 16 << 20  # a hundred thousand models, one by one; a minute to read
_USERINFO = re.compile(r"(?<=://)[^/\s]*@")  # of any address, in comments too


class InputSpec(Strict):
    """An example input of a module: its shape (the word `batch` for a free batch size) and dtype."""

    shape: Shape
    dtype: Literal["float32", "float64", "float16", "bfloat16", "int64", "int32", "bool"] = "float32"


class ModelSpec(Strict):
    """One model, or every match of a source pattern; without `name` a model is named by its folder."""

    name: Key | None = None
    source: Place
    data: Word | None = None
    recipe: Word
    factory: Factory | None = None
    inputs: dict[str, InputSpec] | None = None


class DataSpec(Strict):
    """Shards to train and to evaluate on; without `loss` and `metric` they follow from the targets."""

    train: Places | None = None
    eval: Places | None = None
    loss: Loss | None = None
    metric: Metric | None = None


class Resources(Strict):
    """What one task may use: data-parallel training workers, bytes of memory, and (on Ray) time and GPUs."""

    workers: Count = 1
    memory_per_task_bytes: Memory = Field(default=2 * 2**30, alias="memory_per_task")
    time_per_task_seconds: Duration = Field(default=TASK_SECONDS, alias="time_per_task")
    gpus_per_task: Annotated[float, Field(ge=0, le=1)] = (
        0.0  # more than one would idle: a task computes on one
    )


class FleetBudget(Strict):
    """What all models with `auto` together may take, or lose on average; one of the two."""

    total_bytes: Size | None = None
    max_mean_drop: Drop | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.total_bytes is None) == (self.max_mean_drop is None):
            raise mistake("give either total_bytes or max_mean_drop")
        return self


class Spec(Strict):
    """A whole fleet job, checked: every name in it leads somewhere."""

    version: Literal[1]
    name: Key
    output: Output
    models: Annotated[tuple[ModelSpec, ...], BeforeValidator(tuple_of), Field(min_length=1)]
    data: dict[str, DataSpec] = {}
    recipes: dict[str, Recipe]
    fleet: FleetBudget | None = None
    resources: Resources = Resources()
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    _text: str | None = PrivateAttr(default=None)

    @property
    def text(self) -> str | None:
        """The YAML that it was read from, as a run keeps it: without passwords in addresses. None if it was built."""
        return self._text


def load_spec(path: str) -> Spec:
    """The spec in a file or at an `s3://` uri. Raises SpecError; StorageError when the store cannot be read."""
    return parse_spec(read_spec(path), path)


def read_spec(path: str) -> str:
    """The text of a spec, unchecked. Raises as `load_spec`."""
    try:
        return _read(path).decode("utf-8-sig")
    except OSError as error:
        what = f"{path}: cannot be read: {error.strerror}; give the path of a YAML file"
        raise SpecError(f"{what}{_instead(path)}") from None
    except (InvalidUri, ObjectNotFound) as error:
        raise SpecError(f"{error}; give the path or uri of a YAML file") from None
    except UnicodeDecodeError as error:
        if _is_model(path):
            raise SpecError(f"{path}: is a model, not a spec{_instead(path)}") from None
        line = error.object.count(b"\n", 0, error.start) + 1
        raise SpecError(f"{path}:{line}: not UTF-8 text; save the file as UTF-8") from None


def _instead(path: str) -> str:
    """What may have been meant by a path that is no spec."""
    if _is_model(path) or os.path.isdir(path):
        return f"; `fleetpress init {path}` writes one for the models there"
    return hint(path)


def _is_model(path: str) -> bool:
    return os.path.splitext(path)[1] in KIND_BY_SUFFIX


def _read(path: str) -> bytes:
    """The bytes at a path or uri; what never ends is left."""
    if is_s3(path):
        root, key = split(path)
        store = open_store(root)
        size_bytes = store.head(key).size_bytes
        raw = store.get(key) if size_bytes <= _MOST_BYTES else b""
    else:
        with open(path, "rb") as file:
            raw = file.read(_MOST_BYTES + 1)
        size_bytes = len(raw)
    if size_bytes > _MOST_BYTES:
        raise SpecError(f"{path}: more than {_MOST_BYTES} bytes; name models by patterns, or split the fleet")
    return raw


def parse_spec(text: str, name: str) -> Spec:
    """The spec in a YAML text; `name` is what messages call the file.

    Raises SpecError with all problems, one per line: `name:line: path: what; remedy`.
    """
    document = read_yaml(text, name)
    spec = understood(Spec, document, check(document), name)
    completed = {key: _completed(recipe) for key, recipe in spec.recipes.items()}
    spec = spec.model_copy(update={"recipes": completed})
    spec._text = _USERINFO.sub("***@", text)
    return spec


def _completed(recipe: Recipe) -> Recipe:
    """Pruning by gradients that no step tells collects once with the defaults; so do methods of `prune` and `quantize`
    that need inputs.
    """
    added: dict[str, Strict] = {}
    if recipe.auto and recipe.auto.max_drop is not None:
        added["validation"] = ValidateStep(max_drop=recipe.auto.max_drop)
    if recipe.prune and not recipe.collect and collects(recipe.prune, trains=recipe.train is not None):
        added["collect"] = CollectStep()
    observed = recipe.prune is not None and observes(recipe.prune)
    if (observed or (recipe.quantize and needs_inputs(recipe.quantize))) and not recipe.calibrate:
        added["calibrate"] = CalibrateStep()
    return recipe.model_copy(update=added)
