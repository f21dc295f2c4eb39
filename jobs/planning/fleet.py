"""From a spec to a fleet: sources resolved to models, data to shards; only names, sizes and etags are read."""

import hashlib
import importlib.util
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fleetpress.storage.data import find_shards, shards_root
from fleetpress.storage.errors import UNUSABLE_STORE, InvalidUri, StorageError
from fleetpress.storage.sources import ModelSource, SourceFile, find_models
from fleetpress.storage.uri import is_s3, join, normalize, validate_key

from ..spec.fleet_spec import (
    DataSpec,
    ModelSpec,
    Spec,
)
from ..spec.recipe import (
    TRAINING_STEPS,
    QuantizeStep,
    Recipe,
)
from ..threads import side_by_side


@dataclass(frozen=True, kw_only=True)
class Fold:
    """Every `of`-th sample of a shard, from the `index`-th on; with `is_left_out` all the others."""

    index: int
    of: int
    is_left_out: bool = False

    def in_shard(self, number: int) -> "Fold":
        """Of the shard of this number: shards begin with one fold after the other, so that small ones fill them all."""
        return replace(self, index=(self.index - number) % self.of)


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of a data set: `file.path` is a key of the store at `root`; with a `fold` a part of its samples."""

    root: str
    file: SourceFile
    fold: Fold | None = None


@dataclass(frozen=True, kw_only=True)
class Data:
    """Shards to train and to evaluate on, and the names of loss and metric (None: they follow from the targets)."""

    name: str
    train: tuple[Shard, ...]
    eval: tuple[Shard, ...]
    loss: str | None
    metric: str | None


@dataclass(frozen=True, kw_only=True)
class Model:
    """One model of the fleet and what is to be done to it."""

    name: str
    source: ModelSource
    recipe: Recipe
    data: Data | None
    factory: str | None = None
    factory_digest: str | None = None
    inputs: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A model that cannot be begun, and why; it fails, the others go on."""

    model: str
    reason: str
    unreachable: bool = False  # the storage was the reason, not the model


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """Every model that the spec names, in its order, and the problems found on the way."""

    models: tuple[Model, ...]
    problems: tuple[Problem, ...]


def resolve(spec: Spec, *, allow_code: bool = False) -> Fleet:
    """List every source and data set of the spec. What cannot be found becomes a Problem of the models that need it."""
    data = {name: _listed(_find_data, name, item) for name, item in spec.data.items()}
    models: list[Model] = []
    problems: list[Problem] = []
    output = absolute(spec.output)
    sources = side_by_side(lambda entry: _listed(_find_sources, entry.source, output), spec.models)
    for entry, found in zip(spec.models, sources, strict=True):
        if isinstance(found, Problem):
            label = entry.name or _label(entry.source)
            problems.append(Problem(model=label, reason=found.reason, unreachable=found.unreachable))
            continue
        for source in found:
            model = _model(spec, entry, source, data, many=len(found) > 1, allow_code=allow_code)
            (models if isinstance(model, Model) else problems).append(model)  # type: ignore[arg-type]
    return _without_twins(models, problems)


def _find_sources(source: str, output: str) -> list[ModelSource]:
    """The models that a source names, without what this spec publishes itself. Raises StorageError."""
    found = find_models(source)
    ours = [join(output, folder) for folder in ("models", "records", "runs")]
    foreign = [model for model in found if not any(_is_below(absolute(model.uri), place) for place in ours)]
    if not foreign:
        raise InvalidUri(
            f"{source} names what the output {output} holds: its artifacts and records; give another source or output"
        )
    for model in foreign:
        if model.kind == "checkpoint" and _is_below(output, absolute(model.uri)):
            raise InvalidUri(
                f"the output {output} lies in the model's folder {model.uri}; give another output"
            )
    return foreign


def _is_below(place: str, folder: str) -> bool:
    return place == folder or place.startswith(folder.rstrip("/") + "/")


def _listed(find: Any, *args: Any) -> Any:
    try:
        return find(*args)
    except StorageError as error:
        return Problem(model="", reason=str(error), unreachable=isinstance(error, UNUSABLE_STORE))


def _find_data(name: str, item: DataSpec) -> Data | Problem:
    train, held_out = _shards(item.train or ()), _shards(item.eval or ())
    trained_on = {(shard.file.etag, shard.file.bytes): shard.file for shard in train}
    for shard in held_out:
        twin = trained_on.get((shard.file.etag, shard.file.bytes))
        if twin is not None:
            what = f"{shard.file.path} of eval is {twin.path} of train"
            reason = f"data {name}: {what}; evaluate on data that was not trained on"
            return Problem(model="", reason=reason)
    return Data(name=name, train=train, eval=held_out, loss=item.loss, metric=item.metric)


def _shards(patterns: Sequence[str]) -> tuple[Shard, ...]:
    return tuple(
        Shard(root=absolute(shards_root(pattern)), file=file)
        for pattern in patterns
        for file in find_shards(pattern)
    )


def absolute(uri: str) -> str:
    """The place without regard to the working folder, which workers may not share."""
    return normalize(uri) if is_s3(uri) else os.path.abspath(normalize(uri))


