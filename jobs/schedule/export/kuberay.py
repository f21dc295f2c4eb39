"""KubeRay: a cluster for each fire that works on one schedule and goes; begun by a Kubernetes CronJob or a RayCronJob.

A RayCronJob (alpha) has no concurrency policy, and after its operator was down it begins one job after another for
everything it missed. Both are covered by the job itself: it ticks first, and ends at once if its fire is claimed, too
late, or not allowed beside one that runs.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from cronsim import CronSim

from ...errors import UsageError
from ...spec.yaml_lines import write_yaml_blocks
from ..file import Schedule
from ..fires import zone_of
from .kubernetes import (
    CONFIG,
    account,
    config_map,
    cron_job,
    environment,
    manifests,
    metadata,
    mounts,
    volumes,
)
from .shipped import FOLDER, Shipped, memory_mebibytes

KUBECTL_IMAGE = "registry.k8s.io/kubectl:v1.34.0"

_STARTER = "fleetpress-starter"
_START_SECONDS = 3600
_CPUS = 2
_LONGEST_NAME = (
    25  # KubeRay: 36 with `fleetpress-` before it, so that what it adds still fits into a host's name
)
_BEGIN = """\
# fleetpress: a Ray cluster for each fire, which ends with its work. Apply with `kubectl apply -f`.
# Variables for the buckets (AWS_...): a Secret `fleetpress-environment`. Pause with `fleetpress schedule pause`.
"""
_CRON_HEADER = f"""\
{_BEGIN}# A CronJob creates a RayJob at each fire; KubeRay 1.6 or newer must run in the cluster.
"""
_RAY_CRON_HEADER = f"""\
{_BEGIN}# RayCronJobs: KubeRay 1.7 or newer, with its feature gate RayCronJob switched on.
"""


def ray_jobs(files: Shipped, *, image: str, namespace: str, service_account: str | None, workers: int) -> str:
    """RayJobs under CronJobs: kubectl creates one at each fire."""
    _check(files)
    jobs = {}
    cron_jobs = []
    for schedule in files.file.schedules:
        key = f"rayjob-{schedule.name}.yaml"
        job = {
            "apiVersion": "ray.io/v1",
            "kind": "RayJob",
            "metadata": {
                "generateName": f"fleetpress-{schedule.name}-",
                "namespace": namespace,
                "labels": {"app.kubernetes.io/name": "fleetpress"},
            },
            "spec": _ray_job(files, schedule, image, service_account, workers),
        }
        jobs[key] = write_yaml_blocks(job)
        cron_jobs.append(_starter(schedule, namespace, key))
    rights = _rights(namespace)
    return manifests(_CRON_HEADER, [*config_map(files, namespace, jobs), *rights, *cron_jobs])


def ray_cron_jobs(
    files: Shipped, *, image: str, namespace: str, service_account: str | None, workers: int
) -> str:
    """RayCronJobs, one a schedule."""
    _check(files)
    documents = [
        {
            "apiVersion": "ray.io/v1",
            "kind": "RayCronJob",
            "metadata": metadata(f"fleetpress-{schedule.name}", namespace),
            "spec": {
                "schedule": plain_cron(schedule),
                "timeZone": _zone(schedule),
                "jobTemplate": _ray_job(files, schedule, image, service_account, workers),
            },
        }
        for schedule in files.file.schedules
    ]
    return manifests(_RAY_CRON_HEADER, [*config_map(files, namespace), *documents])


def _check(files: Shipped) -> None:
    """UsageError for names that KubeRay refuses, and for words that its shell would take apart."""
    long = [one.name for one in files.file.schedules if len(one.name) > _LONGEST_NAME]
    if long:
        raise UsageError(
            f"{', '.join(long)}: KubeRay takes names of at most {_LONGEST_NAME} signs; shorten them"
        )
    if not re.fullmatch(r"[A-Za-z0-9._:/=+-]+", files.place):
        raise UsageError(
            f"{files.path}: rename it to letters, digits, `.`, `_` and `-`: it goes through a shell"
        )


def plain_cron(schedule: Schedule) -> str:
    """The cron line as Kubernetes reads it. Raises UsageError for what it cannot.

    It knows neither L nor #, and no 7 for Sunday. Where a day of the month and one of the week are both given, one of
    them with `*/`, it fires more often than cron does: the tick finds nothing to do then.
    """
    *others, weekdays = schedule.cron.upper().split()
    if re.search(r"[L#]", others[2] + weekdays):
        raise UsageError(
            f"{schedule.name}: Kubernetes has no L, LW or # in `{schedule.cron}`; name days, or take --to kubernetes"
        )
    if "7" in weekdays:
        parsed = CronSim(schedule.cron, datetime(2000, 1, 1, tzinfo=UTC)).weekdays
        weekdays = ",".join(
            str(day) for day in sorted({int(day) % 7 for day in parsed if isinstance(day, int)})
        )
    return " ".join([*others, weekdays])


def _zone(schedule: Schedule) -> str:
    return "Etc/UTC" if schedule.timezone == "UTC" else str(zone_of(schedule.timezone))


def _starter(schedule: Schedule, namespace: str, key: str) -> dict[str, Any]:
    """The CronJob whose pod creates the RayJob: Kubernetes itself can create nothing but Jobs."""
    pod = {
        "serviceAccountName": _STARTER,
        "restartPolicy": "Never",
        "containers": [
            {
                "name": "kubectl",
                "image": KUBECTL_IMAGE,
                "command": ["kubectl", "create", "-f", f"{FOLDER}/{key}"],
                "resources": {"requests": {"cpu": "50m", "memory": "64Mi"}, "limits": {"memory": "256Mi"}},
                "volumeMounts": [{"name": "fleetpress", "mountPath": FOLDER, "readOnly": True}],
            }
        ],
        "volumes": [
            {"name": "fleetpress", "configMap": {"name": CONFIG, "items": [{"key": key, "path": key}]}}
        ],
    }
    return cron_job(
        f"fleetpress-{schedule.name}",
        namespace,
        schedule=plain_cron(schedule),
        timezone=_zone(schedule),
        starting_deadline_seconds=max(int(schedule.latest_start.total_seconds()), 100),
        active_deadline_seconds=300,
        pod=pod,
    )


def _rights(namespace: str) -> list[dict[str, Any]]:
    """An account that may create RayJobs, and nothing else."""
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata(_STARTER, namespace)},
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "Role",
            "metadata": metadata(_STARTER, namespace),
            "rules": [{"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create"]}],
        },
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "RoleBinding",
            "metadata": metadata(_STARTER, namespace),
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": _STARTER},
            "subjects": [{"kind": "ServiceAccount", "name": _STARTER, "namespace": namespace}],
        },
    ]


def _ray_job(
    files: Shipped, schedule: Schedule, image: str, service_account: str | None, workers: int
) -> dict[str, Any]:
    """The spec of a RayJob. KubeRay never retries it: the next fire goes on with what this one has done."""
    limits = {}
    if schedule.deadline_seconds is not None:  # the job keeps its deadline itself; this is for one that hangs
        seconds = schedule.deadline_seconds + schedule.jitter_seconds + _START_SECONDS
        limits = {"activeDeadlineSeconds": int(seconds)}
    return {
        "entrypoint": f"fleetpress schedule tick --foreground --only {schedule.name} {files.place}",
        "submissionMode": "K8sJobMode",
        "backoffLimit": 0,
        "preRunningDeadlineSeconds": _START_SECONDS,
        **limits,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 300,
        "rayClusterSpec": _cluster(files, schedule, image, service_account, workers),
    }


def _cluster(
    files: Shipped, schedule: Schedule, image: str, service_account: str | None, workers: int
) -> dict[str, Any]:
    """A head without work, and workers that come and go with the tasks."""
    worker_memory = f"{memory_mebibytes(files.specs[schedule.spec], _CPUS)}Mi"
    head = {
        "name": "ray-head",
        "image": image,
        "envFrom": environment(),
        "resources": {"requests": {"cpu": "1", "memory": "4Gi"}, "limits": {"memory": "4Gi"}},
        "volumeMounts": mounts(files),
    }
    worker = {
        "name": "ray-worker",
        "image": image,
        "envFrom": environment(),
        "resources": {
            "requests": {"cpu": str(_CPUS), "memory": worker_memory},
            "limits": {"cpu": str(_CPUS), "memory": worker_memory},
        },
    }
    return {
        "rayVersion": version("ray"),
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {"idleTimeoutSeconds": 60},
        "authOptions": {"mode": "token"},
        "headGroupSpec": {
            "rayStartParams": {"num-cpus": "0"},
            "template": {"spec": {**account(service_account), "containers": [head], **volumes(files)}},
        },
        "workerGroupSpecs": [
            {
                "groupName": "workers",
                "replicas": 0,
                "minReplicas": 0,
                "maxReplicas": workers,
                "rayStartParams": {},
                "template": {"spec": {**account(service_account), "containers": [worker]}},
            }
        ],
    }
