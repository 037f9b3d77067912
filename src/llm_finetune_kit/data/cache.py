"""Token cache: what a data file became under a tokenizer, found again by content.

Entries are written whole, so a killed process or two at once leave a complete entry or none. A cache that
cannot be written costs time, never the run.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm_finetune_kit.data.masks import Tokens

VERSION = 8  # of masks, formats and templates: raise it when the same input would become other tokens


def cache_home() -> Path:
    """LLM_FINETUNE_KIT_CACHE, or the user's cache folder."""
    asked = os.environ.get("LLM_FINETUNE_KIT_CACHE")
    if asked:
        return Path(asked)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llm_finetune_kit"


def file_fingerprint(path: Path) -> str:
    """SHA-256 of a file's bytes, as `sources.Source.fingerprint` has it."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def entry(fingerprint: str, settings: dict[str, Any]) -> Path:
    """Where tokens of this data under these settings (tokenizer, template, format…) are or would be."""
    key = hashlib.sha256(json.dumps([VERSION, settings], sort_keys=True).encode()).hexdigest()
    return cache_home() / "tokens" / f"{fingerprint[:32]}-{key[:32]}.safetensors"


def load(path: Path) -> tuple[Tokens, np.ndarray, dict[str, Any]] | None:
    """Tokens, sketches (see `similar.sketch`) and the report that were stored, or None if there is no sound entry."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            report = json.loads(file.metadata()["report"])
            arrays = {name: file.get_tensor(name) for name in ("ids", "trained", "starts", "rows", "sketches")}
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return None
    tokens = Tokens(arrays["ids"], arrays["trained"].astype(bool), arrays["starts"], arrays["rows"])
    return tokens, arrays["sketches"], report


def store(path: Path, tokens: Tokens, sketches: np.ndarray, report: dict[str, Any]) -> None:
    """Keep the tokens for the next run."""
    from safetensors.numpy import save_file

    arrays = {
        "ids": tokens.ids,
        "trained": tokens.trained.astype(np.uint8),
        "starts": tokens.starts,
        "rows": tokens.rows,
        "sketches": sketches,
    }
    _put(path, lambda draft: save_file(arrays, draft, {"report": json.dumps(report)}))


def load_json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def store_json(path: Path, content: dict[str, Any]) -> None:
    _put(path, lambda draft: draft.write_text(json.dumps(content), encoding="utf-8"))


def _put(path: Path, write: Callable[[Path], Any]) -> None:
    """Write beside the place and move there whole; who comes last of two wins, with the same content."""
    from safetensors import SafetensorError

    draft = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(draft)
        with open(draft, "rb") as file:
            os.fsync(file.fileno())  # a power cut must not leave a whole name on a half content
        os.replace(draft, path)
    except (OSError, SafetensorError):
        with suppress(OSError):
            draft.unlink()


@dataclass(frozen=True)
class Entry:
    """One file of the cache, for people who look at it."""

    path: Path
    size_bytes: int
    used: float  # seconds since 1970
    data: str
    examples: int | None  # None for what holds no tokens


def entries() -> list[Entry]:
    """All that is in the cache, the newest first; what was left behind by a killed process among it."""
    from safetensors import SafetensorError, safe_open

    found = []
    for path in (cache_home() / "tokens").glob("*"):
        if path.suffix == ".read":
            continue
        data, examples = "unfinished" if path.suffix == ".part" else "survey of a large file", None
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="np") as file:
                    report = json.loads(file.metadata()["report"])
                data, examples = str(report.get("name", "")), int(report.get("examples", 0))
            info = path.stat()
        except (OSError, SafetensorError, KeyError, ValueError, TypeError):
            continue
        found.append(Entry(path, info.st_size, info.st_mtime, data, examples))
    return sorted(found, key=lambda entry: -entry.used)


def clear() -> tuple[int, int]:
    """Remove all entries; how many there were, and their bytes. A run that reads one of them keeps it open."""
    removed = size = 0
    for path in (cache_home() / "tokens").glob("*"):
        try:
            bytes_of_it = path.stat().st_size
            path.unlink()
        except OSError:
            continue
        removed, size = removed + 1, size + bytes_of_it
    return removed, size
