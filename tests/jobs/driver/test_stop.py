"""A run that is to end is told until it does."""

import subprocess
import sys

import pytest

_RUN = """
import os, signal, time
from fleetpress.jobs.driver import stop
{before}
stop._TOLD_AGAIN_SECONDS = 1.0
with stop.Stop() as asked:
    for begin in ({begin}, lambda: None):
        try:
            begin()
            for _ in range(400):  # what `interrupt_main` raises is seen after a sleep, not in it
                time.sleep(0.05)
        except KeyboardInterrupt:
            print("told", asked.wanted)
time.sleep(0.2)
"""


@pytest.mark.parametrize(
    "before", ["", "signal.signal(signal.SIGINT, signal.SIG_IGN)"], ids=["in front", "in the background"]
)
@pytest.mark.parametrize("begin", ["lambda: os.kill(os.getpid(), signal.SIGTERM)", "asked.now"])
def test_who_misses_an_interrupt_is_told_again_until_the_run_is_over(begin: str, before: str) -> None:
    """Also where a script has begun it in the background, which ignores Ctrl-C."""
    ended = subprocess.run(
        [sys.executable, "-c", _RUN.format(before=before, begin=begin)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert ended.stdout.split("\n") == ["told True", "told True", ""]
