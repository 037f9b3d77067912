"""Rows from Parquet and Arrow: plain dicts of what JSON can hold, or a refusal that names file and column."""

# Faults of this module:
#
#   64  not a complete Parquet or Arrow file      66  a column that JSON cannot hold
#   65  encrypted Parquet

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from llm_finetune_kit.data.sources.files import SIZE_LIMIT
from llm_finetune_kit.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

PARQUET, ENCRYPTED, ARROW, STREAM = b"PAR1", b"PARE", b"ARROW1", b"\xff\xff\xff\xff"
BATCH_ROWS = 8192
NAMES = {"parquet": "Parquet", "arrow": "Arrow"}


def columnar_kind(raw: bytes) -> str | None:
    """`parquet` or `arrow` if the bytes begin so."""
    if raw.startswith((PARQUET, ENCRYPTED)):
        return "parquet"
    if raw.startswith((ARROW, STREAM)):
        return "arrow"
    return None


def refuse_wrong_magic(raw: bytes, kind: str, name: str) -> None:
    """DataError 64 for bytes that are no text and not what the name says."""
    marks = "the letters PAR1" if kind == "parquet" else "the letters ARROW1 or the mark of an Arrow stream"
    shown = raw[:4].hex(" ")
    problem = f"is not a complete {NAMES[kind]} file: it begins with the bytes {shown}, not with {marks} ({len(raw):,} bytes)"
    raise DataError(64, problem, where=name, fix="copy or download it again, or name the file by what it holds")


def read_columnar(raw: bytes, kind: str, name: str) -> tuple[list[dict[str, Any]], list[str]]:
    """All rows of a Parquet or Arrow file (IPC file or stream), and notes. Raises DataError."""
    table = _parquet(raw, name) if kind == "parquet" else _arrow(raw, name)
    if table.num_rows == 0:
        raise DataError(27, f"the {NAMES[kind]} file holds no row", where=name, fix="write rows into it")
    notes: list[str] = []
    return plain_rows(table, name, notes), notes


def _parquet(raw: bytes, name: str) -> pa.Table:
    import pyarrow as pa
    from pyarrow import parquet

    if raw.startswith(ENCRYPTED) or raw.endswith(ENCRYPTED):
        raise _encrypted(name)
    footer = int.from_bytes(raw[-8:-4], "little")
    if not raw.endswith(PARQUET) or len(raw) < 12:
        problem = f"is not a complete Parquet file: its {len(raw):,} bytes do not end with a footer and the letters PAR1"
        raise DataError(64, problem, where=name, fix="it was cut short: copy or download it again")
    if footer + 12 > len(raw):
        raise _incomplete(name, "Parquet", f"found {len(raw):,} bytes, needed more than {footer + 12:,}")
    try:
        with parquet.ParquetFile(pa.BufferReader(raw)) as file:
            facts = file.metadata
            groups = [facts.row_group(index) for index in range(facts.num_row_groups)]
            unpacked = sum(group.total_byte_size for group in groups)
            if unpacked > SIZE_LIMIT:
                raise _too_large(name, unpacked)
            batches, size = [], 0
            for batch in file.iter_batches(BATCH_ROWS):  # repeated values may unpack to far more than was written
                batches.append(batch)
                size += batch.nbytes
                if size > SIZE_LIMIT:
                    raise _too_large(name, size)
            return pa.Table.from_batches(batches, schema=file.schema_arrow)
    except (pa.ArrowException, OSError, ValueError) as error:
        if "encrypt" in str(error).lower() or "decrypt" in str(error).lower():
            raise _encrypted(name) from None
        raise _incomplete(name, "Parquet", f"found {len(raw):,} bytes; {_first_line(error)}") from None


def _arrow(raw: bytes, name: str) -> pa.Table:
    import pyarrow as pa
    from pyarrow import ipc

    try:
        opened = (ipc.open_file if raw.startswith(ARROW) else ipc.open_stream)(pa.BufferReader(raw))
        with opened as reader:
            table = reader.read_all()
            table.validate(full=True)  # offsets out of a damaged file would be read as memory
    except (pa.ArrowException, OSError, ValueError, EOFError) as error:
        raise _incomplete(name, "Arrow", f"found {len(raw):,} bytes; {_first_line(error)}") from None
    if table.nbytes > SIZE_LIMIT:
        raise _too_large(name, table.nbytes)
    return table


