"""Files that are whole or absent, and folders likewise: the only door to the disk for what must not be lost.

Commit protocol: write beside the target, fsync every file, write `manifest.json` last, fsync, rename, fsync the
parent. A folder without a manifest that verifies does not count.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
DRAFT, OLD, TRASH = ".tmp-", ".old-", ".trash-"  # what is being written, replaced and removed
STEPS = ("make", "write", "sync", "rename", "remove", "log")  # what is done to a disk, as faults name it


# --- faults on purpose -------------------------------------------------------------------------------------


@dataclass
class Fault:
    """What is to go wrong, for tests: the k-th (or with `+` every later) `step` kills the process or raises an OSError."""

    step: str
    first: int
    lasting: bool
    effect: str
    done: int = 0

    def at(self, step: str, path: Path) -> None:
        if self.step not in ("any", step):
            return
        self.done += 1
        if self.done == self.first or (self.lasting and self.done > self.first):
            if self.effect == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            number = getattr(errno, self.effect)
            raise OSError(number, os.strerror(number), str(path))


def fault_from(text: str | None) -> Fault | None:
    """`rename:3:kill`, `any:17:EIO` or `write:2+:ENOSPC` as a Fault. Raises ValueError for anything else."""
    if not text:
        return None
    found = re.fullmatch(rf"(any|{'|'.join(STEPS)}):(\d+)(\+?):(kill|E[A-Z]+)", text)
    if found is None or not (found[4] == "kill" or hasattr(errno, found[4])):
        raise ValueError(f"{text!r} is no fault; for example rename:3:kill or write:2+:ENOSPC")
    return Fault(found[1], int(found[2]), bool(found[3]), found[4])


armed: Fault | None = fault_from(os.environ.get("FINETUNE_FAULT"))


def about_to(step: str, path: Path) -> None:
    """Said before every step on the disk; where a test has armed a fault, it strikes here."""
    if armed is not None:
        armed.at(step, path)


# --- files -------------------------------------------------------------------------------------------------


def write_bytes(path: Path, content: bytes) -> None:
    """All of it or none of it: a crash must not leave half a file that looks finished."""
    draft = path.with_name(f".{path.name}.part")
    about_to("write", draft)
    with open(draft, "wb") as file:
        file.write(content)
        file.flush()
        about_to("sync", draft)
        os.fsync(file.fileno())
    about_to("rename", path)
    os.replace(draft, path)


def write_whole(path: Path, text: str) -> None:
    """A text file, all of it or none of it."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, tree: Any) -> None:
    write_whole(path, json.dumps(tree, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


# --- folders -----------------------------------------------------------------------------------------------


def commit(target: Path, write: Callable[[Path], None], facts: dict[str, Any]) -> int:
    """Make `target` hold what `write(folder)` writes, all at once, and return its size in bytes.

    `facts` go into the manifest. Raises OSError (disk full, read-only, gone) and then leaves what was there before.
    """
    draft = target.with_name(f"{DRAFT}{target.name}-{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        about_to("make", draft)
        draft.mkdir()
        write(draft)
        files = {str(path.relative_to(draft)): _seal(path) for path in sorted(draft.rglob("*")) if path.is_file()}
        manifest = {**facts, "files": files}
        write_json(draft / MANIFEST, manifest | {"seal": _seal_of(manifest)})
        _sync_folder(draft)
        _put_in_place(draft, target)
        _sync_folder(target.parent)
    except BaseException as error:
        shutil.rmtree(draft, ignore_errors=True)
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found and not isinstance(error, OSError):  # safetensors' own error holds the system's as text
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(target)) from error
        raise
    return sum(entry["size"] for entry in files.values())


def _put_in_place(draft: Path, target: Path) -> None:
    old = target.with_name(f"{OLD}{target.name}-{os.getpid()}")
    replaces = target.exists()
    if replaces:
        about_to("rename", old)
        os.replace(target, old)
    try:
        about_to("rename", target)
        os.replace(draft, target)
    except OSError:
        if replaces:
            os.replace(old, target)
        raise
    if replaces:
        remove(old)


def remove(folder: Path) -> bool:
    """Remove a folder, which is gone at once or not at all; False if it could not be."""
    trash = folder.with_name(f"{TRASH}{folder.name.lstrip('.')}-{os.getpid()}")
    try:
        about_to("rename", trash)
        os.replace(folder, trash)
        about_to("remove", trash)
        shutil.rmtree(trash)
    except OSError:
        return False
    return True


def clear_drafts(folder: Path) -> None:
    """Remove what a process that died was writing or removing; what it was replacing goes back to its place."""
    for path in folder.glob(f"{OLD}*"):
        kept = path.with_name(path.name.removeprefix(OLD).rpartition("-")[0])
        if not kept.exists():
            os.replace(path, kept)
    for path in (path for kind in (DRAFT, OLD, TRASH) for path in folder.glob(f"{kind}*")):
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(".*.part"):
        path.unlink(missing_ok=True)


def _seal(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = _digest(file)
        about_to("sync", path)
        os.fsync(file.fileno())
        return {"size": os.fstat(file.fileno()).st_size, "sha256": digest.hexdigest()}


def _digest(file: Any) -> Any:
    if hasattr(hashlib, "file_digest"):  # from Python 3.11 on
        return hashlib.file_digest(file, "sha256")
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest


def _seal_of(manifest: dict[str, Any]) -> str:
    """SHA-256 of all that a manifest says, so that its own damage shows too."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sync_folder(folder: Path) -> None:
    about_to("sync", folder)
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def damage(folder: Path) -> str | None:
    """Why a committed folder cannot be trusted, or None if every file is what its manifest says."""
    try:
        manifest = read_json(folder / MANIFEST)
        seal = manifest.pop("seal", None)
        entries = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
    except FileNotFoundError:
        return "has no manifest: it was not written to its end"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "its manifest cannot be read"
    if seal is None:
        return "its manifest has no seal: an earlier version wrote it"
    if seal != _seal_of(manifest):
        return "its manifest is damaged (its seal differs)"
    for name, (size, sha256) in entries.items():
        path = folder / name
        try:
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes instead of {size}"
            with open(path, "rb") as file:
                if _digest(file).hexdigest() != sha256:
                    return f"{name} is damaged (its SHA-256 differs)"
        except (OSError, ValueError) as error:
            return f"{name!r} cannot be read: {error}"
    return None
