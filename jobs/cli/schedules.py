"""The verb `schedule` and its own verbs: when which spec runs."""

import argparse
import getpass
import socket
import time
from datetime import UTC, datetime
from typing import Any

from ..errors import SpecError, UsageError
from .options import EXIT_CODES, add_verb, message, print_json

_PROG = "fleetpress schedule"
_VERBS = ("validate", "list", "next", "pause", "resume", "tick", "run", "export")
_TARGETS = ("kuberay", "kuberay-cron", "kubernetes", "systemd", "crontab")


def add_verbs(verbs: Any) -> None:
    """schedule, with validate, list, next, pause, resume, tick, run, export."""
    summary = f"run specs when a file says so: {', '.join(_VERBS)}"
    schedule = verbs.add_parser(
        "schedule", help=summary, description=summary, epilog=EXIT_CODES, usage=f"{_PROG} VERB FILE ..."
    )
    inner = schedule.add_subparsers(title="verbs", metavar="VERB", required=True, prog=_PROG)

    _verb(inner, "validate", _validate, "whether a schedule file and its specs are right")
    _verb(inner, "list", _list, "schedules: next fire, paused or running, and what came of the latest fire")
    verb = _verb(inner, "next", _next, "the fires to come, days on which clocks change marked")
    verb.add_argument("-n", metavar="COUNT", type=int, default=5, help="of each schedule (default: 5)")
    for name, function, words in (
        ("pause", _pause, "begin no jobs of a schedule until it is resumed; those that run go on"),
        ("resume", _resume, "begin jobs again; fires of the pause are not caught up"),
    ):
        verb = _verb(inner, name, function, words)
        verb.add_argument("name", metavar="NAME", help="a schedule of the file")

    verb = _verb(inner, "tick", _tick, "begin what is due, once: call it every minute, from anywhere")
    verb.add_argument("--only", metavar="NAME", help="look at this schedule alone")
    verb.add_argument("--quiet", action="store_true", help="tell only of what was done, skipped or failed")
    verb.add_argument(
        "--foreground",
        action="store_true",
        help="do the work in this process instead of beginning a job; needs --only",
    )
    _verb(inner, "run", _run, "tick for ever: for machines without a scheduler")
    verb = _verb(inner, "export", _export, "what another scheduler needs to call fleetpress")
    verb.add_argument("--to", choices=_TARGETS, required=True, help="for which scheduler")
    verb.add_argument("--into", metavar="FOLDER", help="write the files there (default: print them)")
    verb.add_argument("--image", help="image with fleetpress in it (Kubernetes and KubeRay)")
    verb.add_argument("--namespace", help="namespace of what is made (Kubernetes and KubeRay)")
    verb.add_argument(
        "--service-account",
        metavar="NAME",
        help="service account of the pods that read and write the buckets",
    )
    verb.add_argument("--workers", type=int, default=4, help="most Ray workers (KubeRay; default: 4)")


def _verb(inner: Any, name: str, function: Any, summary: str) -> argparse.ArgumentParser:
    verb = add_verb(inner, name, function, summary)
    verb.add_argument("file", metavar="FILE", help="the schedule file")
    return verb


def _now() -> datetime:
    return datetime.now(UTC)


def _who() -> str:
    try:
        user = getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container's user may have no name
        user = "somebody"
    return f"{user}@{socket.gethostname()}"


def _print(value: Any, lines: list[str], *, as_json: bool) -> None:
    if as_json:
        print_json(value)
    else:
        print("\n".join(lines))


def _validate(arguments: argparse.Namespace) -> int:
    from ..schedule.file import check_specs, load_schedules

    problems: list[str] = []
    count = 0
    try:
        file = load_schedules(arguments.file)
        count = len(file.schedules)
        problems = check_specs(file)
    except SpecError as error:
        problems = str(error).splitlines()
    told = {"file": arguments.file, "ok": not problems, "schedules": count, "problems": problems}
    fine = f"{arguments.file}: {count} schedule{'s' if count != 1 else ''}, and the specs of all are right"
    _print(told, problems or [fine], as_json=arguments.json)
    return 2 if problems else 0


