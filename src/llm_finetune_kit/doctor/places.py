"""The folders that runs write to, their disk and file system, and the hub."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from llm_finetune_kit.data.cache import cache_home
from llm_finetune_kit.doctor.check import Check
from llm_finetune_kit.errors import MachineError

LITTLE_DISK = 5e9  # a 7B model's adapter run writes less, its download more
NO_DISK = 2e8
PATIENCE = 4.0  # seconds to wait for the hub


def output(folder: Path) -> Check:
    place = existing(folder)
    trouble = _trouble(place)
    if trouble:
        return Check("output", "fail", f"{place} cannot be written: {trouble}", "choose another: --output-dir FOLDER")
    return Check("output", "ok", f"{place} can be written")


def home() -> Check:
    try:
        place = Path.home()
    except RuntimeError as error:
        return Check("home", "warn", str(error), "export HOME=FOLDER, or HF_HOME and XDG_CACHE_HOME")
    if not place.is_dir() or _trouble(place):
        fix = "export HF_HOME=FOLDER and LLM_FINETUNE_KIT_CACHE=FOLDER"
        return Check("home", "warn", f"{place} is missing or cannot be written: {_trouble(place)}", fix)
    return Check("home", "ok", f"{place} can be written")


def temporary() -> Check:
    try:
        place = Path(tempfile.gettempdir())
    except OSError as error:
        return Check("temporary files", "fail", str(error), "export TMPDIR=FOLDER, one that can be written")
    asked = os.environ.get("TMPDIR")
    if asked and place.resolve() != Path(asked).resolve():
        return Check("temporary files", "warn", f"TMPDIR={asked} cannot be written; {place} is used", "mkdir it, or unset TMPDIR")
    return Check("temporary files", "ok", f"{place} can be written")


def hub_cache() -> Check:
    from huggingface_hub import constants

    return _cache("hub cache", Path(constants.HF_HUB_CACHE), "HF_HOME")


def own_cache() -> Check:
    return _cache("cache", cache_home(), "LLM_FINETUNE_KIT_CACHE")


def _cache(name: str, place: Path, variable: str) -> Check:
    trouble = _trouble(existing(place))
    if trouble:
        return Check(name, "warn", f"{place} cannot be written: {trouble}", f"export {variable}=FOLDER, one that can be written")
    free = shutil.disk_usage(existing(place)).free
    if free < LITTLE_DISK:
        return Check(
            name, "warn", f"{free / 1e9:.1f} GB are free in {place}", f"free some, or export {variable}=FOLDER on a larger disk"
        )
    return Check(name, "ok", f"{place}, {free / 1e9:.0f} GB free")


def disk(folder: Path) -> Check:
    free = shutil.disk_usage(existing(folder)).free
    fix = "free some, or choose another disk: --output-dir FOLDER; `finetune plan` tells what a run needs"
    if free < LITTLE_DISK:
        return Check("disk", "fail" if free < NO_DISK else "warn", f"{free / 1e9:.1f} GB are free for output", fix)
    return Check("disk", "ok", f"{free / 1e9:.0f} GB are free for output")


def file_system(folder: Path) -> Check:
    fault = file_system_fault(folder)
    if fault:
        return Check("file system", "fail", fault, "choose an output folder on a local disk: --output-dir FOLDER")
    return Check("file system", "ok", "locks and renames work in the output folder")


def check_file_system(folder: Path) -> None:
    """Raise MachineError where runs could not be guarded or committed, before anything is trained."""
    fault = file_system_fault(folder)
    if fault:
        fix = "choose an output folder on a local disk: --output-dir FOLDER"
        raise MachineError(37, fault, where=str(existing(folder)), why="a crash could then damage checkpoints", fix=fix)


def file_system_fault(folder: Path) -> str | None:
    """What of the commit protocol does not work where `folder` is or will be; None if all of it does.

    Network file systems may lack locks, or take them without keeping anybody out.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=".tmp-probe-", dir=existing(folder)) as name:
            for what_fails, trial in TRIALS.items():
                try:
                    trial(Path(name))
                except OSError as error:
                    return f"{what_fails}: {error.strerror or error}"
    except OSError as error:
        return f"folders cannot be made or removed: {error.strerror or error}"
    return None


def _write(place: Path) -> None:
    (place / "draft").mkdir()
    with open(place / "draft" / "file", "wb") as file:
        file.write(b"probe")
        file.flush()
        os.fsync(file.fileno())


def _rename(place: Path) -> None:
    os.replace(place / "draft", place / "whole")
    if (place / "whole" / "file").read_bytes() != b"probe" or (place / "draft").exists():
        raise OSError("the renamed folder is not what was written")


def _replace(place: Path) -> None:
    (place / "part").write_bytes(b"new")
    os.replace(place / "part", place / "whole" / "file")
    if (place / "whole" / "file").read_bytes() != b"new":
        raise OSError("the old file stayed")


def _lock(place: Path) -> None:
    with open(place / "lock", "w") as first, open(place / "lock", "w") as second:
        fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        raise OSError("a second process would be let in")


TRIALS: dict[str, Callable[[Path], None]] = {
    "files cannot be written and synced": _write,
    "folders cannot be renamed": _rename,
    "files cannot be replaced": _replace,
    "files cannot be locked": _lock,
}


def hub(online: bool) -> Check:
    """Whether the hub answers, asked only when wanted."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        fix = "unset HF_HUB_OFFLINE to fetch new models" if online else ""
        return Check("hub", "warn" if online else "ok", "HF_HUB_OFFLINE is set: only models on this machine are used", fix)
    if not online:
        return Check("hub", "ok", "not asked; --online asks it")
    from urllib.error import HTTPError, URLError
    from urllib.request import Request, urlopen

    try:
        with urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=PATIENCE):
            pass
    except HTTPError:
        pass  # it answers, and that was the question
    except (URLError, OSError) as error:
        why = getattr(error, "reason", error)
        fix = "connect, set HTTPS_PROXY or HF_ENDPOINT, or use models on this machine"
        return Check("hub", "warn", f"{constants.ENDPOINT} does not answer: {why}", fix)
    return Check("hub", "ok", f"{constants.ENDPOINT} answers")


def existing(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that is there."""
    folder = folder.absolute()
    while not folder.is_dir():
        folder = folder.parent
    return folder


def _trouble(place: Path) -> str:
    """Why nothing can be written there; empty if it can. Rights alone do not tell: the disk may be full or read-only."""
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"probe")
            file.flush()
    except OSError as error:
        return error.strerror or str(error)
    return ""
