"""Token cache: what a data file became under a tokenizer, found again by content.

Entries are written whole, so a killed process or two at once leave a complete entry or none. A cache that
cannot be written costs time, never the run.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from llm_finetune_kit.data.masks import Tokens

VERSION = 3  # of masks, formats and templates: raise it when the same input would become other tokens


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


def load(path: Path) -> tuple[Tokens, dict[str, Any]] | None:
    """The tokens and the report that were stored, or None if there is no sound entry."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            report = json.loads(file.metadata()["report"])
            arrays = {name: file.get_tensor(name) for name in ("ids", "trained", "starts", "rows")}
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return None
    return Tokens(arrays["ids"], arrays["trained"].astype(bool), arrays["starts"], arrays["rows"]), report


def store(path: Path, tokens: Tokens, report: dict[str, Any]) -> None:
    """Keep the tokens for the next run."""
    from safetensors.numpy import save_file

    arrays = {"ids": tokens.ids, "trained": tokens.trained.astype(np.uint8), "starts": tokens.starts, "rows": tokens.rows}
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(arrays, draft, {"report": json.dumps(report)})
        os.replace(draft, path)
    except OSError:
        draft.unlink(missing_ok=True)
