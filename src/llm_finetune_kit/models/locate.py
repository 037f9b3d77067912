"""From a model's name to a folder on this disk. Needs no torch, so a wrong name is told at once."""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from llm_finetune_kit.catalog import DEMO, MODELS, SHORT_NAMES
from llm_finetune_kit.errors import MachineError, ModelError, nearest
from llm_finetune_kit.models.safety import check_folder, weight_files

WANTED = ["*.json", "*.jinja", "*.txt", "tokenizer.model", "*.tiktoken"]
WEIGHTS = "*.safetensors"
NOT_WANTED = ["onnx/*", "original/*", "consolidated*", "openvino/*", "coreml/*"]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
AHEAD = 1 << 20  # bytes of weights read at once
PATIENCE = 4.0  # seconds to wait for the hub's first answer


@dataclass(frozen=True)
class Located:
    """A model's files. `name` is a hub id, `demo` or the folder as the user gave it; code in it is run only if `trusted`."""

    name: str
    folder: Path
    trusted: bool = False

    @property
    def local(self) -> bool:
        """Whether it is no model of the hub."""
        return self.name == DEMO or Path(self.name).is_dir()

    @property
    def loadable(self) -> str:
        """What adapter_config.json records, so that plain PEFT finds the base: the hub id or the folder."""
        return str(self.folder.resolve()) if self.local else self.name


def demo_folder() -> Path:
    """The embedded model's folder inside the package."""
    return Path(str(files("llm_finetune_kit") / "assets" / "demo"))


