"""What an output holds already: found with few requests, whatever the number of models."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from fleetpress.storage.artifact import (
    LATEST,
    MANIFEST,
    METRICS,
    artifact_key,
    manifest_exists,
    point_latest,
)
from fleetpress.storage.errors import ArtifactCorrupt, StorageError
from fleetpress.storage.store import ObjectStore, read_json, text_field

from ..threads import side_by_side
from .results import ModelResult, measured_result

_MODELS = "models/"
ONE_BY_ONE = 8  # so few models are asked for; more of them are found in a listing of everything


def find_published(store: ObjectStore, digests: Mapping[str, str]) -> set[str]:
    """Names of the models whose artifact is published; `digests` are the artifacts' by name."""
    if len(digests) <= ONE_BY_ONE:
        return {name for name, digest in digests.items() if manifest_exists(store, name, digest)}
    keys = store.sizes(_MODELS)
    return {name for name, digest in digests.items() if artifact_key(name, digest, MANIFEST) in keys}


def unchanged(
    store: ObjectStore, digests: Mapping[str, str], run: str, known: Mapping[str, ModelResult]
) -> list[tuple[str, ModelResult | StorageError]]:
    """Published models with their numbers, or why they cannot be had; a pointer that shows another artifact is mended.

    Numbers come from `known`, the rows of an earlier run, where they tell of the same artifact, else from metrics.json.
    """
    found = side_by_side(partial(_unchanged, store, run, known), digests.items())
    return list(zip(digests, found, strict=True))


def _unchanged(
    store: ObjectStore, run: str, known: Mapping[str, ModelResult], model: tuple[str, str]
) -> ModelResult | StorageError:
    name, digest = model
    try:
        row = known.get(name)
        found = _measured(store, name, digest) if row is None or row.digest != digest else row
        if pointed_to(store, name) != digest:
            point_latest(store, name, digest, run)
    except StorageError as error:
        return error
    return replace(found, state="unchanged", reason=None)


def _measured(store: ObjectStore, name: str, digest: str) -> ModelResult:
    key = artifact_key(name, digest, METRICS)
    try:
        return measured_result(name, "unchanged", digest, read_json(store, key))
    except (ValueError, LookupError, TypeError):
        folder = f"{store.uri}/{_MODELS}{name}/{digest}"
        raise ArtifactCorrupt(f"{store.uri}/{key} is damaged; delete {folder} and run again") from None


def pointed_to(store: ObjectStore, name: str) -> str | None:
    """The digest that a model's pointer shows; None if there is no pointer that can be read."""
    return text_field(store, f"{_MODELS}{name}/{LATEST}", "digest")
