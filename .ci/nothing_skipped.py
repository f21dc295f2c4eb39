"""A pytest plugin: the run fails unless every collected test ran to its end, in this process or in workers of xdist."""

from collections.abc import Sequence
from typing import Any

import pytest

_reasons: list[str] = []
_collected: set[str] = set()
_ran: set[str] = set()


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.skipped:
        _reasons.append(f"{report.nodeid}: skipped while collecting")


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    _reasons.extend(f"{item.nodeid}: deselected" for item in items)


def pytest_collection_finish(session: pytest.Session) -> None:
    _collected.update(item.nodeid for item in session.items)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped:  # expected failures arrive as skipped, too
        _reasons.append(f"{report.nodeid}: skipped or expected to fail")
    elif report.when == "call":
        _ran.add(report.nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Workers collect and deselect by themselves; of each test that runs they send the reports."""
    told = getattr(node, "workeroutput", {})  # a worker that died tells nothing, and its test has failed
    _reasons.extend(reason for reason in told.get("not_run", ()) if reason not in _reasons)
    _collected.update(told.get("collected", ()))


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput.update(not_run=_reasons, collected=sorted(_collected))
        return
    if not _ran:
        _reasons.append("no test ran")
    if session.exitstatus != pytest.ExitCode.OK:
        return
    _reasons.extend(f"{test}: did not run" for test in sorted(_collected - _ran))
    if _reasons:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _reasons:
        terminalreporter.section("every test must run", red=True)
        for reason in _reasons:
            terminalreporter.line(reason)
