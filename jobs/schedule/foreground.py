"""The due fire of one schedule, worked on in this very process: for schedulers that bring machines up for each fire.

The claim comes first, so that two of them, or one that catches up hour after hour, do each fire once.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta

from fleetpress.storage.store import open_store

from .attend import job_key
from .file import ScheduleFile
from .launching import here
from .records import LocalJob, read_record
from .tick import Tick, TickResult, tick


def work_here(
    file: ScheduleFile,
    name: str,
    *,
    by: str,
    clock: Callable[[], datetime],
    sleep: Callable[[float], None],
) -> tuple[TickResult, int]:
    """Wait for the release of a fire that is past, work on it, and tell how it ended.

    The exit code is that of the run, or of the tick if there was nothing to run.
    """
    # Whatever its address says: the work is done here, and is looked for in the output, not at that address.
    schedule = file.named(name).model_copy(update={"address": None})
    file = file.model_copy(update={"schedules": (schedule,)})
    now = clock()
    waiting = schedule.times.waiting(now, since=now - timedelta(days=2))
    if waiting is not None:  # jitter: this process was started by the fire itself
        sleep((schedule.times.release(waiting) - now).total_seconds())
        now = clock()
    first = tick(file, Tick(now=now, by=by, launcher_of=here), only=name)
    begun = [row for row in first.rows if row.action == "begun"]
    if not begun:
        return first, first.exit_code
    record = read_record(open_store(file.output), job_key(begun[-1].job), LocalJob)
    # The run may have outlasted the next fire: that one is another process's.
    second = tick(file, Tick(now=clock(), by=by, launcher_of=here, only_looks=True), only=name)
    told = TickResult(at=second.at, rows=(*first.rows, *second.rows))
    return told, record.exit_code if record and record.phase == "ended" else told.exit_code
