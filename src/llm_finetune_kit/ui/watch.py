"""What runs say, read as they say it: one reader for all who watch, however many there are."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, Generic, TypeVar

from llm_finetune_kit.events import Event, Resumed, Stage, Stepped, from_record
from llm_finetune_kit.folder import EVENTS, RunFolder
from llm_finetune_kit.terminal import STAGES

Value = TypeVar("Value")
RECENT = 20  # steps that speed and the time left are reckoned from


@dataclass
class _Read:
    """How far a log was read, and what stood there."""

    offset: int = 0
    told: list[Event] = field(default_factory=list)
    lock: Lock = field(default_factory=Lock)


class Watch:
    """The logs of many runs, each read once: only what was added is parsed again."""

    def __init__(self) -> None:
        self._logs: dict[Path, _Read] = {}

    def told(self, run: RunFolder) -> list[Event]:
        """The same as `run.replay()`."""
        log = self._logs.setdefault(run.path, _Read())
        with log.lock:
            added = _added(run.path / EVENTS, log.offset)
            if added is None:
                log.offset, log.told = 0, []
                added = _added(run.path / EVENTS, 0) or b""
            if b'"Resumed"' in added:  # which makes void what was told before
                log.told = run.replay()
            else:
                log.told += [event for line in added.split(b"\n") if (event := _event(line)) is not None]
            log.offset += len(added)
            return list(log.told)


def _added(path: Path, offset: int) -> bytes | None:
    """Whole lines behind `offset`, or None if the file is shorter than that."""
    try:
        with open(path, "rb") as file:
            if file.seek(0, 2) < offset:
                return None
            file.seek(offset)
            added = file.read()
    except OSError:
        return None
    return added[: added.rfind(b"\n") + 1]


def _event(line: bytes) -> Event | None:
    try:
        return from_record(json.loads(line)) if line else None
    except (ValueError, TypeError, AttributeError):
        return None


class Recent(Generic[Value]):
    """What was made a moment ago: many who ask for the same at once are answered by making it once."""

    def __init__(self, seconds: float, most: int = 64) -> None:
        self.seconds, self.most = seconds, most
        self._made: dict[Any, tuple[float, Value]] = {}
        self._lock = Lock()

    def get(self, key: Any, make: Callable[[], Value]) -> Value:
        """The value for `key`, made now if it is older than `seconds`."""
        with self._lock:
            when, value = self._made.get(key, (-1e9, None))
            if time.monotonic() - when < self.seconds and value is not None:
                return value
            value = make()
            self._made.pop(key, None)
            self._made[key] = (time.monotonic(), value)
            while len(self._made) > self.most:
                del self._made[next(iter(self._made))]
            return value

    def forget(self) -> None:
        """Make everything anew."""
        with self._lock:
            self._made.clear()


@dataclass(frozen=True)
class Pace:
    """How fast a run goes: tokens per second, and seconds until its last step; None before they are known."""

    tokens_per_second: float | None
    seconds_left: float | None


def pace(told: list[Event]) -> Pace:
    """The pace of the last steps."""
    steps = [event for event in told if isinstance(event, Stepped)][-RECENT:]
    if not steps:
        return Pace(None, None)
    seconds = max(1e-9, sum(event.seconds for event in steps))
    left = (steps[-1].total_steps - steps[-1].step) * seconds / len(steps)
    return Pace(sum(event.tokens for event in steps) / seconds, left)


def stage(told: list[Event]) -> str:
    """What a run at work is at, in words."""
    for event in reversed(told):
        if isinstance(event, (Stepped, Resumed)):
            return "training"
        if isinstance(event, Stage):
            said = {"train": "training", "plan": "planning"}.get(event.name)
            return said or f"{STAGES.get(event.name, event.name)} {event.detail}".strip()
    return "beginning"
