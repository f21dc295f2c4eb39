"""What is written beside a model: manifest and metrics, in their documented form (schema version 1)."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from fleetpress.storage import canonical_json
from fleetpress.storage.artifact import ArtifactFile

SCHEMA_VERSION = 1


def manifest_of(
    payload: Mapping[str, Any], *, kind: str, form: str, files: Sequence[ArtifactFile]
) -> dict[str, Any]:
    """The manifest of an artifact; no clock times, so equal input gives equal bytes."""
    model = payload["model"]
    return {
        "schema_version": SCHEMA_VERSION,
        "name": model["name"],
        "kind": kind,
        "format": form,
        "files": [file.as_dict() for file in files],
        "source": {"uri": model["uri"], "files": model["files"]},
        "recipe": payload["recipe"],
        "data": payload["data"],
        "seed": payload["seed"],
        "plan_digest": payload["plan_digest"],
        "fleetpress_version": version("fleetpress"),
    }


def metrics_bytes(metrics: Mapping[str, Any]) -> bytes:
    """`metrics.json`: before, after, ratio and every layer."""
    return canonical_json.dumps({"schema_version": SCHEMA_VERSION, **metrics})
