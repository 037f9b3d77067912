"""Rows handed over by Python code: lists, generators, frames and the objects of `datasets`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from llm_finetune_kit.data.sources import held_out_beside, read_source
from llm_finetune_kit.errors import DataError

ROWS = [{"q": "one", "a": "1"}, {"q": "two", "a": "2"}]


def test_any_iterable_of_rows_is_read_once() -> None:
    def made() -> Iterator[dict[str, str]]:
        yield from ROWS

    for values in (ROWS, tuple(ROWS), made(), iter(ROWS)):
        source = read_source(values)
        assert source.rows == ROWS and source.kind == "rows" and source.place(1) == "rows[1]"
        assert source.fingerprint == read_source(ROWS).fingerprint
    assert read_source(text for text in ("one", "two")).rows == [{"text": "one"}, {"text": "two"}]


def test_what_is_no_list_of_rows_is_refused() -> None:
    for values, number in (({"q": ["one"]}, 38), (5, 38), (None, 38), ([1], 38), (iter([]), 27), ([[1]], 38)):
        with pytest.raises(DataError) as caught:
            read_source(values)
        assert caught.value.number == number and caught.value.fix


def test_a_frame_is_rows_with_null_where_nothing_is() -> None:
    import numpy as np
    import pandas as pd

    frame = pd.DataFrame({"q": ["one", None, "three"], "n": [1, 2, 3], "x": [0.5, float("nan"), 1.5]}, index=[7, 8, 9])
    frame["when"] = pd.to_datetime(["2024-02-29", None, "2024-03-01"])
    frame["turns"] = [[{"role": "user"}], np.array(["a", "b"]), None]
    rows = read_source(frame).rows
    assert rows[0] == {"q": "one", "n": 1, "x": 0.5, "when": "2024-02-29T00:00:00", "turns": [{"role": "user"}]}
    assert rows[1] == {"q": None, "n": 2, "x": None, "when": None, "turns": ["a", "b"]}
    assert type(rows[0]["n"]) is int
    for column, value, words in (("o", object(), "Python object"), ("b", b"\xff", "no UTF-8"), ("i", float("inf"), "inf")):
        with pytest.raises(DataError, match=words) as caught:
            read_source(pd.DataFrame({"q": ["x", "y"], column: pd.Series(["", value], dtype=object)}))
        assert caught.value.number == 41 and caught.value.where == f"rows[1], column {column}"
    with pytest.raises(DataError, match="the key 0 is not text"):
        read_source(pd.DataFrame([["a"]]))


def test_objects_of_datasets_are_rows() -> None:
    import datasets

    whole = datasets.Dataset.from_list(ROWS)
    assert read_source(whole).rows == ROWS
    assert read_source(whole.select([1])).rows == ROWS[1:], "a selection is honoured"
    assert read_source(whole.to_iterable_dataset()).rows == ROWS
    parts = datasets.DatasetDict({"train": whole, "test": whole.select([0]), "dev": whole.select([1])})
    source = read_source(parts)
    assert source.rows == ROWS and "the rows of 'train' are used" in source.notes[0]
    held_out: Any = held_out_beside(parts)
    assert read_source(held_out).rows == ROWS[1:], "validation comes before test"
    assert held_out_beside(whole) is None and held_out_beside(ROWS) is None
    only = datasets.DatasetDict({"odd": whole})
    assert read_source(only).rows == ROWS and held_out_beside(only) is None


def test_lists_need_no_heavy_package() -> None:
    code = f"import sys; sys.path[:] = {sys.path!r}\nfrom llm_finetune_kit.data.sources import read_source\n"
    code += "read_source([{'a': 1}])\nprint({'pandas', 'datasets', 'pyarrow', 'numpy', 'torch'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