def _list(arguments: argparse.Namespace) -> int:
    from fleetpress.storage.store import open_store

    from ..schedule.file import load_schedules
    from ..schedule.overview import standing
    from ..schedule.tables import standing_lines

    file = load_schedules(arguments.file)
    store, now = open_store(file.output), _now()
    found = [standing(store, schedule, now) for schedule in file.schedules]
    _print([one.as_dict() for one in found], standing_lines(found), as_json=arguments.json)
    return 0


def _next(arguments: argparse.Namespace) -> int:
    from ..schedule.file import load_schedules
    from ..schedule.fires import MOST_FIRES_SHOWN
    from ..schedule.overview import next_fires
    from ..schedule.tables import next_lines

    if not 1 <= arguments.n <= MOST_FIRES_SHOWN:
        raise UsageError(f"-n {arguments.n}: give a number from 1 to {MOST_FIRES_SHOWN}")
    now = _now()
    schedules = load_schedules(arguments.file).schedules
    fires = [fire for schedule in schedules for fire in next_fires(schedule, now, arguments.n)]
    _print([fire.as_dict() for fire in fires], next_lines(fires), as_json=arguments.json)
    return 0


def _pause(arguments: argparse.Namespace) -> int:
    return _set_paused(arguments, wanted=True)


def _resume(arguments: argparse.Namespace) -> int:
    return _set_paused(arguments, wanted=False)


def _set_paused(arguments: argparse.Namespace, *, wanted: bool) -> int:
    from fleetpress.storage.store import open_store

    from ..schedule.claims import Claims
    from ..schedule.file import load_schedules

    file = load_schedules(arguments.file)
    schedule = file.named(arguments.name)
    claims = Claims(open_store(file.output), schedule.name)
    change = claims.pause if wanted else claims.resume
    control = change(by=_who(), now=_now())
    state = "paused" if control.paused else "not paused"
    told = {"name": schedule.name, "paused": control.paused, "by": control.by, "at": control.at}
    by = f" (by {control.by}, {control.at})" if control.by else ""
    _print(told, [f"{schedule.name}: {state}{by}"], as_json=arguments.json)
    return 0


def _tick(arguments: argparse.Namespace) -> int:
    from ..schedule.file import load_schedules
    from ..schedule.tables import tick_lines
    from ..schedule.tick import Tick, tick

    if arguments.foreground:
        return _work_here(arguments)
    file = load_schedules(arguments.file)
    result = tick(file, Tick(now=_now(), by=_who()), only=arguments.only)
    told = result.without_quiet_rows() if arguments.quiet else result
    if told.rows or not arguments.quiet:
        _print(told.as_dict(), tick_lines(told), as_json=arguments.json)
    return result.exit_code


def _work_here(arguments: argparse.Namespace) -> int:
    from ..schedule.file import load_schedules
    from ..schedule.foreground import work_here
    from ..schedule.tables import tick_lines

    if not arguments.only:
        raise UsageError("--foreground works on one schedule; name it with --only NAME")
    result, code = work_here(
        load_schedules(arguments.file), arguments.only, by=_who(), clock=_now, sleep=time.sleep
    )
    _print(result.as_dict(), tick_lines(result), as_json=arguments.json)
    return code


def _run(arguments: argparse.Namespace) -> int:
    from ..driver.stop import Stop
    from ..schedule.file import load_schedules
    from ..schedule.loop import run
    from ..schedule.tables import tick_lines
    from ..schedule.tick import Tick, TickResult, tick

    file, by = load_schedules(arguments.file), _who()

    def show(result: TickResult) -> None:
        told = result.without_quiet_rows()
        if told.rows:
            lines = [f"{result.at}  {line}" for line in tick_lines(told)]
            _print(told.as_dict(), lines, as_json=arguments.json)

    message(f"{arguments.file}: {len(file.schedules)} schedules; Ctrl-C ends this, and none of their jobs")
    with Stop():
        run(file, lambda now: tick(file, Tick(now=now, by=by)), clock=_now, sleep=time.sleep, listener=show)
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from ..schedule.export import export, write_files

    files = export(
        arguments.file,
        arguments.to,
        image=arguments.image,
        namespace=arguments.namespace,
        service_account=arguments.service_account,
        workers=arguments.workers,
    )
    if arguments.into:
        places = write_files(files, arguments.into)
        _print({"files": places}, places, as_json=arguments.json)
    elif arguments.json:
        print_json(files)
    else:
        print("".join(files.values()), end="")
    return 0
