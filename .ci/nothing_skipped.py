"""A pytest plugin: the run fails unless every collected test ran to its end."""

import pytest

_reasons: list[str] = []
_ran: list[str] = []


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.skipped:
        _reasons.append(f"{report.nodeid}: skipped while collecting")


def pytest_deselected(items: list[pytest.Item]) -> None:
    _reasons.extend(f"{item.nodeid}: deselected" for item in items)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped:  # expected failures arrive as skipped, too
        _reasons.append(f"{report.nodeid}: skipped or expected to fail")
    elif report.when == "call":
        _ran.append(report.nodeid)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if not _ran:
        _reasons.append("no test ran")
    if _reasons and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _reasons:
        terminalreporter.section("every test must run", red=True)
        for reason in _reasons:
            terminalreporter.line(reason)
