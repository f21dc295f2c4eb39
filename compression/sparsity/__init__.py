"""Sparsity: weights are zeroed where they are, and nothing is deleted. In programs and checkpoints.

Importing this does not import torch: what a spec or a plan asks is told without it.
"""

from collections.abc import Sequence

from fleetpress.compression.errors import MethodError
from fleetpress.compression.sparsity import (
    fisher_unstructured,
    gradient_stability_unstructured,
    magnitude_n_m,
    magnitude_unstructured,
    sparsegpt,
    taylor_unstructured,
    wanda,
)
from fleetpress.compression.sparsity.amount import parse as parse_pattern
from fleetpress.compression.sparsity.method import Options, SparsityMethod, Zeroing

__all__ = [
    "SPARSIFIERS",
    "SparsityMethod",
    "Zeroing",
    "is_sparsifier",
    "measuring_passes",
    "parse_pattern",
    "reason_against",
    "start",
    "without_data",
    "zeroed",
]

SPARSIFIERS: dict[str, SparsityMethod] = {
    "fisher_unstructured": fisher_unstructured.METHOD,
    "gradient_stability_unstructured": gradient_stability_unstructured.METHOD,
    "magnitude_n_m": magnitude_n_m.METHOD,
    "magnitude_unstructured": magnitude_unstructured.METHOD,
    "sparsegpt": sparsegpt.METHOD,
    "taylor_unstructured": taylor_unstructured.METHOD,
    "wanda": wanda.METHOD,
}


def is_sparsifier(name: str) -> bool:
    """Whether a pruning method zeroes weights; the others delete units of programs."""
    return name in SPARSIFIERS


# `options` below are those of a recipe's `prune` step, with its `method`; dtypes are safetensors' names. All of these
# raise MethodError for options that do not fit the method.


def reason_against(options: Options, dtype: str, shape: Sequence[int]) -> str | None:
    """Why a weight must be left alone, None if it need not."""
    return _checked(options).reason_against(options, dtype, shape)


def measuring_passes(options: Options, dtype: str) -> int:
    """How many times a whole weight is measured before it is zeroed. Raises MethodError if that needs data."""
    passes = _checked(options).passes
    if passes is None:
        raise _needs_data(options)
    return passes(options, dtype)


def zeroed(options: Options, shape: Sequence[int]) -> int:
    """How many entries of a weight are chosen to be zero."""
    return _checked(options).zeroed(options, shape)


def start(options: Options, dtype: str, shape: Sequence[int]) -> Zeroing:
    """Begin with a weight whose blocks of rows will come one after the other.

    Raises MethodError for a weight that there is a reason against, too, and for a method that needs data.
    """
    begin = _checked(options).start
    if begin is None:
        raise _needs_data(options)
    return begin(options, dtype, shape)


def without_data(options: Options) -> Options:
    """The options with a method that needs no data in place of one that looks at what layers read, or at gradients."""
    method = SPARSIFIERS[options["method"]]
    if not (method.needs_inputs or method.needs_gradients):
        return options
    instead = "magnitude_unstructured" if options.get("pattern") is None else "magnitude_n_m"
    return {**options, "method": instead}


def _needs_data(options: Options) -> MethodError:
    reads = SPARSIFIERS[options["method"]].needs_inputs
    looked_at = "what layers read, of a model" if reads else "gradients, of a program"
    return MethodError(
        f"{options['method']} looks at {looked_at} with data; without data take magnitude_n_m or "
        "magnitude_unstructured"
    )


def _checked(options: Options) -> SparsityMethod:
    method = SPARSIFIERS.get(options.get("method", ""))
    if method is None:
        raise MethodError(
            f"{options.get('method')!r} zeroes no weights; methods that do: {', '.join(SPARSIFIERS)}"
        )
    method.check(options)
    return method
