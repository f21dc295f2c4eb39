"""A line for cron: one, whatever the schedules say. Time zones, misfires and deadlines are the tick's business."""

from __future__ import annotations

import shlex

from ...errors import UsageError


def crontab(place: str, *, folder: str, command: str) -> dict[str, str]:
    """The crontab that ticks every minute."""
    line = f"cd {shlex.quote(folder)} && {shlex.quote(command)} schedule tick --quiet {shlex.quote(place)}"
    if "\n" in line:
        raise UsageError("cron takes no path with a line break in it; rename the folder or the file")
    escaped = line.replace("%", "\\%")  # cron would make a new line of it
    text = f"""\
# fleetpress: begins what the schedules say; add it with `crontab -e`. It prints, and cron mails, only what was done.
# Cron knows nothing of your shell: variables such as AWS_PROFILE go on lines of their own above.
* * * * * {escaped}
"""
    return {"crontab": text}
