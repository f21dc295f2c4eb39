"""A Kubernetes CronJob that ticks every minute and submits what is due to a Ray cluster that stands."""

from __future__ import annotations

from typing import Any

from ...errors import UsageError
from ...spec.yaml_lines import write_yaml_blocks
from .shipped import FOLDER, Shipped

CONFIG = "fleetpress-schedules"
_ENVIRONMENT = "fleetpress-environment"
_NAME = "fleetpress-tick"
_TICK_SECONDS = 600
_HEADER = """\
# fleetpress: a tick every minute, which submits what is due to Ray's Jobs API. Apply with `kubectl apply -f`.
# Variables for the buckets (AWS_...) and for the cluster (RAY_AUTH_TOKEN): a Secret `fleetpress-environment`.
"""


def tick_job(files: Shipped, *, image: str, namespace: str, service_account: str | None, workers: int) -> str:
    """The manifest. Raises UsageError for schedules without the address of a Jobs API: jobs would die with the pod."""
    lonely = [one.name for one in files.file.schedules if not one.is_submitted]
    if lonely:
        raise UsageError(
            f"{', '.join(lonely)}: without `address: http://head:8265` the work would be done in the pod of the tick, "
            "and end with it; give the address, or take --to kuberay"
        )
    container = {
        "name": "fleetpress",
        "image": image,
        "command": ["fleetpress", "schedule", "tick", "--quiet", files.place],
        "workingDir": FOLDER,
        "envFrom": environment(),
        "resources": {"requests": {"cpu": "100m", "memory": "512Mi"}, "limits": {"memory": "1Gi"}},
        "volumeMounts": mounts(files),
    }
    pod = {
        **account(service_account),
        "restartPolicy": "Never",
        "containers": [container],
        **volumes(files),
    }
    job = cron_job(
        _NAME,
        namespace,
        schedule="* * * * *",
        timezone=None,
        starting_deadline_seconds=100,
        active_deadline_seconds=_TICK_SECONDS,
        pod=pod,
    )
    return manifests(_HEADER, [*config_map(files, namespace), job])


def manifests(header: str, documents: list[dict[str, Any]]) -> str:
    """Several documents of one file."""
    return header + "---\n" + "---\n".join(map(write_yaml_blocks, documents))


def metadata(name: str, namespace: str) -> dict[str, Any]:
    """Name, place and label of an object."""
    return {"name": name, "namespace": namespace, "labels": {"app.kubernetes.io/name": "fleetpress"}}


def config_map(files: Shipped, namespace: str, more: dict[str, str] | None = None) -> list[dict[str, Any]]:
    """The schedule file, its specs and `more`; nothing if all of it lies in buckets."""
    data = {**files.config(), **(more or {})}
    if not data:
        return []
    return [{"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata(CONFIG, namespace), "data": data}]


def cron_job(
    name: str,
    namespace: str,
    *,
    schedule: str,
    timezone: str | None,
    starting_deadline_seconds: int,
    active_deadline_seconds: int,
    pod: dict[str, Any],
) -> dict[str, Any]:
    """A CronJob of one pod that is never retried: the next one goes on with what it left."""
    return {
        "apiVersion": "batch/v1",
        "kind": "CronJob",
        "metadata": metadata(name, namespace),
        "spec": {
            "schedule": schedule,
            **({"timeZone": timezone} if timezone else {}),
            "concurrencyPolicy": "Forbid",
            "startingDeadlineSeconds": starting_deadline_seconds,
            "successfulJobsHistoryLimit": 1,
            "failedJobsHistoryLimit": 3,
            "jobTemplate": {
                "spec": {
                    "backoffLimit": 0,
                    "activeDeadlineSeconds": active_deadline_seconds,
                    "ttlSecondsAfterFinished": 3600,
                    "template": {
                        "metadata": {"labels": {"app.kubernetes.io/name": "fleetpress"}},
                        "spec": pod,
                    },
                }
            },
        },
    }


def environment() -> list[dict[str, Any]]:
    """Variables for buckets and clusters, from a Secret that need not be there."""
    return [{"secretRef": {"name": _ENVIRONMENT, "optional": True}}]


def account(name: str | None) -> dict[str, str]:
    """The pod's service account, through which clouds give rights to buckets."""
    return {"serviceAccountName": name} if name else {}


def mounts(files: Shipped) -> list[dict[str, Any]]:
    """Where a container sees the files."""
    return [{"name": "fleetpress", "mountPath": FOLDER, "readOnly": True}] if files.texts else []


def volumes(files: Shipped) -> dict[str, Any]:
    """The files, as a part of a pod."""
    return {"volumes": [files.volume()]} if files.texts else {}
