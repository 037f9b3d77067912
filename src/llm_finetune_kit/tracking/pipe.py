"""The process of one tracker as the run sees it: lines go in without ever waiting, lines come out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

MOST_WAITING = 16 << 20  # bytes of events that wait for a slow tracker before it is given up
START = "import json, sys; sys.path[:] = json.loads(sys.argv[2]); from {module} import main; main(sys.argv[1])"
QUIET = {  # no reports about the user's work to anybody; what the user set stays
    "WANDB_ERROR_REPORTING": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}


class Pipe:
    """A child process that runs a tracker. It has no terminal, so nothing in it can ask or print there."""

    def __init__(self, name: str) -> None:
        """Start the process. Raises OSError."""
        code = START.format(module="llm_finetune_kit.tracking.child")
        path = [part or os.getcwd() for part in sys.path]
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, name, json.dumps(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=QUIET | os.environ,
            start_new_session=True,  # Ctrl-C is for the run, which ends its trackers itself
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._into, self._out_of = self._process.stdin, self._process.stdout
        for stream in (self._into, self._out_of):
            os.set_blocking(stream.fileno(), False)
        self._waiting = bytearray()
        self._half = b""

    def send(self, record: dict[str, Any]) -> bool:
        """Hand on a record; False if too many wait already."""
        self._waiting += json.dumps(record, default=str).encode() + b"\n"
        self._push()
        return len(self._waiting) <= MOST_WAITING

    def _push(self) -> None:
        try:
            while self._waiting and not self._into.closed:
                written = os.write(self._into.fileno(), self._waiting)
                del self._waiting[:written]
        except BlockingIOError:
            pass
        except OSError:  # the process is gone; what it said last is read by `heard`
            self._waiting.clear()

    def heard(self) -> list[dict[str, Any]]:
        """What the process said since last time, without waiting."""
        code = self._process.poll()  # before reading: its last words are there when it has ended
        try:
            while block := os.read(self._out_of.fileno(), 1 << 16):
                self._half += block
        except BlockingIOError:
            pass
        *lines, self._half = self._half.split(b"\n")
        words: list[dict[str, Any]] = [json.loads(line) for line in lines]
        if code and not any("failed" in word for word in words):
            words.append({"failed": f"its process ended with code {code}"})
        return words

    def finish(self) -> None:
        """Say that nothing more will come; what still waits is written by `wait`."""
        self._push()
        if not self._waiting:
            self._into.close()

    def wait(self, deadline: float) -> bool:
        """Whether the process has ended by itself before `deadline` (of `time.monotonic`)."""
        while self._process.poll() is None:
            if time.monotonic() >= deadline:
                return False
            self.finish()
            time.sleep(0.01)
        return True

    def end(self) -> None:
        """End the process and what it started, if it is still there."""
        if self._process.poll() is None:
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            self._process.wait()
        for stream in (self._into, self._out_of):
            stream.close()
