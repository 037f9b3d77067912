"""Experiment trackers: listeners of the run's events, each in a process of its own.

A tracker is optional and foreign: it may hang, print, crash or lose its server. So it works in a child process
(`child.py`) that reads events from a pipe (`pipe.py`), and whatever becomes of it costs the run one warning.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llm_finetune_kit.config import RunConfig
from llm_finetune_kit.errors import KitError, MachineError
from llm_finetune_kit.events import (
    Evaluated,
    Event,
    Failed,
    Finished,
    Listen,
    Resumed,
    Sampled,
    Saved,
    Stepped,
    Warned,
    to_record,
)
from llm_finetune_kit.files import read_json, write_json
from llm_finetune_kit.plain_yaml import read_yaml
from llm_finetune_kit.tracking.pipe import Pipe
from llm_finetune_kit.tracking.records import hyperparameters

# Faults of this package:  MACHINE 70 a tracker's package is missing

STATE = "trackers.json"  # the key by which trackers know the run: a resumed run goes on under it
CLOSING = 45.0  # seconds that all trackers together have to finish when the run ends
HEARD = (Stepped, Evaluated, Sampled, Saved, Finished, Failed, Resumed)


def asked_trackers(config: RunConfig) -> list[str]:
    """Names of the trackers that the config asks for, each once."""
    names = config.training.trackers or []
    return list(dict.fromkeys([names] if isinstance(names, str) else names))


def require_trackers(config: RunConfig) -> None:
    """Raise MachineError if the package of a tracker that is asked for is not installed."""
    missing = [name for name in asked_trackers(config) if find_spec(name) is None]
    if missing:
        problem = f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed, to record the run there"
        fix = "pip install 'llm-finetune-kit[tracking]', or leave training.trackers out"
        raise MachineError(70, problem, where="training.trackers", fix=fix)


@contextmanager
def tracked(folder: Path, config: RunConfig, say: Listen) -> Iterator[Listen]:
    """A listener that says every event to `say` and then to the trackers of the config, which are closed at the end."""
    names = asked_trackers(config)
    if not names:
        yield say
        return
    trackers = _Trackers(folder, config, names, say)
    try:
        yield trackers
    finally:
        trackers.close()


class _Trackers:
    """The trackers of one run; one that fails is told of once and left out."""

    def __init__(self, folder: Path, config: RunConfig, names: Sequence[str], say: Listen) -> None:
        self._say = say
        self._every = config.training.logging_steps
        self._pipes: dict[str, Pipe] = {}
        start = {
            "name": folder.name,
            "folder": str(folder.resolve()),
            "settings": hyperparameters(config, _asked(folder)),
            "key": _key(folder / STATE, say),
        }
        for name in names:
            if find_spec(name) is None:  # a run that goes on, on another machine
                self._leave_out(name, "it is not installed here")
                continue
            try:
                self._pipes[name] = Pipe(name)
            except OSError as error:
                self._leave_out(name, f"no process can be started for it: {error.strerror}")
                continue
            self._tell(name, start)

    def __call__(self, event: Event) -> None:
        self._say(event)
        if isinstance(event, HEARD) and not self._skipped(event):
            record = to_record(event, time.time())
            for name in list(self._pipes):
                self._tell(name, record)
        for name in list(self._pipes):
            self._hear(name)

    def _skipped(self, event: Event) -> bool:
        """Whether the step is between two lines of the log."""
        return isinstance(event, Stepped) and event.step % self._every != 0 and event.step != event.total_steps

    def _tell(self, name: str, record: dict[str, Any]) -> None:
        if not self._pipes[name].send(record):
            self._leave_out(name, "it is too slow")

    def _hear(self, name: str) -> None:
        """What the tracker's process says: a remark, or that it failed."""
        for word in self._pipes[name].heard():
            if "warning" in word:
                self._say(Warned(f"{name}: {word['warning']}"))
            if "failed" in word:
                self._leave_out(name, str(word["failed"]))

    def _leave_out(self, name: str, why: str) -> None:
        pipe = self._pipes.pop(name, None)
        if pipe is not None:
            pipe.end()
        self._say(Warned(f"the run is no longer recorded by {name}: {why}", "training goes on; events.jsonl has everything"))

    def close(self) -> None:
        """Let every tracker finish, for a limited time; a process that is not done by then is ended."""
        deadline = time.monotonic() + CLOSING
        try:
            for pipe in self._pipes.values():
                pipe.finish()
            for name in list(self._pipes):
                done = self._pipes[name].wait(deadline)
                self._hear(name)
                if not done and name in self._pipes:
                    self._leave_out(name, f"it did not finish within {CLOSING:.0f} seconds")
        finally:
            for pipe in self._pipes.values():
                pipe.end()


def _asked(folder: Path) -> dict[str, Any]:
    """What the user set, as the run folder tells; nothing if it does not."""
    try:
        return read_yaml((folder / "config.yaml").read_text(encoding="utf-8"), "config.yaml")[0]
    except (OSError, ValueError, KitError):
        return {}


def _key(path: Path, say: Listen) -> str:
    """The key of the run in all its trackers, kept in a file before any tracker starts: a kill at any moment may follow."""
    try:
        key = str(read_json(path)["key"])
        if re.fullmatch(r"[0-9a-f]{8}", key):
            return key
    except (OSError, ValueError, KeyError, TypeError):
        pass  # a new run, or a damaged file
    key = uuid.uuid4().hex[:8]
    try:
        write_json(path, {"key": key})
    except OSError as error:
        say(Warned(f"trackers will take a resumed run for another one, as {STATE} cannot be written: {error.strerror}"))
    return key
