"""SIGTERM and `cancel` end a run as Ctrl-C does: by a KeyboardInterrupt in the driver."""

from __future__ import annotations

import _thread
import signal
import threading
from types import FrameType
from typing import Any


class Stop:
    """Inside the context SIGTERM interrupts, unless the program that calls us has a handler of its own.

    Only the main thread can be interrupted; a driver in another one asks `wanted`.
    """

    def __init__(self) -> None:
        self.wanted = False
        self._in_main_thread = threading.current_thread() is threading.main_thread()
        self._before: Any = None

    def __enter__(self) -> Stop:
        if self._in_main_thread and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            self._before = signal.SIG_DFL
            self.arm()
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def arm(self) -> None:
        """Take SIGTERM (back): libraries such as Ray set a handler of their own when they start."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, _interrupt)

    def now(self) -> None:
        """Interrupt the driver, from any thread."""
        self.wanted = True
        if self._in_main_thread:
            _thread.interrupt_main()


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
