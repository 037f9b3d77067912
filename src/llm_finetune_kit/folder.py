"""A run is a folder: its lock, its event log and its checkpoints. No absolute path is stored anywhere."""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llm_finetune_kit.errors import BusyError, MachineError
from llm_finetune_kit.events import Evaluated, Event, Finished, Resumed, Sampled, Saved, Saving, Stepped, from_record, to_record
from llm_finetune_kit.files import MANIFEST, about_to, clear_drafts

EVENTS, LOCK = "events.jsonl", ".lock"
PATIENCE = 0.5  # seconds to wait for a lock: whoever only looks whether a run is at work holds it for an instant


class RunFolder:
    """The folder of one run. `path` is where it is now; nothing in it depends on that."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._log: Any = None
        self._waiting = b""  # of the log, where the disk did not take it

    @classmethod
    def create(cls, output_dir: Path, name: str) -> RunFolder:
        """A new folder under `output_dir`: `name`, or the next free `name-2`, `name-3`…"""
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MachineError(
                11, f"cannot be created: {error.strerror}", where=str(output_dir), fix="choose another output.output_dir"
            ) from None
        for number in range(1, 10_000):
            path = output_dir / (name if number == 1 else f"{name}-{number}")
            try:
                path.mkdir()
                return cls(path)
            except FileExistsError:
                continue
            except OSError as error:
                raise MachineError(
                    11, f"cannot be created: {error.strerror}", where=str(path), fix="choose another output.output_dir"
                ) from None
        raise MachineError(11, "no free name left", where=str(output_dir / name), fix="choose another output.run_name")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run folder; the kernel lets go when the process dies. Raises BusyError if it is held."""
        try:
            handle = open(self.path / LOCK, "a+")
        except OSError as error:
            problem = f"cannot be written: {error.strerror}"
            fix = "mend the rights of the folder, or copy it elsewhere"
            raise MachineError(11, problem, where=str(self.path), fix=fix) from None
        try:
            self._take(handle)
            with suppress(OSError):  # a full disk; it is for people only
                os.truncate(handle.fileno(), 0)
                text = f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"
                os.write(handle.fileno(), text.encode())
        except BaseException:
            handle.close()
            raise
        clear_drafts(self.path)
        self._log = open(self.path / EVENTS, "ab", buffering=0)
        torn = self._log.tell() > 0 and not (self.path / EVENTS).read_bytes().endswith(b"\n")
        self._waiting = b"\n" if torn else b""  # half a line, of a process that died, must not spoil the next one
        try:
            yield
        finally:
            self._log.close()
            self._log = None
            handle.close()

    def _take(self, handle: Any) -> None:
        until = time.monotonic() + PATIENCE
        while True:
            try:
                return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < until:
                    time.sleep(0.05)
                    continue
                fix = "wait for it, or start a new run"
                raise BusyError(1, "another process works in this run", where=str(self.path), why=self.holder, fix=fix) from None
            except OSError as error:
                fix = "choose an output folder on a local disk: --output-dir FOLDER"
                problem = f"files cannot be locked: {error.strerror}"
                raise MachineError(37, problem, where=str(self.path), fix=fix) from None

    @property
    def holder(self) -> str:
        """Who works in this run, or did last: process, host and since when."""
        try:
            return (self.path / LOCK).read_text(encoding="utf-8").strip()
        except OSError:
            return ""

    @property
    def at_work(self) -> bool:
        """Whether a process works in this run now."""
        try:
            with open(self.path / LOCK) as handle:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def record(self, event: Event) -> str | None:
        """Append an event to the log and return why that failed, if it did: the line then waits for the next one."""
        if self._log is None:
            return None
        self._waiting += json.dumps(to_record(event, time.time()), ensure_ascii=False, default=str).encode() + b"\n"
        try:
            about_to("log", self.path / EVENTS)
            written = self._log.write(self._waiting)
        except OSError as error:
            return error.strerror or str(error)
        self._waiting = self._waiting[written:]
        return None

    def replay(self) -> list[Event]:
        """What the run said, without steps that a later resume made void and without a torn last line."""
        told: list[Event] = []
        try:
            lines = (self.path / EVENTS).read_text(encoding="utf-8", errors="replace").split("\n")
        except FileNotFoundError:
            return told
        for line in lines:
            try:
                event = from_record(json.loads(line))
            except ValueError:
                continue
            if isinstance(event, Resumed):
                told = _still_valid(told, event)
            if event is not None:
                told.append(event)
        return told

    @property
    def step(self) -> int:
        """The last step that the log knows."""
        return max((event.step for event in self.replay() if isinstance(event, Stepped)), default=0)

    def checkpoints(self) -> list[Path]:
        """Checkpoint folders, newest step first; their content is not verified here."""
        found = [path for path in self.path.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
        return sorted(found, key=lambda path: int(path.name.partition("-")[2]), reverse=True)

    @property
    def final(self) -> Path:
        return self.path / "final"

    @property
    def finished(self) -> bool:
        """Whether the run reached its end, and did not go on to a later one since."""
        ends = [event for event in self.replay() if isinstance(event, (Finished, Resumed, Stepped))]
        return (self.final / MANIFEST).is_file() and bool(ends) and isinstance(ends[-1], Finished)


def _still_valid(told: list[Event], resumed: Resumed) -> list[Event]:
    """What was told of steps before the checkpoint was taken, and all that is not about steps."""
    known = (resumed.checkpoint, resumed.evaluated)
    taken = [place for place, event in enumerate(told) if isinstance(event, Saving) and (event.folder, event.evaluated) == known]
    last = taken[-1] if taken else -1  # also where training begins again, or a full disk kept that line
    return [
        event
        for place, event in enumerate(told)
        if isinstance(event, Resumed) or place <= last or not hasattr(event, "step") or _belongs(event, resumed, bool(taken))
    ]


def _belongs(event: Any, resumed: Resumed, taken: bool) -> bool:
    """Whether an event that was told after the state was taken, or nobody knows when, is one of the checkpoint's own past."""
    if isinstance(event, Saved):  # the word that it was saved may come some steps later
        return event.folder.startswith("checkpoint-") and 0 < event.step <= resumed.step
    if taken or not resumed.checkpoint:
        return False
    if isinstance(event, Evaluated):
        return event.step <= resumed.evaluated
    if isinstance(event, Sampled):
        return event.step <= resumed.sampled
    return isinstance(event, (Stepped, Saving)) and event.step <= resumed.step
