"""Rows of hub datasets, through `datasets`: only data files are opened, no code of a dataset is ever run.

The hub's client obeys HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE. What was fetched once is found again
without a network.
"""

# Faults of this module and of hub_client.py (MachineError: 1 the hub cannot be reached, 2 the disk):
#
#   70  no such dataset      72  no such config      74  only a script, which is not run      76  its data cannot be read
#   71  gated or private     73  no such split       75  no kind of file that is opened

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from llm_finetune_kit.data.sources.columnar import plain_rows
from llm_finetune_kit.data.sources.folders import PART_OF, PARTS, beside
from llm_finetune_kit.data.sources.hub_client import quiet_hub, told
from llm_finetune_kit.data.sources.spec import Spec
from llm_finetune_kit.errors import DataError, nearest

HUB_IDS = {
    "alpaca": "tatsu-lab/alpaca", "daily_dialog": "li2017dailydialog/daily_dialog",
    "dailydialog": "li2017dailydialog/daily_dialog",
}  # fmt: skip
LICENCES = {"tatsu-lab/alpaca": "CC BY-NC 4.0", "li2017dailydialog/daily_dialog": "CC BY-NC-SA 4.0"}
READERS = ("json", "csv", "parquet", "arrow", "text", "cache")  # those of `datasets` that open data files and no pickle
CONVERTED = "refs/convert/parquet"  # where the hub keeps its own Parquet copy of a dataset


@dataclass(frozen=True)
class Licence:
    """What a dataset may be used for, as far as it is known."""

    name: str
    commercial: bool


@dataclass(frozen=True)
class HubRows:
    """Rows of one split, their numbers from 1 in it, and what is known about the dataset."""

    name: str
    rows: list[dict[str, Any]]
    numbers: Sequence[int]
    fingerprint: str
    notes: list[str]
    licence: Licence | None


def read_hub(asked: Spec, seed: int) -> HubRows:
    """The rows of a hub dataset that `asked` names. Raises DataError and MachineError."""
    hub_id = HUB_IDS.get(asked.base, asked.base)
    with quiet_hub(), told(hub_id):
        builder, split = _open(hub_id, asked)
        builder.download_and_prepare()
        data = builder.as_dataset(split)
        if not len(data):
            raise DataError(27, f"the split '{split}' holds no row", where=hub_id, fix="name another split")
        chosen = asked.choose(len(data), seed)
        table = data.select(chosen).with_format("arrow")[:]
        licence = licence_of(hub_id)
    config = builder.config.name
    name = f"{hub_id}:{split}" if config == "default" else f"{hub_id}:{config}:{split}"
    notes = []
    if _reader(builder) == "cache":
        notes.append(f"{hub_id}: the hub cannot be reached or has it no longer; the copy on this machine is used")
    rows = plain_rows(table, name, notes)
    identity = f"{hub_id} {config} {split} {builder.hash}"
    if len(chosen) < len(data):
        identity += f" {list(chosen)}"
    notes += replace(asked, base=name).said(len(chosen), len(data), seed)
    numbers = array("L", (number + 1 for number in chosen))
    return HubRows(name, rows, numbers, hashlib.sha256(identity.encode()).hexdigest(), notes, licence)


def hub_part_beside(asked: Spec) -> str | None:
    """The spec of the validation (else test) split, if `asked` means the training split. Raises as `read_hub`."""
    hub_id = HUB_IDS.get(asked.base, asked.base)
    with quiet_hub(), told(hub_id):
        builder, split = _open(hub_id, asked)
        other = beside(_splits(builder), split)
    config = asked.parts[:-1] if asked.parts and PART_OF.get(asked.parts[-1].lower()) else asked.parts
    return ":".join([asked.base, *config, other]) if other else None


def licence_of(name: str) -> Licence | None:
    """The licence that is known, or that the dataset's card (if it was fetched) states."""
    hub_id = HUB_IDS.get(name, name)
    said = LICENCES.get(hub_id) or _licence_on_card(hub_id)
    if not said:
        return None
    return Licence(said, not re.search(r"\bnc\b|non-?commercial", said, re.IGNORECASE))


def _licence_on_card(hub_id: str) -> str | None:
    from huggingface_hub import DatasetCard, try_to_load_from_cache

    path = try_to_load_from_cache(hub_id, "README.md", repo_type="dataset")
    if not isinstance(path, str):
        return None
    try:
        stated = DatasetCard.load(path).data.license
    except Exception:  # a card is prose with YAML on top, written by hand: nothing in it may stop the reading
        return None
    return ", ".join(map(str, stated)) if isinstance(stated, list) else stated


# --- which config and split --------------------------------------------------------------------------------


