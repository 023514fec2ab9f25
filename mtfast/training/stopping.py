"""Signals that ask a run to end: training finishes its step and saves its state, then the run ends.

SIGTERM is what schedulers, preempted machines and launchers send, often more than once; SIGINT is Ctrl-C.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
INSISTING_SECONDS = 2.0  # a second SIGINT before that is the first one's, passed on by a launcher


class Stopped(KeyboardInterrupt):
    """A run has ended because of a signal. No `Exception`: what goes on after errors should not after this.

    signum: the signal's number.
    """

    def __init__(self, signum: int, said: str) -> None:
        super().__init__(said)
        self.signum = signum


class Stopping:
    """Takes the signals while it is entered, in the main thread; elsewhere they stay who they are for.

    A second SIGINT, not at once, interrupts.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._at = 0.0
        self._raises = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():
            self._before = {signum: signal.signal(signum, self._handle) for signum in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """In here a signal raises Stopped, whatever goes on, and so does one that came before."""
        self._raises = True
        try:
            self._raise_if_asked()
            yield
        finally:
            self._raises = False

    def _handle(self, signum: int, _: FrameType | None) -> None:
        if self.signum is None:
            self.signum, self._at = signum, time.monotonic()
        elif signum == signal.SIGINT and time.monotonic() - self._at > INSISTING_SECONDS:
            raise KeyboardInterrupt
        if self._raises:
            self._raise_if_asked()

    def _raise_if_asked(self) -> None:
        if self.signum is not None:
            raise Stopped(self.signum, signal.Signals(self.signum).name)
