"""The hub's client, kept quiet: it asks for the dataset alone, gives up at once where nobody answers, and its errors
become ours."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from llm_finetune_kit.errors import DataError, KitError, MachineError

DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
PATIENCE = 4.0  # seconds to wait for the hub's first answer


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Let `datasets` ask the hub for the dataset alone: no counting, no other server; nothing if nobody answers."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when the hub's client is imported
    import datasets
    import huggingface_hub
    from datasets import config

    wanted = {"USE_PARQUET_EXPORT": False, "HF_UPDATE_DOWNLOAD_COUNTS": False}
    if not config.HF_HUB_OFFLINE and not _answers(config.HF_ENDPOINT):
        wanted["HF_HUB_OFFLINE"] = True
    before = {name: getattr(config, name) for name in wanted if hasattr(config, name)}
    speakers = (datasets.logging, huggingface_hub.logging)
    loud, bars = [speaker.get_verbosity() for speaker in speakers], datasets.are_progress_bars_disabled()
    try:
        for name in before:
            setattr(config, name, wanted[name])
        for speaker in speakers:
            speaker.set_verbosity_error()
        datasets.disable_progress_bars()
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)
        for speaker, level in zip(speakers, loud, strict=True):
            speaker.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()


def _answers(endpoint: str) -> bool:
    """Whether somebody answers there: the hub's client would wait for minutes where packets are dropped."""
    place = urlsplit(endpoint)
    if place.hostname is None or (place.scheme in getproxies() and not proxy_bypass(place.hostname)):
        return True
    try:
        port = place.port or (443 if place.scheme == "https" else 80)
        socket.create_connection((place.hostname, port), timeout=PATIENCE).close()
    except OSError:
        return False
    return True


@contextmanager
def told(hub_id: str) -> Iterator[None]:
    """What `datasets` raises, in words that say what to do."""
    from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError

    try:
        yield
    except KitError:
        raise
    except DatasetNotFoundError as error:
        raise _not_found(hub_id, "gated" in str(error)) from None
    except DataFilesNotFoundError:
        fix = "choose a dataset of JSON, CSV, Parquet, Arrow or text files"
        raise DataError(75, "holds no data file that is opened", where=hub_id, fix=fix) from None
    except Exception as error:  # whatever stands between here and the hub raises its own kinds
        raise _failed(hub_id, error) from None


def _not_found(hub_id: str, gated: bool) -> DataError:
    from datasets import config

    if gated:
        fix = f"accept its terms on {config.HF_ENDPOINT}/datasets/{hub_id} and set HF_TOKEN"
        return DataError(71, "is gated: the hub gives it only to those who accepted its terms", where=hub_id, fix=fix)
    problem = "is no file here, and the hub has no such dataset, or a private one"
    return DataError(70, problem, where=hub_id, fix="check the spelling; private datasets need HF_TOKEN")


def _failed(hub_id: str, error: Exception) -> KitError:
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and len(causes) < 10:
        causes.append(cause)  # type: ignore[arg-type]
    said = (str(causes[-1]).strip().splitlines() or [type(error).__name__])[0][:200]
    if "scripts are no longer supported" in str(error):
        local = "dialogues_text.txt or its Parquet files" if "dialog" in hub_id else "its JSON, CSV or Parquet files"
        problem = "has only a loading script on the hub, and no code of a dataset is run"
        return DataError(74, problem, where=hub_id, fix=f"download the data ({local}) and name the local file")
    disk = next((one for one in causes if isinstance(one, OSError) and one.errno in DISK_FAULTS), None)
    if disk is not None:
        fix = "free the disk, or name another place by HF_HOME"
        return MachineError(2, "cannot be stored", where=hub_id, why=str(disk.strerror), fix=fix)
    if any(isinstance(one, ConnectionError | TimeoutError) or "httpx" in type(one).__module__ for one in causes):
        from huggingface_hub import constants

        said = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} does not answer"
        problem = f"{hub_id} is no file here and not in the hub's cache, and the hub cannot be reached"
        fix = "connect once to download it, or give a local file"
        return MachineError(1, problem, where="data", why=said, fix=fix)
    return DataError(76, f"its data cannot be read: {said}", where=hub_id, fix="look at its files on the hub, or download them")
