"""Parquet and Arrow files: rows of plain values come out; cut, wrong and encrypted ones are named with their sizes."""

from __future__ import annotations

import base64
import datetime
import decimal
import gzip
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest

from llm_finetune_kit.data.sources import Source, held_out_beside, read_source
from llm_finetune_kit.errors import DataError

ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "Zoë?"}, {"role": "assistant", "content": "Yes."}], "n": 1},
    {"messages": [{"role": "user", "content": "b"}], "n": None},
]


def stream(table: pa.Table, path: Path) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


WRITERS: dict[str, Any] = {
    "rows.parquet": pq.write_table,
    "rows.arrow": stream,
    "rows.feather": feather.write_feather,
}


def refused(path: Path) -> DataError:
    with pytest.raises(DataError) as caught:
        read_source(path.name, base=path.parent)
    assert path.name in caught.value.where and caught.value.fix
    return caught.value


def of_column(folder: Path, values: pa.Array) -> Source:
    pq.write_table(pa.table({"text": ["x"] * len(values), "c": values}), folder / "c.parquet")
    return read_source("c.parquet", base=folder)


@pytest.mark.parametrize("name", WRITERS)
def test_rows_come_out_as_they_went_in(tmp_path: Path, name: str) -> None:
    WRITERS[name](pa.Table.from_pylist(ROWS), tmp_path / name)
    raw = (tmp_path / name).read_bytes()
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(raw))
    (tmp_path / "other.jsonl").write_bytes(raw)
    for given in (name, f"{name}.gz"):
        source = read_source(given, base=tmp_path)
        assert source.rows == ROWS and source.notes == [] and len(source.fingerprint) == 64
        assert source.place(1) == f"{given} row 2" and source.spots([0, 1]) == "rows 1, 2"
    by_content = read_source("other.jsonl", base=tmp_path)
    assert by_content.rows == ROWS and "although its name ends in .jsonl" in by_content.notes[0]


def test_values_that_json_lacks_become_text_or_null(tmp_path: Path) -> None:
    day = datetime.datetime(2024, 2, 29, 13, 5, 6)
    cases: list[tuple[pa.Array, list[Any]]] = [
        (pa.array([day, None], pa.timestamp("s")), ["2024-02-29 13:05:06.000", None]),
        (pa.array([day.date()]), ["2024-02-29"]),
        (pa.array([decimal.Decimal("12.50")]), ["12.50"]),
        (pa.array([1.5, float("nan")]), [1.5, None]),
        (pa.array([b"caf\xc3\xa9"]), ["café"]),
        (pa.array(["a", "b", "a"]).dictionary_encode(), ["a", "b", "a"]),
        (pa.array(np.float16([0.5])), [0.5]),
        (pa.array([[1.0, float("nan")]]), [[1.0, None]]),
        (pa.array([{"when": day}]), [{"when": "2024-02-29T13:05:06"}]),
        (pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())), [[["k", 1]]]),
        (pa.array(["long"], pa.large_string()), ["long"]),
        (pa.nulls(1), [None]),
    ]
    for values, expected in cases:
        source = of_column(tmp_path, values)
        assert [row["c"] for row in source.rows] == expected, values.type
        json.dumps(source.rows, allow_nan=False)
    assert of_column(tmp_path, pa.array([1.5, float("nan")])).notes == ["c.parquet column c: 1 NaN are read as null"]


def test_a_column_that_json_cannot_hold_is_named(tmp_path: Path) -> None:
    for values in (
        pa.array([b"\x89PNG\xff"]),
        pa.array([{"bytes": b"\xff"}]),
        pa.array([float("inf")]),
        pa.array([[1.0, float("-inf")]]),
    ):
        with pytest.raises(DataError, match=r"c\.parquet column c") as caught:
            of_column(tmp_path, values)
        assert caught.value.number == 66
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
    stream(table, tmp_path / "twice.arrow")
    assert "two columns are named 'a'" in refused(tmp_path / "twice.arrow").problem


def test_text_that_is_no_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["MARK"]}), path, compression="none", use_dictionary=False, write_statistics=False)
    path.write_bytes(path.read_bytes().replace(b"MARK", b"M\xff\xfeK"))
    error = refused(path)
    assert error.number == 66 and error.where == "a.parquet column text"


def test_fault_001_a_file_without_rows_is_empty(tmp_path: Path) -> None:
    for name, write in WRITERS.items():
        write(pa.table({"text": pa.array([], pa.string())}), tmp_path / name)
        assert refused(tmp_path / name).number == 27


