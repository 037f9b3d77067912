"""The data files of a folder: which are the training, validation and test part, and in what order they are read."""

# Faults of this module:
#
#   22  a folder without a data file      62  files that cannot be told apart      63  no such part in the folder

from __future__ import annotations

import json
import re
from pathlib import Path

from llm_finetune_kit.data.sources.files import KINDS, LISTED
from llm_finetune_kit.errors import DataError

PARTS = {
    "train": ("train", "training"), "validation": ("validation", "valid", "val", "dev"), "test": ("test", "testing", "eval"),
}  # fmt: skip
PART_OF = {word: part for part, words in PARTS.items() for word in words}
BEGINS = re.compile(rf"({'|'.join(sorted(PART_OF, key=len, reverse=True))})(?![a-z])", re.IGNORECASE)
NO_DATA = re.compile(
    r"readme|licen[cs]e|dataset_infos?\.json|dataset_dict\.json|state\.json|config\.json|requirements\.txt", re.I
)


def folder_parts(folder: Path) -> dict[str, list[Path]]:
    """Data files by part (train, validation, test, or their own stem), in the order of their names.

    A folder written by `save_to_disk` tells its own parts. A folder `train/` is the training part like `train.jsonl`.
    """
    saved = _saved_parts(folder)
    if saved:
        return saved
    parts: dict[str, list[Path]] = {}
    for entry in sorted(folder.iterdir()):
        found = BEGINS.match(entry.name)
        if entry.is_dir() and found:
            files = [inner for inner in sorted(entry.iterdir()) if _is_data(inner)]
        else:
            files = [entry] if _is_data(entry) else []
        if files:
            part = PART_OF[found[1].lower()] if found else _stem(entry)
            parts.setdefault(part, []).extend(files)
    return parts


def files_of(folder: Path, name: str, part: str | None) -> list[Path]:
    """The files of one part, by default the training part or the only file there is. Raises DataError."""
    parts = _parts(folder, name)
    if not parts:
        fix = f"put data files into it: {', '.join(sorted(set(KINDS)))}, each also .gz"
        raise DataError(22, "is a folder without a data file", where=name, fix=fix)
    asked = PART_OF.get(part.lower(), part) if part else "train"
    if asked not in parts and part is None and len(parts) == 1:
        asked = next(iter(parts))
    if asked not in parts:
        held = [path.relative_to(folder).as_posix() for files in parts.values() for path in files]
        shown = ", ".join(held[:LISTED]) + (", ..." if len(held) > LISTED else "")
        if part:
            raise DataError(63, f"holds no part '{part}'", where=name, why=f"it holds {shown}", fix=_one_of(name, parts))
        fix = f"name one of them, such as {name.rstrip('/')}/{held[0]}, or call the training part train.jsonl"
        raise DataError(62, "is a folder, and none of its files is called train", where=name, why=f"it holds {shown}", fix=fix)
    return _one_kind(parts[asked], name)


def part_beside(folder: Path, part: str | None) -> str | None:
    """The part to hold out when the training part is learned: validation before test; None if there is none."""
    parts = _parts(folder, folder.name)
    if "train" not in parts or PART_OF.get((part or "train").lower()) != "train":
        return None
    return next((other for other in ("validation", "test") if other in parts), None)


def beside(names: list[str], train: str) -> str | None:
    """Of a dataset's split names the one to hold out beside `train`: validation before test."""
    if PART_OF.get(train.lower()) != "train":
        return None
    return next((name for part in ("validation", "test") for name in names if name.lower() in PARTS[part]), None)


def _parts(folder: Path, name: str) -> dict[str, list[Path]]:
    try:
        return folder_parts(folder)
    except OSError as error:
        raise DataError(25, f"cannot be read: {error.strerror}", where=name, fix="check its permissions") from None


def _is_data(path: Path) -> bool:
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    hidden = path.name.startswith((".", "_"))
    return suffix in KINDS and suffix != ".md" and not hidden and not NO_DATA.match(path.name) and not path.is_dir()


def _stem(path: Path) -> str:
    return path.name.partition(".")[0]


def _one_of(name: str, parts: dict[str, list[Path]]) -> str:
    return f"choose one of {', '.join(f'{name}:{part}' for part in parts)}"


def _one_kind(files: list[Path], name: str) -> list[Path]:
    """Shards of one set have one ending; the same set in two kinds would be learned twice."""
    endings = {"".join(path.suffixes[-2:] if path.suffix == ".gz" else path.suffixes[-1:]).lower() for path in files}
    if len(endings) > 1:
        shown = ", ".join(path.name for path in files[:LISTED])
        why = "they could be the same rows twice"
        raise DataError(62, f"holds one part in several kinds of file: {shown}", where=name, why=why, fix="name one of them")
    return files


def _saved_parts(folder: Path) -> dict[str, list[Path]]:
    """What `save_to_disk` of `datasets` wrote: state.json lists the files of one part, dataset_dict.json the parts."""
    listing = _json(folder / "dataset_dict.json").get("splits")
    if isinstance(listing, list):
        parts = {str(split): _saved_files(folder / Path(str(split)).name) for split in listing}
        return {PART_OF.get(split.lower(), split): files for split, files in parts.items() if files}
    files = _saved_files(folder)
    return {"train": files} if files else {}


def _saved_files(folder: Path) -> list[Path]:
    files = _json(folder / "state.json").get("_data_files")
    return [folder / Path(str(file.get("filename"))).name for file in files] if isinstance(files, list) else []


def _json(path: Path) -> dict[str, object]:
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