def check_name(name: str) -> str:
    """The hub id or local folder that a name stands for; no network is used. Raises ModelError if neither."""
    if os.path.isdir(name):
        return name
    lower = name.lower()
    known = MODELS.get(SHORT_NAMES.get(lower, lower))
    if known is not None:
        return DEMO if lower == DEMO else known.hub_id
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or os.path.exists(name):
        raise ModelError(1, f"no model folder {name}", where="model.name", fix="name a folder that holds config.json")
    if "/" not in name:
        near = nearest(lower, [*MODELS, *SHORT_NAMES], 3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ModelError(
            1,
            f"no model is called {name}",
            where="model.name",
            fix=f"{hint}`finetune models` lists short names; a hub id has the form owner/name",
        )
    if not HUB_ID.fullmatch(name) or len(name) > 96 or ".." in name or "--" in name:  # the hub's own rules
        fix = "a hub id has the form owner/name, of letters, digits, dots and dashes"
        raise ModelError(1, f"no model can be called {name}", where="model.name", fix=fix)
    return name


def locate(
    name: str,
    *,
    revision: str | None = None,
    cache_dir: str | None = None,
    weights: bool = True,
    trust_remote_code: bool = False,
) -> Located:
    """The folder with the model's files, found sound. The hub is asked only for what is not on this disk yet.

    Without `weights` they are neither fetched nor needed: tokenizer and sizes are all that is wanted. Raises ModelError
    for a name that cannot be, damaged files, or code of the model's own unless `trust_remote_code` and, for a model of
    the hub, the `revision` that was read; MachineError where the hub cannot be reached.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when the hub's client is imported
    target = check_name(name)
    if target == DEMO:
        return _sound(DEMO, demo_folder(), weights, False)
    if Path(target).is_dir():
        return _sound(name, Path(target), weights, trust_remote_code)
    if trust_remote_code and revision is None:
        problem = f"code of {target} would be run in whatever version the hub has today"
        fix = "set model.revision to the commit whose code you have read, or leave model.trust_remote_code out"
        raise ModelError(34, problem, where="model.revision", fix=fix)
    wanted = [*WANTED, *([WEIGHTS] if weights else []), *(["*.py"] if trust_remote_code else [])]
    asked = {"revision": revision, "cache_dir": cache_dir, "allow_patterns": wanted, "ignore_patterns": NOT_WANTED}
    return _sound(target, _cached(target, asked, weights) or _download(target, asked), weights, trust_remote_code)


def _sound(name: str, folder: Path, weights: bool, trusted: bool) -> Located:
    if (_checked_folder(folder) / "config.json").is_file():
        check_folder(folder, weights=weights, trusted=trusted)
    return Located(name, folder, trusted)


def _cached(hub_id: str, asked: dict[str, Any], weights: bool) -> Path | None:
    """The model in the hub's cache if all of it that is wanted is there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(hub_id, local_files_only=True, **asked))
        index = folder / "model.safetensors.index.json"
        shards = {"model.safetensors"} if weights else set()
        if weights and index.is_file():
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (LocalEntryNotFoundError, OSError, ValueError, KeyError, AttributeError):
        return None
    # other programs may have fetched parts only
    whole = all((folder / name).is_file() for name in ("config.json", *shards))
    return folder if whole and any((folder / name).is_file() for name in TOKENIZERS) else None


def _download(hub_id: str, asked: dict[str, Any]) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        if not constants.HF_HUB_OFFLINE:
            _reach(constants.ENDPOINT)
        return Path(snapshot_download(hub_id, **asked))
    except GatedRepoError:
        fix = f"accept its licence on {constants.ENDPOINT}/{hub_id} and set HF_TOKEN, or choose a model that is not gated"
        raise ModelError(3, f"{hub_id} is gated", where="model.name", fix=fix) from None
    except RepositoryNotFoundError:
        raise ModelError(
            2, f"the hub has no model {hub_id}", where="model.name", fix="check the spelling; private models need HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        problem = f"{hub_id} has no revision {asked['revision']}"
        raise ModelError(8, problem, where="model.revision", fix="name a branch, a tag or a commit of it") from None
    except Exception as error:  # whatever stands between here and the hub raises its own kinds
        raise _not_downloaded(hub_id, error, str(asked["cache_dir"] or constants.HF_HUB_CACHE)) from None


def _reach(endpoint: str) -> None:
    """Raise OSError if nobody answers there: the hub's client itself would wait for minutes where packets are dropped."""
    place = urlsplit(endpoint)
    if place.hostname is None or (place.scheme in getproxies() and not proxy_bypass(place.hostname)):
        return
    port = place.port or (443 if place.scheme == "https" else 80)
    socket.create_connection((place.hostname, port), timeout=PATIENCE).close()


def _not_downloaded(hub_id: str, error: Exception, cache: str) -> MachineError:
    said = (str(error).strip().splitlines() or [type(error).__name__])[0].removeprefix("Got: ")[:200]
    if isinstance(error, OSError) and error.errno in DISK_FAULTS:
        problem, where = f"{hub_id} cannot be stored", str(error.filename or cache)
        fix = "free the disk, or name another place by model.cache_dir or HF_HOME"
        return MachineError(2, problem, where=where, why=error.strerror or said, fix=fix)
    return MachineError(
        1,
        f"{hub_id} is not on this machine and the hub cannot be reached",
        where="model.name",
        why=said,
        fix="connect once to download it, give a local folder, or use the embedded model: --model demo",
    )


def _checked_folder(folder: Path) -> Path:
    if (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
        return folder
    held = sorted(path.name for path in folder.iterdir())[:8] if folder.is_dir() else []
    raise ModelError(
        4,
        "holds no config.json",
        where=str(folder),
        why=f"it holds {', '.join(held) or 'nothing'}",
        fix="name the folder above or below",
    )


def read_ahead(folder: Path, room: int) -> threading.Thread | None:
    """Have a cold disk give a model's weights to the system's cache while its caller imports libraries and tokenizes rows.

    None where they need more than half of `room`, which is in bytes. A fault of the disk shows when they are loaded.
    """
    found = weight_files(folder)
    if 2 * sum(path.stat().st_size for path in found) > room:
        return None
    thread = threading.Thread(target=_read_through, args=(found,), name="read ahead", daemon=True)
    thread.start()
    return thread


def _read_through(paths: list[Path]) -> None:
    buffer = bytearray(AHEAD)
    with suppress(OSError):
        for path in paths:
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
