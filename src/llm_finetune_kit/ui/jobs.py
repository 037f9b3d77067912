"""Runs that the page starts: one at a time, the others wait. Each is the command line in a process of its own.

A job is a file in the workspace, so the queue outlives the server. That a run is at work is told by a kernel lock that
its process inherits: it ends with the process, however that ends, and any number of servers agree on it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import IO, Any

from llm_finetune_kit.config import RunConfig
from llm_finetune_kit.errors import BusyError, UsageError
from llm_finetune_kit.files import read_json, write_json, write_whole
from llm_finetune_kit.plain_yaml import dump_yaml
from llm_finetune_kit.ui.uploads import slug
from llm_finetune_kit.ui.workspace import Workspace

MOST_WAITING = 100
LOG_SHOWN = 4_000  # bytes at the end of what a command line said
HELD = re.compile(r"process (\d+) on (\S+),")


@dataclass(frozen=True)
class Job:
    """One start that was asked for: `words` is the command line, `digest` tells whether another asks for the same."""

    name: str
    words: list[str]
    digest: str
    asked: float  # seconds since 1970
    started: float | None = None


class Jobs:
    """The queue of a workspace."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.folder = workspace.own / "queue"
        self._inside = Lock()  # flock does not part the threads of one process that share a file
        self._children: list[subprocess.Popen[bytes]] = []

    # --- asking --------------------------------------------------------------------------------------------

    def start(self, config: RunConfig) -> str:
        """Queue a run and begin it if nothing else is at work; its name. The same start asked twice is one run."""
        self.workspace.check(config)
        digest = hashlib.sha256(dump_yaml(config.asked()).encode()).hexdigest()
        with self._locked():
            for job in self.all():
                if job.digest == digest and self._is_open(job):
                    return job.name
            name = self._free_name(config)
            named = config.with_values({"output.run_name": name})
            write_whole(self.folder / f"{name}.yaml", dump_yaml(named.asked()))
            self._put(
                Job(name, ["train", str((self.folder / f"{name}.yaml").relative_to(self.workspace.root))], digest, time.time())
            )
        self.advance()
        return name

    def resume(self, name: str) -> str:
        """Queue that a run goes on. Raises UsageError if there is none of that name, BusyError if it is at work."""
        run = self.workspace.run(name)
        if run.at_work:
            raise BusyError(1, "another process works in this run", why=run.holder, fix="watch it, or stop it first")
        with self._locked():
            digest = f"resume {name}"
            if not any(job.digest == digest and self._is_open(job) for job in self.all()):
                self._put(Job(name, ["resume", str(run.path.relative_to(self.workspace.root))], digest, time.time()))
        self.advance()
        return name

    def stop(self, name: str) -> None:
        """Take a waiting run out of the queue, or ask one at work to save and end. Raises UsageError where it does neither."""
        with self._locked():
            job = self.find(name)
            if job is not None and job.started is None:
                return self._drop(name)
            current, process = self.current()
        if current != name:
            run = self.workspace.run(name)
            held = HELD.match(run.holder) if run.at_work else None
            process = int(held[1]) if held and held[2] == socket.gethostname() else 0
        if not process:
            raise UsageError(54, "this run is not at work on this machine", fix="look at its state again")
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGTERM)

    def dismiss(self, name: str) -> None:
        """Forget a start that came to nothing."""
        with self._locked():
            job = self.find(name)
            if job is not None and not self._is_open(job):
                self._drop(name)

    # --- looking -------------------------------------------------------------------------------------------

    def all(self) -> list[Job]:
        """All jobs, the first asked first."""
        found = []
        for path in self.folder.glob("*.json"):
            with suppress(OSError, ValueError, TypeError):
                found.append(Job(**read_json(path)))
        return sorted(found, key=lambda job: job.asked)

    def waiting(self) -> list[Job]:
        return [job for job in self.all() if job.started is None]

    def find(self, name: str) -> Job | None:
        return next((job for job in self.all() if job.name == name), None)

    def current(self) -> tuple[str, int]:
        """Name and process of the job at work; an empty name and 0 if there is none."""
        try:
            with open(self.folder / "at-work.lock") as handle:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            name, _, process = (self.folder / "at-work.lock").read_text(encoding="utf-8").partition(" ")
            return name, int(process or 0)
        except OSError:
            pass
        return "", 0

    def said(self, job: Job) -> str:
        """The end of what the command line of a job said."""
        try:
            with open(self.folder / f"{job.name}.log", "rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - LOG_SHOWN))
                return file.read().decode("utf-8", errors="replace")
        except OSError:
            return ""

    # --- doing ---------------------------------------------------------------------------------------------

    def advance(self) -> None:
        """Begin the job that waits longest, if no run of this workspace is at work."""
        self._children = [child for child in self._children if child.poll() is None]
        with self._locked():
            self._clear()
            waiting = self.waiting()
            if not waiting or any(run.at_work for run in self.workspace.runs()):
                return
            with open(self.folder / "at-work.lock", "a") as handle:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return
                self._begin(waiting[0], handle)

    def _begin(self, job: Job, handle: IO[str]) -> None:
        self._put(Job(job.name, job.words, job.digest, job.asked, started=time.time()))
        with open(self.folder / f"{job.name}.log", "wb") as log:
            child = subprocess.Popen(
                [sys.executable, "-m", "llm_finetune_kit", *job.words],
                cwd=self.workspace.root,
                env=os.environ | {"PYTHONSAFEPATH": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a signal to the server is none to the run
                pass_fds=[handle.fileno()],  # the lock lives as long as the process
            )
        self._children.append(child)
        handle.truncate(0)
        handle.write(f"{job.name} {child.pid}")
        handle.flush()

    def _is_open(self, job: Job) -> bool:
        """Whether a job waits or is at work."""
        return job.started is None or self.current()[0] == job.name

    def _clear(self) -> None:
        """Jobs whose runs have a folder are told by that folder, but for a resume that was refused."""
        known = {run.path.name for run in self.workspace.runs()}
        for job in self.all():
            if job.name in known and not self._is_open(job) and not self.refused(job):
                self._drop(job.name)

    def refused(self, job: Job) -> bool:
        """Whether a run was to go on, did not, and its log may not say why."""
        said = self.said(job) if job.words[0] == "resume" and not self._is_open(job) else ""
        return "error[" in said and "error[STOP" not in said

    def _free_name(self, config: RunConfig) -> str:
        data = Path(str(config.data.train_file or "mix").removeprefix("sample:")).stem
        name = slug(config.output.run_name or f"{Path(str(config.model.name)).name}-{data}", 56) or "run"
        taken = {job.name for job in self.all()}
        if len(self.waiting()) >= MOST_WAITING:
            raise BusyError(3, f"{MOST_WAITING} runs are waiting already", fix="wait, or take some out of the queue")
        names = (name if number == 1 else f"{name}-{number}" for number in range(1, 100_000))
        return next(free for free in names if free not in taken and not (self.workspace.outputs / free).exists())

    def _put(self, job: Job) -> None:
        write_json(self.folder / f"{job.name}.json", asdict(job))

    def _drop(self, name: str) -> None:
        for ending in ("json", "yaml", "log"):
            (self.folder / f"{name}.{ending}").unlink(missing_ok=True)

    @contextmanager
    def _locked(self) -> Iterator[Any]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._inside, open(self.folder / "queue.lock", "a") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield handle