def _model(
    spec: Spec,
    entry: ModelSpec,
    source: ModelSource,
    data: Mapping[str, Data | Problem],
    *,
    many: bool,
    allow_code: bool,
) -> Model | Problem:
    name = source.name if many or not entry.name else entry.name
    validate_key(name)
    recipe = spec.recipes[entry.recipe]
    chosen = data[entry.data] if entry.data else None
    if isinstance(chosen, Problem):
        return Problem(model=name, reason=chosen.reason, unreachable=chosen.unreachable)
    reason = _unfit(source, entry, recipe, allow_code)
    if reason:
        return Problem(model=name, reason=reason)
    return Model(
        name=name,
        source=source,
        recipe=recipe,
        data=chosen,
        factory=entry.factory,
        factory_digest=_factory_digest(entry.factory) if source.kind == "module" and entry.factory else None,
        inputs={key: value.model_dump(mode="json") for key, value in entry.inputs.items()}
        if entry.inputs
        else None,
    )


def _unfit(source: ModelSource, entry: ModelSpec, recipe: Recipe, allow_code: bool) -> str | None:
    """Why this kind of model cannot do this recipe, if so."""
    asks = f"{source.uri}: recipe {entry.recipe!r}"
    if source.kind == "checkpoint":
        return _unfit_for_checkpoint(asks, recipe)
    if source.kind == "module" and not entry.factory:
        return (
            f"{source.uri}: a state dict needs the code that builds its module; add "
            "`factory: package.module:callable` and run with --allow-code, or export the model to a program (.pt2)"
        )
    if source.kind == "module" and not allow_code:
        return f"{source.uri}: its factory {entry.factory!r} is code; run again with --allow-code to allow it"
    return _unfit_for_program(asks, recipe)


def _unfit_for_checkpoint(asks: str, recipe: Recipe) -> str | None:
    from fleetpress.compression.sparsity import SPARSIFIERS

    form = recipe.quantize and _program_form(recipe.quantize)
    if form:
        return (
            f"{asks} quantizes by {form}, which only programs hold: codebooks, and layers on integer kernels; "
            "take a scheme such as W4A16, or export the model to a program (.pt2)"
        )
    if recipe.format == "archive":
        return (
            f"{asks} has format archive, which holds programs; delete it: a checkpoint keeps its own layout "
            "(`quantize: {format: ...}` chooses among those)"
        )
    asked = [step for step in TRAINING_STEPS if step != "calibrate" and getattr(recipe, step) is not None]
    if recipe.prune is not None:
        method = SPARSIFIERS.get(recipe.prune.method)
        if method is None or method.needs_gradients:
            asked.append(f"prune by {recipe.prune.method}")
        elif recipe.prune.scope == "global":
            asked.append("prune with scope global")
    if recipe.calibrate is not None and recipe.calibrate.importance is not None:
        asked.append(f"calibrate with importance: {recipe.calibrate.importance}")
    if recipe.prune is not None and recipe.prune.layers:
        asked.append("prune single layers otherwise (`layers`)")
    if recipe.quantize is not None and recipe.quantize.layers:
        asked.append("quantize single layers otherwise (`layers`)")
    if recipe.quantize is not None and recipe.quantize.equalize is not None:
        asked.append(f"equalize by {recipe.quantize.equalize}")
    if recipe.quantize is not None and recipe.quantize.bias_correction:
        asked.append("correct biases")
    if recipe.quantize is not None and recipe.quantize.biases is not None:
        asked.append("round biases")
    if not asked:
        return None
    return (
        f"{asks} asks to {', '.join(asked)}, which a bare checkpoint cannot do; "
        "export the model to a program (.pt2), or use a recipe that only zeroes weights and quantizes"
    )


def _unfit_for_program(asks: str, recipe: Recipe) -> str | None:
    form = recipe.quantize and _checkpoint_form(recipe.quantize)
    if form:
        return f"{asks} quantizes to {form}, a form of checkpoints; take a scheme such as W8A16 or W4A16 for a program"
    return None


def _checkpoint_form(step: QuantizeStep) -> str | None:
    """What the step asks for that only checkpoints hold: a cast, a layout."""
    from fleetpress.compression.scheme import CASTS

    return step.scheme if step.scheme in CASTS else step.format


def _program_form(step: QuantizeStep) -> str | None:
    """What the step asks for that only programs hold: a codebook, integer kernels."""
    from fleetpress.compression.scheme import CASTS, LEARNING_METHODS, SCHEMES

    if step.method in LEARNING_METHODS:
        return step.method
    if step.scheme is None or step.scheme in CASTS:
        return None
    scheme = SCHEMES[step.scheme]
    return step.scheme if scheme.type == "codebook" or scheme.activation_bits else None


def _factory_digest(factory: str) -> str | None:
    """Hash of the file that the factory lives in: a change of that code is a change of the model."""
    try:
        found = importlib.util.find_spec(factory.partition(":")[0])  # imports the packages around it
    except Exception:  # noqa: BLE001 - code of the user may raise anything; the task that imports it tells
        return None
    if found is None or not found.origin or not Path(found.origin).is_file():
        return None
    return hashlib.sha256(Path(found.origin).read_bytes()).hexdigest()


def _without_twins(models: list[Model], problems: list[Problem]) -> Fleet:
    counts = Counter(model.name for model in models)
    for name, count in counts.items():
        if count > 1:
            places = " and ".join(model.source.uri for model in models if model.name == name)
            problems.append(
                Problem(model=name, reason=f"two models are named {name!r}: {places}; give one a `name`")
            )
    single = [model for model in models if counts[model.name] == 1]
    taken = Counter(model.name for model in single)
    told = []
    for problem in problems:  # what was not found may bear the name of what was
        taken[problem.model] += 1
        again = taken[problem.model]
        told.append(problem if again == 1 else replace(problem, model=f"{problem.model} ({again})"))
    return Fleet(models=tuple(single), problems=tuple(told))


def _label(source: str) -> str:
    """What a model is called that was not found: the last part of its source that is no pattern."""
    return next((part for part in reversed(source.split("/")) if part.strip("*")), source)