def _incomplete(name: str, kind: str, what: str) -> DataError:
    fix = "copy or download it again, or write it anew"
    return DataError(64, f"is not a complete {kind} file: {what}", where=name, fix=fix)


def _encrypted(name: str) -> DataError:
    return DataError(65, "is an encrypted Parquet file", where=name, fix="decrypt it with the tool that wrote it")


def _too_large(name: str, size: int) -> DataError:
    problem = f"holds {size / 1024**3:.1f} GB when unpacked, more than the limit of 2 GB"
    return DataError(26, problem, where=name, why="files are read whole", fix="split the file, or set data.streaming=true")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


# --- from columns to rows ----------------------------------------------------------------------------------


def plain_rows(table: pa.Table, name: str, notes: list[str] | None = None) -> list[dict[str, Any]]:
    """The rows as dicts of what JSON can hold.

    Dates, times and decimals become text; numbers that are none (NaN) become null, which `notes` then says;
    bytes become text if they are UTF-8. DataError 66 names a column that cannot be turned so.
    """
    names = table.column_names
    twice = next((column for column in names if names.count(column) > 1), None)
    if twice is not None:
        raise DataError(39, f"two columns are named '{twice}'", where=name, fix="rename one of them")
    columns = []
    for column in names:
        values = table.column(column)
        plain = _values(values, f"{name} column {column}")
        if _is_float(values.type) and notes is not None and (nans := plain.count(None) - values.null_count):
            notes.append(f"{name} column {column}: {nans:,} NaN are read as null")
        columns.append(plain)
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)] if names else []


def _is_plain(kind: pa.DataType) -> bool:
    """Whether `to_pylist` gives values of JSON as they are; floats may be none (NaN)."""
    from pyarrow import types

    if types.is_struct(kind):
        return all(_is_plain(kind.field(index).type) for index in range(kind.num_fields))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _is_plain(kind.value_type)
    if types.is_dictionary(kind):
        return _is_plain(kind.value_type)
    text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    return bool(text or types.is_integer(kind) or types.is_boolean(kind) or types.is_null(kind))


def _is_float(kind: pa.DataType) -> bool:
    from pyarrow import types

    return bool(types.is_floating(kind))


def _values(values: pa.ChunkedArray, where: str) -> list[Any]:
    import pyarrow as pa
    from pyarrow import types

    kind = values.type
    try:
        if types.is_timestamp(kind) or types.is_date(kind) or types.is_time(kind):
            return list(values.cast(pa.string()).to_pylist())
        found = values.to_pylist()
        return list(found) if _is_plain(kind) else [plain_value(value) for value in found]
    except (ValueError, TypeError, NotImplementedError, pa.ArrowException) as error:
        fix = "leave this column out, or write it as text or numbers"
        problem = f"cannot be read as text or numbers: {_first_line(error)} (type {kind})"
        raise DataError(66, problem, where=where, fix=fix) from None


def plain_value(value: Any) -> Any:
    """A value out of Arrow, NumPy or pandas as JSON can hold it; ValueError if it cannot."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if value in (math.inf, -math.inf):
            raise ValueError(f"it holds {value}")
        return None if value != value else float(value)
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise ValueError("it holds bytes that are no UTF-8 text") from None
    if isinstance(value, dict):
        return {str(key): plain_value(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain_value(inner) for inner in value]
    if type(value).__name__ in ("NAType", "NaTType"):
        return None
    if hasattr(value, "tolist"):  # NumPy numbers and arrays
        return plain_value(value.tolist())
    if hasattr(value, "isoformat"):
        return value.isoformat()
    if type(value).__name__ in ("Decimal", "timedelta", "Timedelta", "UUID"):
        return str(value)
    raise ValueError(f"it holds a Python {type(value).__name__}")
