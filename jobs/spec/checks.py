"""What no single value of a spec tells: names that lead nowhere, steps without data, options that exclude each other.

The checks read the plain values, so that they also run in a file whose other parts are wrong; a step that is itself
wrong is left to pydantic.
"""

from collections.abc import Iterator
from typing import Any, TypeVar

from pydantic import ValidationError

from fleetpress.compression.scheme import DEFAULT_METHOD, LEARNING_METHODS, cast_of

from .auto_checks import check_auto, check_bound
from .code_checks import (
    check_codebook,
    check_file,
    check_float,
    check_kernels,
    integer_scheme,
)
from .fields import nearest
from .pruning_checks import check_deletion_options, check_layer_shares
from .recipe import (
    CHANGING_STEPS,
    TRAINING_STEPS,
    AutoStep,
    FinetuneStep,
    PruneStep,
    QuantizeStep,
    Recipe,
    Strict,
    TrainStep,
    ValidateStep,
)
from .schemes import options_of, scheme_of
from .training_checks import (
    check_finetune,
    check_gradual,
    check_training,
)
from .yaml_lines import (
    Document,
    Path,
    Problem,
)

DATA_KEYS = {"train", "eval", "loss", "metric"}  # with an unknown key, a missing one may just be misspelled
_HOW_MUCH = {"pattern": "2:4", "sparsity": "0.5", "mean_threshold": "1e-4", "std_threshold": "1e-3"}
Mistake = tuple[Path, str]
Step = TypeVar("Step", bound=Strict)


def check(document: Document) -> Iterator[Problem]:
    """Every contradiction between the parts of a spec."""
    spec = _mapping(document.data)
    recipes, shards = _mapping(spec.get("recipes")), _mapping(spec.get("data"))
    models = spec["models"] if isinstance(spec.get("models"), list) else []
    mistakes = list(_check_model_names([_mapping(model) for model in models]))
    for name, recipe in recipes.items():
        mistakes += _check_recipe(("recipes", name), recipe)
    for name, entry in shards.items():
        mistakes += _check_data(("data", name), entry)
    for index, model in enumerate(models):
        mistakes += _check_model(("models", index), _mapping(model), recipes, shards)
    for path, what in dict.fromkeys(mistakes):
        yield Problem(line=document.line(path), path=path, what=what)


def _check_recipe(path: Path, raw: Any) -> Iterator[Mistake]:
    steps = _mapping(raw)
    known = {field.alias or name for name, field in Recipe.model_fields.items()}
    if isinstance(raw, dict) and steps.keys() <= known and not steps.keys() & set(CHANGING_STEPS):
        yield path, f"changes nothing; add at least one of {', '.join(CHANGING_STEPS)}"
    quantize = _valid(QuantizeStep, steps.get("quantize"))
    if train := _valid(TrainStep, steps.get("train")):
        yield from _of_step((*path, "train"), check_training(train))
    if finetune := _valid(FinetuneStep, steps.get("finetune")):
        yield from _of_step((*path, "finetune"), check_finetune(finetune, quantize, "quantize" in steps))
    if auto := _valid(AutoStep, steps.get("auto")):
        yield from check_auto(path, auto, steps)
    if prune := _valid(PruneStep, steps.get("prune")):
        yield from _check_prune((*path, "prune"), prune)
        yield from _of_step((*path, "prune"), check_gradual(prune, "finetune" in steps))
        yield from check_layer_shares((*path, "prune"), prune, finetunes="finetune" in steps)
        yield from check_deletion_options((*path, "prune"), prune, _valid(TrainStep, steps.get("finetune")))
    if quantize:
        yield from _of_step(path, check_file(steps.get("format"), quantize))
        yield from _check_quantize((*path, "quantize"), quantize, steps["quantize"])


def _of_step(path: Path, found: Iterator[tuple[str, str]]) -> Iterator[Mistake]:
    yield from (((*path, key), what) for key, what in found)


def _check_prune(path: Path, step: PruneStep) -> Iterator[Mistake]:
    from fleetpress.compression.sparsity import is_sparsifier

    yield from _check_zeroing(path, step) if is_sparsifier(step.method) else _check_deletion(path, step)


