"""A run is a folder: its lock, its event log, and folders that are either complete or absent.

Commit protocol: write beside the target, fsync every file, write `manifest.json` last, fsync, rename, fsync the
parent. A folder without a manifest that verifies does not count. No absolute path is stored anywhere.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llm_finetune_kit.errors import BusyError, MachineError, UsageError, nearest
from llm_finetune_kit.events import Event, Finished, Resumed, Saved, Stepped, from_record, to_record

MANIFEST = "manifest.json"
EVENTS = "events.jsonl"


def write_whole(path: Path, text: str) -> None:
    """All of it or none of it: a crash must not leave half a file that looks finished."""
    draft = path.with_name(f".{path.name}.part")
    with open(draft, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


def write_json(path: Path, tree: Any) -> None:
    write_whole(path, json.dumps(tree, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def commit(target: Path, write: Callable[[Path], None], facts: dict[str, Any]) -> int:
    """Make `target` hold what `write(folder)` writes, all at once, and return its size in bytes.

    `facts` go into the manifest. Raises MachineError (disk full, read-only) and leaves no partial folder.
    """
    draft = target.with_name(f".tmp-{target.name}-{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir(parents=True)
        write(draft)
        files = {str(path.relative_to(draft)): _seal(path) for path in sorted(draft.rglob("*")) if path.is_file()}
        write_json(draft / MANIFEST, {**facts, "files": files})
        _sync_folder(draft)
        if target.exists():
            old = target.with_name(f".trash-{target.name}-{os.getpid()}")
            os.replace(target, old)
            os.replace(draft, target)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(draft, target)
        _sync_folder(target.parent)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise MachineError(
            10, f"cannot be written: {error.strerror}", where=str(target), fix="free some disk space, then run `finetune resume`"
        ) from error
    return sum(entry["size"] for entry in files.values())


def _seal(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else _digest(file)
        os.fsync(file.fileno())
        return {"size": os.fstat(file.fileno()).st_size, "sha256": digest.hexdigest()}


def _digest(file: Any) -> Any:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fault(folder: Path) -> str | None:
    """Why a committed folder cannot be trusted, or None if every file is what its manifest says."""
    try:
        manifest = read_json(folder / MANIFEST)
        files = manifest["files"]
    except FileNotFoundError:
        return "has no manifest: it was not written to its end"
    except (OSError, ValueError, KeyError, TypeError):
        return "its manifest cannot be read"
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["size"]:
            return f"{name} has {path.stat().st_size} bytes instead of {entry['size']}"
        with open(path, "rb") as file:
            if _digest(file).hexdigest() != entry["sha256"]:
                return f"{name} is damaged (its SHA-256 differs)"
    return None


class RunFolder:
    """The folder of one run. `path` is where it is now; nothing in it depends on that."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: Any = None
        self._log: Any = None

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
        handle = open(self.path / ".lock", "a+")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            holder = handle.read().strip()
            handle.close()
            raise BusyError(
                1, "another process works in this run", where=str(self.path), why=holder, fix="wait for it, or start a new run"
            ) from None
        except OSError as error:
            handle.close()
            fix = "choose an output folder on a local disk: --output-dir FOLDER"
            problem = f"files cannot be locked: {error.strerror}"
            raise MachineError(37, problem, where=str(self.path), fix=fix) from None
        handle.truncate(0)
        handle.write(f"process {os.getpid()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        handle.flush()
        self._clear_drafts()
        self._log = open(self.path / EVENTS, "a+", encoding="utf-8")
        self._end_torn_line()
        try:
            yield
        finally:
            self._log.close()
            self._log = None
            handle.close()

    def _clear_drafts(self) -> None:
        """Remove what a process that died was writing; what it was replacing goes back to its place."""
        for path in self.path.glob(".trash-*"):
            kept = path.with_name(path.name.removeprefix(".trash-").rpartition("-")[0])
            if not kept.exists():
                os.replace(path, kept)
        for path in [*self.path.glob(".tmp-*"), *self.path.glob(".trash-*")]:
            shutil.rmtree(path, ignore_errors=True)
        for path in self.path.glob(".*.part"):
            path.unlink(missing_ok=True)

    def _end_torn_line(self) -> None:
        """A process that died may have left half a line, which must not spoil the next one."""
        if self._log.tell() > 0:
            self._log.seek(self._log.tell() - 1)
            if self._log.read() != "\n":
                self._log.write("\n")

    def record(self, event: Event) -> None:
        """Append an event to the log. A full disk costs the line, never the run."""
        if self._log is None:
            return
        try:
            self._log.write(json.dumps(to_record(event, time.time()), ensure_ascii=False, default=str) + "\n")
            self._log.flush()
        except OSError:
            pass

    def replay(self) -> list[Event]:
        """What the run said, without steps that a later resume made void and without a torn last line."""
        told: list[Event] = []
        try:
            lines = (self.path / EVENTS).read_text(encoding="utf-8").split("\n")
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
    """What was told of steps before the checkpoint was saved, and all that is not about steps."""
    saved = [place for place, event in enumerate(told) if isinstance(event, Saved) and event.folder == resumed.checkpoint]
    last = saved[-1] if saved else len(told)
    return [
        event
        for place, event in enumerate(told)
        if isinstance(event, Resumed)
        or getattr(event, "step", -1) <= (resumed.step if resumed.checkpoint and place <= last else -1)
    ]


def runs(output_dir: Path) -> list[RunFolder]:
    """All runs under a folder, the last started first."""
    found = [path.parent for path in output_dir.glob(f"*/{EVENTS}")]
    return [RunFolder(path) for path in sorted(found, key=_started, reverse=True)]


def _started(run: Path) -> int:
    """When the run was written its config; one that was killed before that comes last."""
    try:
        return (run / "config.yaml").stat().st_mtime_ns
    except OSError:
        return 0


def find_run(name: str | None, output_dir: Path) -> RunFolder:
    """The run a user means: a path, a name under `output_dir`, or without a name the last unfinished one.

    Raises UsageError where there is none.
    """
    if name is not None:
        for path in (Path(name), output_dir / name):
            if (path / EVENTS).is_file():
                return RunFolder(path)
        known = [run.path.name for run in runs(output_dir)]
        near = nearest(Path(name).name, known) or known[:3]
        fix = f"did you mean {' or '.join(near)}?" if near else f"{output_dir} holds no runs; start one with `finetune train`"
        raise UsageError(3, f"no run is called {name}", where=str(output_dir), fix=fix)
    for run in runs(output_dir):
        if not run.finished:
            return run
    finished = [str(run.path) for run in runs(output_dir)]
    fix = "start one with `finetune train`, or name its folder with --output-dir"
    if finished:
        fix = f"to train one for longer: finetune resume {finished[0]} --max-steps N"
    raise UsageError(3, "no unfinished run" if finished else "no run is here", where=str(output_dir), fix=fix)


def find_result(path: str) -> Path:
    """The model folder that a path means: itself, a run's `final/`, or `OUTPUTS/final` and `OUTPUTS/checkpoint-N`
    of the newest run under OUTPUTS that has it.

    Raises UsageError naming what there is. Paths that are no part of any run come back as they are.
    """
    asked = Path(path)
    if (asked / EVENTS).is_file():
        run = RunFolder(asked)
        if run.finished:
            return run.final
        if run.checkpoints():
            return run.checkpoints()[0]
        raise UsageError(5, "the run has no model yet", where=path, fix=f"go on with: finetune resume {path}")
    if asked.is_dir():
        return asked
    if not re.fullmatch(r"final|checkpoint-\d+", asked.name):
        return find_run(asked.name, asked.parent).path if "/" in path and runs(asked.parent) else asked
    for run in runs(asked.parent):
        if (run.path / asked.name).is_dir():
            return run.path / asked.name
    held = [str(folder) for run in runs(asked.parent) for folder in (run.final, *run.checkpoints()) if folder.is_dir()]
    fix = f"there is {', '.join(held[:4])}" if held else "train first: finetune train --model demo --data sample:chat"
    raise UsageError(5, f"no run has a {asked.name}", where=str(asked.parent), fix=fix)
