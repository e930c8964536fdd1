"""Stopping at a step boundary: SIGINT, SIGTERM and SIGUSR1 set a flag that the training loop reads."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

SAME_REQUEST_SECONDS = 1.0
"""A terminal's Ctrl-C reaches workers directly and again through the launcher: within this time it is one request."""


class StopRequest:
    """Callable that returns the number of the signal that asked to stop, or None.

    A second SIGINT, later than SAME_REQUEST_SECONDS after the first, interrupts at once.
    forward: called with each signal, e.g. to pass it to workers; may be exchanged at any time.
    """

    def __init__(self, forward: Callable[[int], None] | None = None) -> None:
        self.requested: int | None = None
        self._at = 0.0
        self.forward = forward

    def __call__(self) -> int | None:
        return self.requested

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Signal handler."""
        again = self.requested is not None and time.monotonic() - self._at > SAME_REQUEST_SECONDS
        if self.requested is None:
            self.requested, self._at = number, time.monotonic()
        if self.forward is not None:
            self.forward(number)
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt


@contextmanager
def stop_on_signals(forward: Callable[[int], None] | None = None) -> Iterator[StopRequest]:
    """Install a StopRequest for the time of the block."""
    request = StopRequest(forward)
    previous = {number: signal.signal(number, request.handle) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
