"""Schedules for other schedulers: text that is the same for the same file, for people to read and to keep in git.

What others call is always our own tick, which claims before it begins anything: two of them, one that comes late, or
one that comes too often do each fire once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from fleetpress.storage.uri import is_s3

from ...errors import UsageError
from .crontab import crontab
from .kuberay import ray_cron_jobs, ray_jobs
from .kubernetes import tick_job
from .shipped import shipped
from .systemd import units


def export(
    path: str,
    target: str,
    *,
    image: str | None = None,
    namespace: str | None = None,
    service_account: str | None = None,
    workers: int = 4,
    command: str | None = None,
) -> dict[str, str]:
    """Files by name for `target`: kuberay, kuberay-cron, kubernetes, systemd or crontab.

    `command` is the fleetpress that cron and systemd call (default: this one). Raises UsageError, SpecError.
    """
    if target in ("systemd", "crontab"):
        place = path if is_s3(path) else os.path.abspath(path)
        shipped(path)  # a file with mistakes is told of now, not at night
        make = units if target == "systemd" else crontab
        return make(place, folder=os.getcwd(), command=command or _this_command())
    if not image:
        raise UsageError(
            f"--to {target} needs --image: one with fleetpress in it, such as rayproject/ray with "
            "`pip install fleetpress` on top"
        )
    if workers < 1:
        raise UsageError(f"--workers {workers}: give a number from 1")
    files = shipped(path)
    files.check_places()
    makers = {"kubernetes": tick_job, "kuberay": ray_jobs, "kuberay-cron": ray_cron_jobs}
    text = makers[target](
        files,
        image=image,
        namespace=namespace or "default",
        service_account=service_account,
        workers=workers,
    )
    return {f"{target}.yaml": text}


def write_files(files: Mapping[str, str], folder: str) -> list[str]:
    """Write the files into a folder; their paths. Raises UsageError."""
    places = []
    for name, text in files.items():
        place = Path(folder) / name
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UsageError(f"{place}: cannot be written: {error.strerror}; name another folder") from None
        places.append(str(place))
    return places


def _this_command() -> str:
    """The fleetpress beside this Python: cron and systemd know no environment of a shell."""
    beside = Path(sys.executable).with_name("fleetpress")
    return str(beside) if beside.exists() else "fleetpress"