def _check_zeroing(path: Path, step: PruneStep) -> Iterator[Mistake]:
    from fleetpress.compression.sparsity import SPARSIFIERS

    method = SPARSIFIERS[step.method]
    takes = method.takes
    given = [name for name in takes if getattr(step, name) is not None]
    if not given and not (step.layers and "sparsity" in takes):
        what = " or ".join(f"{name}, such as {_HOW_MUCH[name]}" for name in takes)
        yield path, f"does not say how much; add {what}"
    elif len(given) > 1:
        yield (*path, given[1]), f"excludes {given[0]}; keep one way to say how much to zero"
    for name in _HOW_MUCH:
        if getattr(step, name) is not None and name not in takes:
            yield (
                (*path, name),
                f"has no meaning for {step.method}, which takes {', '.join(takes)}; delete it",
            )
    if step.structure:
        what = f"has no meaning for {step.method}, which zeroes weights and deletes no units; delete it"
        yield (*path, "structure"), what
    if step.scope == "global" and not method.compares_tensors:
        what = f"global has no meaning for {step.method}, which looks at every tensor alone; delete it"
        yield (*path, "scope"), what
    elif step.scope == "global" and step.pattern is not None and "pattern" in takes:
        what = (
            f"global has no meaning for pattern {step.pattern}, which tells what goes in every row; delete it"
        )
        yield (*path, "scope"), what


def _check_deletion(path: Path, step: PruneStep) -> Iterator[Mistake]:
    from fleetpress.compression.pruning import PRUNERS

    if step.pattern is not None:
        what = (
            f"has no meaning for {step.method}, which deletes whole units; delete it, or take magnitude_n_m"
        )
        yield (*path, "pattern"), what
        if step.sparsity is step.mean_threshold is step.std_threshold is None:
            return
    thresholds = {"mean_threshold": step.mean_threshold, "std_threshold": step.std_threshold}
    given = [name for name, value in thresholds.items() if value is not None]
    if step.sparsity is not None and given:
        yield (*path, "sparsity"), f"excludes {' and '.join(given)}; keep one way to say how much to prune"
    elif step.sparsity is None and not given and not step.layers:
        yield path, "does not say how much; add sparsity, or mean_threshold and std_threshold"
    elif given and PRUNERS[step.method].spread is None:
        yield (*path, given[0]), f"is about gradients, which {step.method} does not use; give sparsity"
    elif len(given) == 1:
        (other,) = thresholds.keys() - given
        yield (*path, given[0]), f"needs {other} beside it; a unit goes when both are small"


def _check_quantize(path: Path, step: QuantizeStep, raw: dict[str, Any]) -> Iterator[Mistake]:
    from fleetpress.compression.scheme import CASTS, SCHEMES

    if step.scheme in CASTS:
        yield from _check_cast(path, step, raw)
        return
    yield from _check_layers(path, step)
    if step.scheme is None and step.num_bits is None:
        yield path, "does not say how many bits; add a scheme such as W4A16, or num_bits"
    if step.group_size is not None and step.strategy in ("tensor", "channel"):
        yield (*path, "group_size"), f"excludes strategy {step.strategy}; delete one of them"
    if step.strategy == "group" and raw.get("group_size", ...) is None:
        yield (
            (*path, "group_size"),
            "null means one scale per channel, not strategy group; delete one of them",
        )
    scheme = SCHEMES[step.scheme] if step.scheme is not None else None
    if scheme is not None and step.num_bits not in (None, scheme.num_bits):
        what = f"{step.num_bits} contradicts scheme {step.scheme}, which means {scheme.num_bits}"
        yield (*path, "num_bits"), f"{what}; delete one of them"
    if scheme is not None and scheme.type == "float":
        yield from check_float(path, step)
        return
    if step.method in LEARNING_METHODS or (scheme is not None and scheme.type == "codebook"):
        yield from check_codebook(path, step, scheme)
        return
    if step.num_bits == 1:
        yield (*path, "num_bits"), "1 is for codebooks; take scheme BINARY, method k_means, or 2 to 8"
    if scheme is not None and step.symmetric not in (None, scheme.symmetric):
        what = f"{str(step.symmetric).lower()} contradicts scheme {step.scheme}"
        yield (
            (*path, "symmetric"),
            f"{what}; take the scheme with{'' if scheme.symmetric else 'out'} _ASYM, or num_bits without scheme",
        )
    if scheme is not None and scheme.activation_bits:
        yield from check_kernels(path, step)
    bits = scheme.num_bits if scheme is not None else step.num_bits
    if step.format == "int-quantized" and bits not in (None, 8):
        what = f"int-quantized holds codes of 8 bits, not of {bits}"
        yield (*path, "format"), f"{what}; delete it, or take scheme W8A16"


