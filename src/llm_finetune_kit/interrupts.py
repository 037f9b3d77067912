"""SIGINT, SIGTERM and SIGHUP while a run works: heard at once, or at the next step boundary where a step would be lost."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopAsked(BaseException):
    """A signal ends the work where it stands. No Exception, so that no library takes it for an error of its own."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Interrupts:
    """The signal that came, if one did."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._waits = False

    def asked(self) -> bool:
        """Whether a signal came that waits to be heard."""
        return self.number is not None

    @contextmanager
    def at_boundaries(self) -> Iterator[None]:
        """Inside, a first signal only makes `asked` true; a second one ends the work at once, as it does elsewhere."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False

    def catch(self, number: int, frame: Any) -> None:
        first, self.number = self.number is None, number
        if not (first and self._waits):
            raise StopAsked(number)


@contextmanager
def interruptible() -> Iterator[Interrupts]:
    """Hear signals as StopAsked instead of dying from them. Those that are ignored, as under nohup, stay ignored."""
    heard, before = Interrupts(), {}
    try:
        for number in NUMBERS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, heard.catch)
    except ValueError:  # not the main thread: whoever started it decides
        pass
    try:
        yield heard
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
