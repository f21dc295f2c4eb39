"""SIGTERM and `cancel` end a run as Ctrl-C does: by a KeyboardInterrupt in the driver."""

from __future__ import annotations

import _thread
import signal
import threading
from types import FrameType
from typing import Any

_TOLD_AGAIN_SECONDS = 30.0  # to end in order takes less


class Stop:
    """Inside the context SIGTERM interrupts, unless the program that calls us has a handler of its own.

    Only the main thread can be interrupted; a driver in another one asks `wanted`. Python drops an interrupt that meets
    a destructor or a callback: a run that lives on is told again. What a script begins in the background (`fleetpress
    run ... &`) ignores SIGINT, and then Python raises none: it is SIGTERM that is raised here, where that is ours.
    """

    def __init__(self) -> None:
        self.wanted = False
        self._in_main_thread = threading.current_thread() is threading.main_thread()
        self._before: Any = None
        self._over = threading.Event()

    def __enter__(self) -> Stop:
        if self._in_main_thread and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            self._before = signal.SIG_DFL
            self.arm()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def arm(self) -> None:
        """Take SIGTERM (back): libraries such as Ray set a handler of their own when they start."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._terminated)

    def now(self) -> None:
        """Interrupt the driver, from any thread."""
        self._want()
        if self._in_main_thread:
            self._interrupt()

    def _terminated(self, _number: int, _frame: FrameType | None) -> None:
        self._want()
        raise KeyboardInterrupt

    def _want(self) -> None:
        if not self.wanted and self._in_main_thread:
            threading.Thread(target=self._tell_again, name="stop", daemon=True).start()
        self.wanted = True

    def _tell_again(self) -> None:
        while not self._over.wait(_TOLD_AGAIN_SECONDS):
            self._interrupt()

    def _interrupt(self) -> None:
        _thread.interrupt_main(signal.SIGINT if self._before is None else signal.SIGTERM)