def test_fault_021_a_cut_file_is_not_complete_and_says_how_large_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"row {i}" * 20 for i in range(500)]}), path, compression="none")
    whole = path.read_bytes()
    for size in (4, 11, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        error = refused(path)
        assert error.number == 64 and "not a complete Parquet file" in error.problem and f"{size:,} bytes" in error.problem
    path.write_bytes(whole[:100] + whole[2000:])  # the end is there, a part of the middle is not
    assert f"not a complete Parquet file: found {len(whole) - 1900:,} bytes" in refused(path).problem
    path.write_bytes(whole[:4] + whole[-600:][:-8] + (10**6).to_bytes(4, "little") + b"PAR1")
    assert "needed more than 1,000,012" in refused(path).problem


def test_fault_021_a_cut_arrow_file_is_not_complete(tmp_path: Path) -> None:
    for name in ("rows.arrow", "rows.feather"):
        WRITERS[name](pa.table({"text": [f"row {i}" for i in range(500)]}), tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        for size in (9, 100, len(whole) // 2, len(whole) - 30):
            (tmp_path / name).write_bytes(whole[:size])
            error = refused(tmp_path / name)
            assert error.number == 64 and f"not a complete Arrow file: found {size:,} bytes" in error.problem


def test_fault_021_wrong_magic(tmp_path: Path) -> None:
    for name in ("a.parquet", "a.arrow", "a.parquet.gz"):
        (tmp_path / name).write_bytes(b"some other bytes \x00\x01\xff")
        error = refused(tmp_path / name)
        kind = "Arrow" if "arrow" in name else "Parquet"
        assert error.number == 64 and f"not a complete {kind} file: it begins with the bytes 73 6f 6d 65" in error.problem
    (tmp_path / "lines.parquet").write_bytes(b'{"text": "one"}\n')
    source = read_source("lines.parquet", base=tmp_path)
    assert source.rows == [{"text": "one"}] and "holds JSON lines" in source.notes[0]


@pytest.mark.parametrize("plain_footer", [True, False])
def test_fault_021_encrypted_parquet_is_named(tmp_path: Path, plain_footer: bool) -> None:
    from pyarrow.parquet import encryption

    class Keys(encryption.KmsClient):  # type: ignore[misc]
        def wrap_key(self, key: bytes, _: str) -> bytes:
            return base64.b64encode(key)

        def unwrap_key(self, wrapped: bytes, _: str) -> bytes:
            return base64.b64decode(wrapped)

    how = encryption.EncryptionConfiguration(footer_key="f", column_keys={"c": ["text"]}, plaintext_footer=plain_footer)
    factory = encryption.CryptoFactory(lambda _: Keys())
    secret = factory.file_encryption_properties(encryption.KmsConnectionConfig(), how)
    table = pa.table({"text": ["hidden"] * 10})
    with pq.ParquetWriter(tmp_path / "a.parquet", table.schema, encryption_properties=secret) as writer:
        writer.write_table(table)
    error = refused(tmp_path / "a.parquet")
    assert error.number == 65 and "encrypted" in error.problem


def test_fault_021_a_file_that_unpacks_to_too_much_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("rows.parquet", "rows.feather"):
        WRITERS[name](pa.table({"text": ["x" * 1000] * 1000}), tmp_path / name, compression="zstd")
        assert (tmp_path / name).stat().st_size < 100_000
        monkeypatch.setattr("llm_finetune_kit.data.sources.columnar.SIZE_LIMIT", 100_000)
        assert refused(tmp_path / name).number == 26


def test_fault_032_damaged_bytes_are_refused_or_read_and_never_a_traceback(tmp_path: Path) -> None:
    chance = random.Random(7)
    table = pa.Table.from_pylist(ROWS * 50)
    for name, write in WRITERS.items():
        write(table, tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        for _ in range(150):
            damaged = bytearray(whole)
            for _ in range(chance.randint(1, 8)):
                damaged[chance.randrange(len(damaged))] = chance.randrange(256)
            (tmp_path / name).write_bytes(damaged[: chance.choice([len(damaged), chance.randrange(1, len(damaged))])])
            try:
                read_source(name, base=tmp_path)
            except DataError as error:
                assert name in str(error)


def test_folders_of_save_to_disk_are_read_without_datasets(tmp_path: Path) -> None:
    import datasets

    parts = {"train": ROWS * 3, "validation": ROWS[:1]}
    sets = datasets.DatasetDict({part: datasets.Dataset.from_list(rows) for part, rows in parts.items()})
    sets.save_to_disk(tmp_path / "saved", num_shards={"train": 2, "validation": 1})
    source = read_source("saved", base=tmp_path)
    assert source.rows == ROWS * 3 and source.place(3) == "saved/train/data-00001-of-00002.arrow row 1"
    assert held_out_beside("saved", base=tmp_path) == "saved:validation"
    assert read_source("saved:validation", base=tmp_path).rows == ROWS[:1]
    sets["train"].save_to_disk(tmp_path / "one")
    assert read_source("one#2", base=tmp_path).rows and held_out_beside("one", base=tmp_path) is None
