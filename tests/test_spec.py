"""How sets of rows are named: files, folders, parts, slices and numbers of rows, and what is no such name."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from llm_finetune_kit.data.sources import held_out_beside, read_source
from llm_finetune_kit.data.sources.spec import Bound, Spec, parse
from llm_finetune_kit.errors import DataError


def lines(folder: Path, name: str, *numbers: int) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps({"n": number}) + "\n" for number in numbers), encoding="utf-8")


def numbers(spec: str, folder: Path, seed: int = 42) -> list[int]:
    return [row["n"] for row in read_source(spec, base=folder, seed=seed).rows]


# --- the grammar -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train.jsonl", Spec("", "train.jsonl")),
        ("data/train.jsonl#500", Spec("", "data/train.jsonl", take=500)),
        ("train.jsonl[:90%]", Spec("", "train.jsonl", stop=Bound(90, True))),
        ("folder:test", Spec("", "folder", ("test",))),
        ("owner/name:train[:10%]", Spec("", "owner/name", ("train",), stop=Bound(10, True))),
        ("o/n:config:test[100:2_000]#50", Spec("", "o/n", ("config", "test"), Bound(100, False), Bound(2000, False), 50)),
        ("a.json[-10%:]", Spec("", "a.json", start=Bound(-10, True))),
        ("a.json[:]", Spec("", "a.json")),
        ("sample:chat", Spec("", "sample:chat")),
        ("sample:chat[1:3]#5", Spec("", "sample:chat", start=Bound(1, False), stop=Bound(3, False), take=5)),
        ("C:\\data\\x.json#3", Spec("", "C:\\data\\x.json", take=3)),
        ("C:/data/x.json", Spec("", "C:/data/x.json")),
        ("https://example.org:80/a.json#x", Spec("", "https://example.org:80/a.json#x")),
    ],
)
def test_every_form_is_taken_apart(text: str, expected: Spec) -> None:
    found = parse(text, lambda _: False)
    assert found == Spec(text, expected.base, expected.parts, expected.start, expected.stop, expected.take)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a.json#", "'#'"),
        ("a.json#0", "'#0'"),
        ("a.json#-5", "'#-5'"),
        ("a.json#10%", "'#10%'"),
        ("a.json[5]", "'[5]'"),
        ("a.json[a:b]", "'[a:b]'"),
        ("a.json[1:2:3]", "'[1:2:3]'"),
        ("a.json[:110%]", "more than 100 %"),
        ("a.json[10:50%]", "mixes rows and percent"),
        ("a::b", "nothing stands after a colon"),
        ("a:b:c:d", "3 parts after 'a'"),
        ("#5", "begins with no name"),
    ],
)
def test_what_is_malformed_is_named_with_the_form(text: str, part: str) -> None:
    with pytest.raises(DataError) as caught:
        parse(text, lambda _: False)
    assert caught.value.number == 60 and part in caught.value.problem
    assert "[:CONFIG][:SPLIT][[a:b]][#N]" in caught.value.fix


def test_a_file_of_that_very_name_comes_first(tmp_path: Path) -> None:
    for number, name in enumerate(("a.jsonl#2", "b:c.jsonl", "d.jsonl[1:2]", "e:f", "plain.jsonl")):
        lines(tmp_path, name, *range(10 * number, 10 * number + 4))
    assert numbers("a.jsonl#2", tmp_path) == [0, 1, 2, 3]
    assert numbers("b:c.jsonl[1:]", tmp_path) == [11, 12, 13]
    assert numbers("d.jsonl[1:2]", tmp_path) == [20, 21, 22, 23]
    assert numbers("d.jsonl[1:2][1:2]", tmp_path) == [21]
    assert numbers("e:f[0:1]", tmp_path) == [30]
    assert numbers("plain.jsonl[2:]", tmp_path) == [42, 43]


def test_parts_and_names_that_are_not_there(tmp_path: Path) -> None:
    lines(tmp_path, "a.jsonl", 1)
    lines(tmp_path, "folder/train.jsonl", 1)
    for spec, number in {"a.jsonl:train": 68, "sample:chat:train": 68, "folder:en:train": 68, "folder:dev": 63}.items():
        with pytest.raises(DataError) as caught:
            read_source(spec, base=tmp_path)
        assert caught.value.number == number


# --- slices and numbers of rows ----------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, 7, 10, 250])
def test_slices_are_those_of_datasets(count: int) -> None:
    import datasets

    rows = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"n": list(range(count))})})["train"]
    for text in ("[:10%]", "[10%:]", "[-10%:]", "[:-10%]", "[33%:66%]", "[:1]", "[-1:]", "[0:]", "[1%:100%]"):
        if "-10%" in text and round(count / 10) == 0:
            continue  # minus no row: `datasets` counts this from the start, which turns the slice round
        inner = datasets.ReadInstruction.from_spec(f"train{text}").to_absolute({"train": count})[0]
        expected = rows["n"][slice(inner.from_, inner.to)]
        spec = parse(f"x{text}", lambda _: False)
        try:
            found = list(spec.choose(count, 0))
        except DataError as error:
            assert error.number == 61
            found = []
        assert found == expected, text


def test_a_slice_keeps_the_lines_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"n": 0}\n\n{"n": 1}\n{"n": 2}\n', encoding="utf-8")
    (tmp_path / "a.json").write_text('[{"n": 0},\n{"n": 1},\n{"n": 2}]', encoding="utf-8")
    source = read_source("a.jsonl[1:]", base=tmp_path)
    assert [source.place(0), source.place(1), source.spots([0, 1])] == ["a.jsonl line 3", "a.jsonl line 4", "lines 3, 4"]
    source = read_source("a.json[-1:]", base=tmp_path)
    assert source.place(0) == "a.json row 3 (line 3)" and source.notes == ["1 of 3 rows of a.json"]
    with pytest.raises(DataError, match="rows 3 to 3 of 3"):
        read_source("a.json[5:]", base=tmp_path)


def test_a_number_of_rows_is_drawn_by_the_seed_in_the_order_of_the_file(tmp_path: Path) -> None:
    lines(tmp_path, "a.jsonl", *range(1000))
    drawn = numbers("a.jsonl#50", tmp_path)
    assert len(drawn) == 50 and drawn == sorted(set(drawn))
    assert drawn == numbers("a.jsonl#50", tmp_path) != numbers("a.jsonl#50", tmp_path, seed=7)
    assert max(numbers("a.jsonl[:10%]#50", tmp_path)) < 100
    source = read_source("a.jsonl#50", base=tmp_path)
    assert source.place(7) == f"a.jsonl line {drawn[7] + 1}"
    assert source.notes == ["50 of 1,000 rows of a.jsonl, chosen by seed 42"]


def test_more_rows_than_there_are_means_all_of_them(tmp_path: Path) -> None:
    lines(tmp_path, "a.jsonl", *range(10))
    source = read_source("a.jsonl#500", base=tmp_path)
    assert len(source.rows) == 10 and source.notes == ["500 rows were asked for; all 10 of a.jsonl are used"]
    assert source.fingerprint == read_source("a.jsonl", base=tmp_path).fingerprint
    assert read_source("a.jsonl#10", base=tmp_path).notes == []


def test_each_choice_of_rows_has_its_fingerprint(tmp_path: Path) -> None:
    lines(tmp_path, "a.jsonl", *range(10))
    specs = ("a.jsonl", "a.jsonl[:5]", "a.jsonl[5:]", "a.jsonl#5", "a.jsonl#4")
    assert len({read_source(spec, base=tmp_path).fingerprint for spec in specs}) == len(specs)
    same = read_source("a.jsonl[:50%]", base=tmp_path)
    assert same.fingerprint == read_source("a.jsonl[:5]", base=tmp_path).fingerprint


# --- folders -----------------------------------------------------------------------------------------------


def test_a_folder_means_its_training_part(tmp_path: Path) -> None:
    for word, part in {"train": 1, "valid": 2, "test": 3}.items():
        lines(tmp_path, f"set/{word}.jsonl", part)
    (tmp_path / "set" / "README.md").write_text("not data", encoding="utf-8")
    (tmp_path / "set" / ".hidden.jsonl").write_text("{", encoding="utf-8")
    assert [numbers(spec, tmp_path) for spec in ("set", "set/", "set:dev", "set:validation", "set:eval")] == [
        [1],
        [1],
        [2],
        [2],
        [3],
    ]
    assert read_source("set", base=tmp_path).place(0) == "set/train.jsonl line 1"
    assert held_out_beside("set", base=tmp_path) == held_out_beside("set:train[:10%]#3", base=tmp_path) == "set:validation"
    assert held_out_beside("set:test", base=tmp_path) is None
    os.remove(tmp_path / "set" / "valid.jsonl")
    assert held_out_beside(tmp_path / "set") == f"{tmp_path}/set:test"


def test_shards_are_one_source_in_the_order_of_their_names(tmp_path: Path) -> None:
    for shard in (2, 0, 1):
        lines(tmp_path, f"set/train-{shard:05}-of-00003.jsonl", 10 * shard, 10 * shard + 1)
        lines(tmp_path, f"other/train/part-{shard}.jsonl", shard)
    source = read_source("set", base=tmp_path)
    assert [row["n"] for row in source.rows] == [0, 1, 10, 11, 20, 21]
    assert source.place(3) == "set/train-00001-of-00003.jsonl line 2"
    assert source.spots([0, 5]) == "set/train-00000-of-00003.jsonl line 1, set/train-00002-of-00003.jsonl line 2"
    assert "3 files are read as one" in source.notes[0]
    cut = read_source("set[3:5]", base=tmp_path)
    assert [cut.place(0), cut.place(1)] == ["set/train-00001-of-00003.jsonl line 2", "set/train-00002-of-00003.jsonl line 1"]
    assert numbers("other", tmp_path) == [0, 1, 2]


def test_one_file_in_a_folder_is_that_file_and_several_are_listed(tmp_path: Path) -> None:
    lines(tmp_path, "set/poems.jsonl", 1)
    assert numbers("set", tmp_path) == [1] and held_out_beside("set", base=tmp_path) is None
    lines(tmp_path, "set/songs.jsonl", 2)
    with pytest.raises(DataError, match="none of its files is called train") as caught:
        read_source("set", base=tmp_path)
    assert caught.value.number == 62 and "poems.jsonl, songs.jsonl" in caught.value.why
    assert numbers("set:songs", tmp_path) == [2]


def test_the_same_part_in_two_kinds_is_not_read_twice(tmp_path: Path) -> None:
    lines(tmp_path, "set/train.jsonl", 1)
    (tmp_path / "set" / "train.csv").write_text("n\n1\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"train\.csv, train\.jsonl") as caught:
        read_source("set", base=tmp_path)
    assert caught.value.number == 62


def test_files_have_nothing_beside_them(tmp_path: Path) -> None:
    lines(tmp_path, "train.jsonl", 1)
    lines(tmp_path, "valid.jsonl", 1)
    assert held_out_beside("train.jsonl", base=tmp_path) is None and held_out_beside("sample:chat") is None