def _check_layers(path: Path, step: QuantizeStep) -> Iterator[Mistake]:
    """Options of single layers: each must make a scheme, with a method that makes its codes."""
    from fleetpress.compression.errors import MethodError

    if not step.layers:
        return
    from fleetpress.compression.quantization import QUANTIZERS, check_method

    options = step.model_dump(exclude_none=True)
    for name in step.layers:
        try:
            if cast_of(options["layers"][name].get("scheme")):
                raise MethodError("is a plain cast of checkpoints; take a scheme such as W8A16")
            own = options_of(options, name)
            check_method(QUANTIZERS[own["method"]], scheme_of(own))
        except MethodError as error:
            yield (*path, "layers", name), str(error)


def _check_cast(path: Path, step: QuantizeStep, raw: dict[str, Any]) -> Iterator[Mistake]:
    # `group_size: null` is a choice, too: one scale per channel.
    for name in ("num_bits", "symmetric", "group_size", "strategy", "format"):
        if raw.get(name) is not None or (name == "group_size" and name in raw):
            yield (*path, name), f"has no meaning for {step.scheme}, a plain cast without codes; delete it"
    if step.method != DEFAULT_METHOD:
        yield (*path, "method"), f"{step.method} has no meaning for {step.scheme}, a plain cast; delete it"
    for name in ("equalize", "bias_correction", "biases"):
        if getattr(step, name):
            yield (*path, name), f"has no meaning for {step.scheme}, a plain cast without codes; delete it"


def _check_data(path: Path, raw: Any) -> Iterator[Mistake]:
    entry = _mapping(raw)
    if (
        isinstance(raw, dict)
        and entry.keys() <= DATA_KEYS
        and entry.get("train") is None
        and entry.get("eval") is None
    ):
        yield path, "names no files; add train, eval or both"
    trained = _words(entry.get("train"))
    for pattern in _words(entry.get("eval")):
        if pattern in trained:
            yield (*path, "eval"), f"`{pattern}` is also train data; evaluate on data that was not trained on"


def _check_model_names(models: list[dict[str, Any]]) -> Iterator[Mistake]:
    first: dict[str, int] = {}
    for index, name in enumerate(model.get("name") for model in models):
        if isinstance(name, str) and first.setdefault(name, index) != index:
            yield ("models", index, "name"), f"`{name}` is also the name of models[{first[name]}]; rename one"


def _check_model(
    path: Path, model: dict[str, Any], recipes: dict[str, Any], shards: dict[str, Any]
) -> Iterator[Mistake]:
    for key, kind, valid in (("recipe", "recipe", recipes), ("data", "data set", shards)):
        name = model.get(key)
        if isinstance(name, str) and name and name not in valid:
            yield (*path, key), f"there is no {kind} `{name}`; {nearest(name, valid)}"
    if model.get("inputs") is not None and model.get("factory") is None:
        yield (*path, "inputs"), "only a model with a factory needs inputs; delete it, or add factory"
    recipe, data = model.get("recipe"), model.get("data")
    if not isinstance(recipe, str) or recipe not in recipes:
        return
    steps = _mapping(recipes[recipe])
    needing = [name for name in TRAINING_STEPS if name in steps]
    prune = _valid(PruneStep, steps.get("prune"))
    if prune and not needing and needs_gradients(prune):
        needing = [f"prune by {prune.method}"]
    if prune and "calibrate" not in needing and observes(prune):
        needing = [
            *needing,
            f"prune by {prune.method}" if prune.compensate == "none" else "prune's compensate",
        ]
    quantize = _valid(QuantizeStep, steps.get("quantize"))
    if quantize and "calibrate" not in needing and needs_inputs(quantize):
        needing = [*needing, f"quantize by {_looking(quantize)}"]
    if data is None and needing:
        remedy = (
            f"add one of: {', '.join(shards)}" if shards else "describe the files under `data` and name them"
        )
        yield (*path, "data"), f"is missing; recipe `{recipe}` needs it for {', '.join(needing)}; {remedy}"
    if not isinstance(data, str) or not isinstance(shards.get(data), dict):
        return
    if needing and shards[data].get("train") is None:
        yield ("data", data, "train"), f"is missing; recipe `{recipe}` needs it for {', '.join(needing)}"
    if auto := _valid(AutoStep, steps.get("auto")):
        validate = _valid(ValidateStep, steps.get("validate"))
        yield from check_bound(("recipes", recipe), auto, validate, shards[data])
    if "validate" in steps and shards[data].get("eval") is None:
        yield ("data", data, "eval"), f"is missing; recipe `{recipe}` needs it for validate"


