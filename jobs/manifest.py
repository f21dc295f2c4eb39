"""What is written beside a model: manifest and metrics, in their documented form (schema version 1)."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from fleetpress.storage import canonical_json
from fleetpress.storage.artifact import (
    METRICS,
    ArtifactFile,
    artifact_key,
    point_latest,
    publish_manifest,
)
from fleetpress.storage.store import open_store

from .spec.recipe import Recipe, recipe_yaml
from .tasks import Output, StepResult

SCHEMA_VERSION = 1


def manifest_of(payload: Mapping[str, Any], *, kind: str, form: str) -> dict[str, Any]:
    """The manifest of an artifact without its `files`; no clock times, so equal input gives equal fields."""
    model = payload["model"]
    return {
        "schema_version": SCHEMA_VERSION,
        "name": model["name"],
        "kind": kind,
        "format": form,
        "source": {"uri": model["uri"], "files": model["files"]},
        "recipe": _asked(payload),
        "data": payload["data"],
        "seed": payload["seed"],
        "plan_digest": payload["plan_digest"],
        "fleetpress_version": version("fleetpress"),
    }


def companions(payload: Mapping[str, Any], metrics: Mapping[str, Any]) -> dict[str, bytes]:
    """What lies beside every model: `metrics.json` (before, after, ratio, every layer) and `recipe.yaml`."""
    return {
        METRICS: canonical_json.dumps_short({"schema_version": SCHEMA_VERSION, **metrics}),
        "recipe.yaml": recipe_yaml(Recipe.model_validate(_asked(payload))).encode(),
    }


def _asked(payload: Mapping[str, Any]) -> Any:
    """The recipe that the spec asks for; what a search has made of it stands in the metrics."""
    return payload.get("asked", payload["recipe"])


def complete(
    payload: Mapping[str, Any],
    metrics: Mapping[str, Any],
    *,
    kind: str,
    form: str,
    files: Sequence[ArtifactFile],
) -> StepResult:
    """Publish an artifact whose files are written and read back: the manifest, then the pointer."""
    store, name, digest = open_store(payload["output"]), payload["model"]["name"], payload["digest"]
    publish_manifest(store, name, digest, manifest_of(payload, kind=kind, form=form), files)
    point_latest(store, name, digest, payload["run"])
    return StepResult(
        result={"state": "published", "reason": None, "metrics": metrics},
        outputs=tuple(
            Output(key=artifact_key(name, digest, file.path), bytes=file.bytes, sha256=file.sha256)
            for file in files
            if file.path != METRICS  # another run may have put its own measured times there
        ),
    )
