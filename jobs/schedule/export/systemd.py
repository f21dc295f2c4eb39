"""Two units for systemd: a timer for every minute, and the tick. What the schedules say is the tick's business."""

from __future__ import annotations

import re

from ...errors import UsageError

NAME = "fleetpress-schedule"

_TIMER = f"""\
# fleetpress: calls {NAME}.service every minute.
# Put both files into /etc/systemd/system (or ~/.config/systemd/user, with `systemctl --user` and
# `loginctl enable-linger`), then: systemctl enable --now {NAME}.timer
[Unit]
Description=Every minute: what the fleetpress schedules say

[Timer]
OnCalendar=*-*-* *:*:00
AccuracySec=1s

[Install]
WantedBy=timers.target
"""


def units(place: str, *, folder: str, command: str) -> dict[str, str]:
    """The timer and the service. Raises UsageError for a path that no unit file can hold."""
    if re.search(r"[\x00-\x1f\x7f]", place + folder + command):
        raise UsageError(
            "a unit file takes no path with control characters in it; rename the folder or the file"
        )
    if re.search(r"[\s'\"\\;*?%$]", command):
        raise UsageError(f"systemd takes no program of the name {command}; put a link to it at a plain path")
    service = f"""\
# fleetpress: begins what the schedules say, once.
[Unit]
Description=What the fleetpress schedules say
Wants=network-online.target
After=network-online.target

[Service]
Type=oneshot
WorkingDirectory={folder.replace("%", "%%")}
EnvironmentFile=-%h/.config/fleetpress.env
ExecStart={command} schedule tick --quiet {_word(place)}
# Jobs that work on this machine outlive the tick.
KillMode=process
"""
    return {f"{NAME}.service": service, f"{NAME}.timer": _TIMER}


def _word(text: str) -> str:
    """One word of ExecStart."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"' if re.search(r"[\s'\"\\;]", text) else escaped