def needs_gradients(step: PruneStep) -> bool:
    """Whether the step's method scores units or weights by gradient statistics."""
    from fleetpress.compression.sparsity import SPARSIFIERS

    if step.method in SPARSIFIERS:
        return SPARSIFIERS[step.method].needs_gradients
    from fleetpress.compression.pruning import PRUNERS

    return PRUNERS[step.method].needs_gradients


def collects(step: PruneStep, *, trains: bool) -> bool:
    """Whether gradients have to be collected: those of a training (`trains`) do for some methods that need any."""
    from fleetpress.compression.sparsity import SPARSIFIERS

    expands = step.method in SPARSIFIERS and SPARSIFIERS[step.method].expands_loss
    return needs_gradients(step) and (expands or not trains)


def needs_products(step: PruneStep) -> bool:
    """Whether the step's method scores units by products of weights and gradients."""
    from fleetpress.compression.sparsity import is_sparsifier

    if is_sparsifier(step.method) or not needs_gradients(step):
        return False
    from fleetpress.compression.pruning import PRUNERS

    return PRUNERS[step.method].needs_products


def observes(step: PruneStep) -> bool:
    """Whether the step looks at what the layers read: to score units or weights, or to make up for them."""
    if step.compensate != "none":
        return True
    from fleetpress.compression.sparsity import SPARSIFIERS

    if step.method in SPARSIFIERS:
        return SPARSIFIERS[step.method].needs_inputs
    from fleetpress.compression.pruning import PRUNERS

    return PRUNERS[step.method].needs_inputs


def needs_inputs(step: QuantizeStep) -> bool:
    """Whether the step looks at what the layers read: its methods, its scales between layers, or its biases do."""
    if step.bias_correction or step.equalize == "activation_aware" or integer_scheme(step):
        return True
    methods = {step.method, *(own.method for own in step.layers.values() if own.method)} - {DEFAULT_METHOD}
    if not methods:  # without loading torch
        return False
    from fleetpress.compression.quantization import QUANTIZERS

    return any(QUANTIZERS[method].needs_inputs for method in methods)


def trains_from_codes(recipe: Recipe) -> bool:
    """Whether weights are trained from the codes that a calibrated method finds, not from what they were.

    Layers on integer kernels are calibrated after training: what they read is quantized, too.
    """
    finetune, quantize = recipe.finetune, recipe.quantize
    if finetune is None or quantize is None or not finetune.quantization_aware:
        return False
    return integer_scheme(quantize) is None and needs_inputs(quantize)


def _looking(step: QuantizeStep) -> str:
    """What of a step that needs inputs needs them."""
    if step.equalize == "activation_aware":
        return step.equalize
    return "bias_correction" if step.bias_correction else integer_scheme(step) or step.method


def _valid(kind: type[Step], raw: Any) -> Step | None:
    """The step, or None where there is none or pydantic has said already what is wrong with it."""
    try:
        return None if raw is None else kind.model_validate(raw)
    except ValidationError:
        return None


def _mapping(raw: Any) -> dict[str, Any]:
    return raw if isinstance(raw, dict) else {}


def _words(raw: Any) -> list[str]:
    return [raw] if isinstance(raw, str) else raw if isinstance(raw, list) else []