def _open(hub_id: str, asked: Spec) -> tuple[Any, str]:
    """The builder (of `datasets`) of one config, and a split of it that exists."""
    config, split = _config_and_split(asked)
    try:
        builder = _load(hub_id, config)
    except ValueError as error:
        if config is None or len(asked.parts) == 2:
            raise _no_config(hub_id, config, error) from None
        try:
            builder, split = _load(hub_id, None), config  # a split of an unusual name
        except ValueError:
            raise _no_config(hub_id, config, error) from None
        if config not in _splits(builder):
            raise _no_config(hub_id, config, error, _splits(builder)) from None
    return builder, _split(hub_id, _splits(builder), split)


def _config_and_split(asked: Spec) -> tuple[str | None, str | None]:
    """One part alone is a split if it has a split's usual name, else (first of all) a config."""
    if len(asked.parts) == 2:
        return asked.parts[0], asked.parts[1]
    part = asked.parts[0] if asked.parts else None
    return (None, part) if part is None or part.lower() in PART_OF else (part, None)


def _load(hub_id: str, config: str | None) -> Any:
    """The builder of a config, or of the hub's own Parquet copy. ValueError if there is no such config."""
    from datasets import load_dataset_builder
    from datasets.exceptions import DataFilesNotFoundError

    try:
        builder = load_dataset_builder(hub_id, config)
    except (RuntimeError, DataFilesNotFoundError) as error:
        if isinstance(error, RuntimeError) and "scripts" not in str(error):
            raise
        builder = _converted(hub_id, config)
        if builder is None:
            raise
    if _reader(builder) not in READERS:
        problem = f"its files are of the kind '{_reader(builder)}', which is not opened"
        fix = "choose a dataset of JSON, CSV, Parquet, Arrow or text files"
        raise DataError(75, problem, where=hub_id, why="only data files without code are opened", fix=fix)
    return builder


def _converted(hub_id: str, config: str | None) -> Any:
    """The builder of the hub's own Parquet copy, which has a folder for each config; None if there is none."""
    from datasets import load_dataset_builder
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.hf_api import RepoFolder

    try:
        entries = list(HfApi().list_repo_tree(hub_id, revision=CONVERTED, repo_type="dataset"))
    except HfHubHTTPError:
        return None
    configs = [entry.path for entry in entries if isinstance(entry, RepoFolder)]
    if len(configs) > 1:
        problem = f"has only a loading script, and the hub's Parquet copy has several configs: {', '.join(configs)}"
        raise DataError(75, problem, where=hub_id, fix="download the Parquet files of one of them and name their folder")
    if config is not None and config not in configs:
        raise ValueError(f"Available: {configs}")
    return load_dataset_builder(hub_id, revision=CONVERTED)


def _reader(builder: Any) -> str:
    return str(builder.__module__).rpartition(".")[2]


def _splits(builder: Any) -> list[str]:
    """The names of the splits: of the data files, or in the cache of what was prepared."""
    return [str(name) for name in (getattr(builder.config, "data_files", None) or builder.info.splits or ())]


def _split(hub_id: str, splits: list[str], asked: str | None) -> str:
    if asked is None:
        if "train" in splits or len(splits) == 1:
            return "train" if "train" in splits else splits[0]
    elif asked in splits:
        return asked
    else:
        same = [split for split in splits if split in PARTS.get(PART_OF.get(asked.lower(), ""), ())]
        if len(same) == 1:
            return same[0]
    problem, why = f"has no split '{asked or 'train'}'", f"it has {', '.join(splits) or 'none'}"
    raise DataError(73, problem, where=hub_id, why=why, fix=f"name one, such as {hub_id}:{splits[0] if splits else 'SPLIT'}")


def _no_config(hub_id: str, config: str | None, error: ValueError, splits: list[str] | None = None) -> DataError:
    listed = re.search(r"\[.*\]|in the cache: (.*)", str(error))
    configs = re.findall(r"[\w.+-]+", listed[1] or listed[0]) if listed else []
    near = nearest(config, configs) if config else []
    guess = f"did you mean {near[0]}? " if near else ""
    example = f"{hub_id}:{configs[0]}" if configs else f"{hub_id}:CONFIG"
    problem = f"has no config '{config}'" if config else "has several configs, and none is named"
    why = f"it has {', '.join(configs)}" if configs else str(error).partition("\n")[0]
    if splits is not None:
        problem, why = f"has no config and no split '{config}'", f"{why}; its splits are {', '.join(splits)}"
        example = f"{hub_id}:{splits[0]}"
    return DataError(72, problem, where=hub_id, why=why, fix=f"{guess}name one as {example}")
