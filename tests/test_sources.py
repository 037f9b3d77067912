"""Files in every kind and every broken state: good rows come out, faults are named with their place."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llm_finetune_kit.data.sources import Source, files, held_out_beside, read_source
from llm_finetune_kit.data.sources.hub_rows import Licence
from llm_finetune_kit.errors import DataError, MachineError

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data folder is not here")
GOOD = b'{"text": "one"}\n{"text": "two"}\n'


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refused(folder: Path, name: str, content: str | bytes) -> DataError:
    write(folder, name, content)
    with pytest.raises(DataError) as caught:
        read_source(name, base=folder)
    assert name in str(caught.value), "every refusal names the file"
    assert caught.value.fix, "every refusal says what to do"
    return caught.value


def read(folder: Path, name: str, content: str | bytes) -> Source:
    write(folder, name, content)
    return read_source(name, base=folder)


# --- what is read ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", '[{"q": "x"}, {"q": "y"}]'),
        ("a.jsonl", '{"q": "x"}\n{"q": "y"}\n'),
        ("a.ndjson", '{"q": "x"}\r\n\r\n{"q": "y"}'),
        ("a.csv", "q\nx\ny\n"),
        ("a.tsv", "q\tr\nx\t1\ny\t2\n"),
        ("a.csv", "q\tr\nx\t1\ny\t2\n"),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str, content: str, zipped: bool) -> None:
    raw = gzip.compress(content.encode()) if zipped else content.encode()
    source = read(tmp_path, name + ".gz" if zipped else name, raw)
    assert [row["q"] for row in source.rows] == ["x", "y"]
    assert len(source.fingerprint) == 64


def test_gzip_is_told_by_its_bytes_not_by_its_name(tmp_path: Path) -> None:
    twice = gzip.compress(b'{"text": "one"}\n') + gzip.compress(b'{"text": "two"}\n')
    assert len(read(tmp_path, "a.jsonl", twice).rows) == 2
    assert len(read(tmp_path, "b.jsonl.gz", GOOD).rows) == 2


def test_damaged_gzip_is_named(tmp_path: Path) -> None:
    whole = gzip.compress(GOOD * 100)
    for broken in (whole[:-12], whole[:30] + b"xxxx" + whole[34:]):
        assert refused(tmp_path, "a.jsonl.gz", broken).number == 30


def test_places_are_what_an_editor_shows(tmp_path: Path) -> None:
    assert read(tmp_path, "t.jsonl", '\n{"a": 1}\n\n{"a": 2}').place(1) == "t.jsonl line 4"
    assert read(tmp_path, "d.json", '[\n {"a": 1},\n {\n  "a": 2}]').place(1) == "d.json row 2 (line 3)"
    assert read(tmp_path, "t.csv", 'a,b\n"x\ny",1\n\nz,2\n').place(1) == "t.csv line 5"
    assert read_source([{"a": 1}, {"a": 2}]).place(1) == "rows[1]"
    assert read(tmp_path, "s.txt", "one\n<|endoftext|>\n\ntwo").place(1) == "s.txt line 4"


def test_a_list_that_changed_since_gives_no_wrong_line(tmp_path: Path) -> None:
    source = read(tmp_path, "d.json", '[{"a": 1},\n{"a": 2}]')
    write(tmp_path, "d.json", '\n\n[{"a": 1},\n{"a": 2}]')
    assert source.place(1) == "d.json row 2"


def test_text_is_split_at_markers_only(tmp_path: Path) -> None:
    assert read(tmp_path, "a.txt", "one\r\ntwo\n\n").rows == [{"text": "one\ntwo"}]
    source = read(tmp_path, "b.txt", "<|endoftext|>\na\n<|endoftext|>\n\n<|endoftext|>b\n")
    assert [row["text"] for row in source.rows] == ["a", "b"]


def test_text_that_looks_like_json_stays_text(tmp_path: Path) -> None:
    for content in ("[Verse 1] la la", "{curly} words", "[1] a reference", "{} is empty"):
        assert read(tmp_path, "a.txt", content).rows == [{"text": content}]


def test_samples_are_read_by_name() -> None:
    source = read_source("sample:chat")
    assert source.name == "sample:chat" and len(source.rows) == 20
    assert source.place(0) == "sample:chat row 1 (line 2)"
    with pytest.raises(DataError, match="did you mean sample:chat"):
        read_source("sample:chta")


def test_python_lists_are_sources() -> None:
    assert read_source(["one", "two"]).rows == [{"text": "one"}, {"text": "two"}]
    assert read_source([{"a": 1, "b": 2}]).fingerprint == read_source([{"b": 2, "a": 1}]).fingerprint
    assert read_source([{"a": 1}]).fingerprint != read_source([{"a": 2}]).fingerprint


@pytest.mark.parametrize(
    ("rows", "place"),
    [
        ([], "rows"),
        ([{"a": 1}, 5], "rows[1]"),
        ([{"a": 1}, {"a": float("nan")}], "rows[1]"),
        ([{"a": 1}, {2: 1}], "rows[1]"),
        ([{"a": object()}], "rows[0]"),
        ([{"a": "\ud800"}], "rows[0]"),
    ],
)
def test_rows_that_json_cannot_hold_are_refused(rows: list[object], place: str) -> None:
    with pytest.raises(DataError) as caught:
        read_source(rows)
    assert caught.value.where.startswith(place)


def test_a_row_that_holds_itself_is_refused() -> None:
    row: dict[str, object] = {}
    row["self"] = row
    with pytest.raises(DataError):
        read_source([row])


# --- what is refused, by row of the fault table ------------------------------------------------------------


def test_fault_001_empty_file_is_named(tmp_path: Path) -> None:
    assert refused(tmp_path, "a.jsonl", b"").number == 27
    assert refused(tmp_path, "b.json", b"[]").number == 27
    assert refused(tmp_path, "c.csv", b"a,b\n").number == 27
    assert refused(tmp_path, "d.jsonl.gz", gzip.compress(b"")).number == 27


def test_fault_002_blank_file_is_empty_with_its_line_count(tmp_path: Path) -> None:
    assert "3 lines" in refused(tmp_path, "a.jsonl", b"\n \n\t\r\n").problem


def test_fault_003_byte_order_mark_changes_nothing(tmp_path: Path) -> None:
    for name, content in (("a.jsonl", GOOD), ("a.csv", b"text\none\ntwo\n"), ("a.json", b'[{"text": "one"}]')):
        assert read(tmp_path, name, b"\xef\xbb\xbf" + content).rows == read(tmp_path, name, content).rows


@pytest.mark.parametrize("coding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_fault_004_utf16_is_named_with_the_command_to_convert(tmp_path: Path, coding: str) -> None:
    error = refused(tmp_path, "a.jsonl", GOOD.decode().encode(coding))
    assert coding[:6].upper() in error.problem
    assert error.fix.startswith("iconv -f UTF-")


def test_fault_005_other_encodings_name_byte_line_and_guess(tmp_path: Path) -> None:
    error = refused(tmp_path, "a.jsonl", '{"text": "one"}\n{"text": "caf\u00e9 cr\u00e8me"}\n'.encode("latin-1"))
    assert "0xE9 at offset 29, line 2" in error.problem and "Windows-1252" in error.problem
    others = {
        "gb18030": "今天天气很好, 我们去公园散步吧。你喜欢这本书吗?",
        "cp1251": "Привет, мир! Как дела у вас сегодня?",
        "shift_jis": "今日はとても良い天気ですね。公園を散歩しましょう。",
        "cp1252": "Der Bär läuft über die Straße, schön und müde.",
    }
    for coding, text in others.items():
        error = refused(tmp_path, "b.jsonl", f'{{"text": "{text}"}}'.encode(coding))
        named = error.fix.split()[2]
        assert text in f'{{"text": "{text}"}}'.encode(coding).decode(named.lower()), (coding, named)
    assert "cut short" in refused(tmp_path, "c.txt", "abc\u00e9".encode()[:-1]).fix


def test_fault_006_nul_and_control_characters_have_line_and_column(tmp_path: Path) -> None:
    assert "line 2, column 13" in refused(tmp_path, "a.jsonl", b'{"text": "one"}\n{"text": "tw\0"}\n').problem
    error = refused(tmp_path, "b.jsonl", b'{"text": "one"}\n{"text": "t\x07o"}\n')
    assert error.where == "b.jsonl line 2" and "column 12" in error.problem and "U+0007" in error.problem


def test_fault_007_broken_json_names_the_line(tmp_path: Path) -> None:
    error = refused(tmp_path, "a.jsonl", '{"text": "one"}\n{"text": "two"\n{"text": "three"}\n{"text" "four"}\n')
    assert error.where == "a.jsonl line 2" and error.number == 33
    assert "2 lines are faulty: 2, 4" in error.why
    assert '"two"' in error.problem


def test_fault_007_at_most_ten_lines_are_listed(tmp_path: Path) -> None:
    error = refused(tmp_path, "a.jsonl", "{oops}\n" * 25)
    assert error.why == "25 lines are faulty: 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, ..."


def test_fault_007_broken_list_names_row_and_line(tmp_path: Path) -> None:
    error = refused(tmp_path, "a.json", '[\n{"a": 1},\n{"a" 2}\n]')
    assert error.where == "a.json row 2 (line 3)" and "column 6" in error.problem
    assert "cut short" in refused(tmp_path, "b.json", '[\n{"a": 1},\n{"a": ').fix


def test_fault_008_content_wins_over_the_name_and_a_note_says_so(tmp_path: Path) -> None:
    for name, content in (("a.jsonl", b'[{"text": "one"}]'), ("a.json", GOOD), ("a.txt", GOOD), ("a.csv", GOOD)):
        source = read(tmp_path, name, content)
        assert source.rows[0] == {"text": "one"}
        assert len(source.notes) == 1 and "although its name ends in" in source.notes[0]
    assert read(tmp_path, "b.json", b'[{"text": "one"}]').notes == []


@pytest.mark.parametrize(
    ("line", "cause", "column"),
    [
        ('{"a": 1}{"a": 2}', "a second value follows", 9),
        ('{"a": 1},', "a comma after the row", 9),
        ('{"a": 1,}', "trailing comma before '}'", 8),
        ('{"a": [1, ]}', "trailing comma before ']'", 9),
        ("{'a': 1}", "single quotes", 2),
        ('{"a": None}', "Python word None", 7),
        ('{"a": "x}', "not closed", 7),
        ('{"a": "c:\\q"}', "backslash", None),
        ('{"a": 1', "ends in the middle", 8),
        ('{"a": "say "hi""}', "comma is missing", 13),
    ],
)
def test_fault_009_usual_json_slips_have_their_position_and_cure(
    tmp_path: Path, line: str, cause: str, column: int | None
) -> None:
    error = refused(tmp_path, "a.jsonl", '{"a": 0}\n' + line + "\n")
    assert error.where == "a.jsonl line 2" and cause in error.problem
    assert column is None or f"column {column}:" in error.problem


def test_fault_009_slips_between_rows_of_a_list(tmp_path: Path) -> None:
    assert "trailing comma" in refused(tmp_path, "a.json", '[{"a": 1},\n]').problem
    assert "comma is missing" in refused(tmp_path, "b.json", '[{"a": 1}\n{"a": 2}]').problem
    assert "second value" in refused(tmp_path, "c.json", '[{"a": 1}]\n[{"a": 2}]').problem


def test_fault_009_objects_over_several_lines_are_told_apart(tmp_path: Path) -> None:
    assert "spread over several lines" in refused(tmp_path, "a.jsonl", '{\n"a": 1\n}\n{\n"a": 2\n}\n').problem
    error = refused(tmp_path, "b.json", '{\n"version": 1,\n"data": [{"a": 1}]\n}\n')
    assert "one object" in error.problem and "'data'" in error.fix


def test_fault_010_duplicate_key_is_refused(tmp_path: Path) -> None:
    error = refused(tmp_path, "a.jsonl", '{"a": 1}\n{"a": 1, "b": {"c": 1, "c": 2}}\n')
    assert error.number == 34 and error.where == "a.jsonl line 2, field b.c"
    assert refused(tmp_path, "a.json", '[{"a": 1},\n{"a": 1, "a": 1}]').where == "a.json row 2 (line 2), field a"


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000])
def test_fault_011_numbers_that_are_none_are_refused_with_their_field(tmp_path: Path, value: str) -> None:
    for name, content in (("a.jsonl", '{"a": [0, %s]}'), ("a.json", '[{"a": [0, %s]}]')):
        error = refused(tmp_path, name, content % value)
        assert error.number == 35 and error.where.endswith("field a[1]")


@pytest.mark.parametrize("depth", [101, 5_000, 100_000])
def test_fault_012_nesting_is_limited(tmp_path: Path, depth: int) -> None:
    deep = '{"a": ' + "[" * depth + "]" * depth + "}"
    assert refused(tmp_path, "a.jsonl", f'{{"a": 1}}\n{deep}\n').number == 37
    assert "row 2 (line 2)" in refused(tmp_path, "a.json", f'[{{"a": 1}},\n{deep}]').where


def test_fault_012_a_hundred_levels_are_allowed(tmp_path: Path) -> None:
    assert read(tmp_path, "a.jsonl", '{"a": ' + "[" * 99 + "]" * 99 + "}").rows
    refused(tmp_path, "b.jsonl", '{"a": ' + "[" * 100 + "]" * 100 + "}")


def test_fault_013_lone_surrogate_is_refused_and_pairs_are_not(tmp_path: Path) -> None:
    error = refused(tmp_path, "a.jsonl", '{"a": "x"}\n{"a": "\\ud83d\\ude00", "b": ["ok\\ud83d"]}\n')
    assert error.number == 36 and error.where == "a.jsonl line 2, field b[0]"
    assert refused(tmp_path, "b.json", '[{"\\uD800": 1}]').number == 36
    assert read(tmp_path, "c.jsonl", '{"a": "\\ud83d\\ude00 \\\\ud83d"}').rows[0]["a"] == "\U0001f600 \\ud83d"


def test_fault_014_files_above_the_limit_are_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(tmp_path / "big.jsonl", "wb") as file:
        file.truncate(3 * 1024**3)
    with pytest.raises(DataError, match="limit of 2 GB"):
        read_source("big.jsonl", base=tmp_path)
    monkeypatch.setattr(files, "SIZE_LIMIT", 1000)
    assert refused(tmp_path, "bomb.jsonl.gz", gzip.compress(b'{"a": "' + b"x" * 9000 + b'"}')).number == 26


def test_fault_017_a_row_that_is_no_object_is_named(tmp_path: Path) -> None:
    error = refused(tmp_path, "a.jsonl", '{"a": 1}\n[1, 2]\n"x"\n')
    assert error.where == "a.jsonl line 2" and "is a list" in error.problem and "2, 3" in error.why
    assert refused(tmp_path, "b.json", '[{"a": 1},\n7]').where == "b.json row 2 (line 2)"


def test_semicolons_may_separate_columns_as_spreadsheets_write_them(tmp_path: Path) -> None:
    source = read(tmp_path, "a.csv", "q;r\n1;2,5\n")
    assert source.rows == [{"q": "1", "r": "2,5"}] and "semicolons" in source.notes[0]


@pytest.mark.parametrize(("name", "text"), [("a.jsonl", '{"a": 1}\n{"a" 2}\n{"a": 3}\n'), ("a.csv", "a,b\n1,1\n2\n3,3\n")])
def test_lines_that_are_no_rows_may_be_left_out_and_are_listed(tmp_path: Path, name: str, text: str) -> None:
    write(tmp_path, name, text)
    source = read_source(name, base=tmp_path, drop=True)
    assert [str(row["a"]) for row in source.rows] == ["1", "3"]
    line = 2 if name.endswith("jsonl") else 3
    assert list(source.broken) == [f"{name} line {line}"] and source.place(1) == f"{name} line {line + 1}"


def test_fault_020_table_faults_name_row_and_column(tmp_path: Path) -> None:
    assert "'|'" in refused(tmp_path, "a.csv", "q|r\n1|2\n").problem
    assert refused(tmp_path, "b.csv", 'q,r\n1,2\n"x,3\n4,5\n').where == "b.csv line 3"
    error = refused(tmp_path, "c.csv", "q,r\n1,2\n3\n4,5,6\n")
    assert error.where == "c.csv line 3" and "lines 3, 4" in error.why
    assert "'q'" in refused(tmp_path, "d.csv", "q,r,q\n1,2,3\n").problem
    assert refused(tmp_path, "e.csv", 'q,r\n"x"y,2\n').number == 39


def test_fault_021_binary_kinds_are_named(tmp_path: Path) -> None:
    assert "zip archive" in refused(tmp_path, "a.xlsx", b"PK\x03\x04" + bytes(50)).problem
    assert refused(tmp_path, "a.weird", b"some words").number == 32


def test_fault_014_a_line_of_200_mb_is_refused_in_little_memory(tmp_path: Path) -> None:
    with open(tmp_path / "long.jsonl", "wb") as file:
        file.write(GOOD + b'{"text": "')
        for _ in range(200):
            file.write(b"\xc3\xa9" * 2**19)
        file.write(b'"}\n')
    code = (
        f"import sys, resource; sys.path[:] = {sys.path!r}\n"
        "from llm_finetune_kit.data.sources import read_source\n"
        "from llm_finetune_kit.errors import DataError\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n    read_source(sys.argv[1])\n"
        "except DataError as error:\n    print(error)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)\n"
    )
    run = subprocess.run([sys.executable, "-c", code, tmp_path / "long.jsonl"], capture_output=True, text=True, check=True)
    said, megabytes = run.stdout.rsplit("\n", 2)[:2]
    assert "long.jsonl line 3: is 200 MB long; the limit of one line is 64 MB" in said
    assert float(megabytes) < 600, "less than three times the line"


def test_fault_014_long_lines_are_found_wherever_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LINE_LIMIT", 20)
    assert refused(tmp_path, "a.jsonl", b'{"a": 1}\n' * 9 + b'{"a": "0123456789012"}\n{"a": 1}').where.endswith("line 10")
    assert refused(tmp_path, "b.csv", b"a\n" + b"x" * 21).where.endswith("line 2")
    assert len(read(tmp_path, "c.jsonl", b'{"a": "01234567890"}\n' * 50).rows) == 50, "lines of just the limit are read"
    assert read(tmp_path, "d.txt", b"a long line is what texts may have").rows


def test_fault_030_what_is_no_file_is_named_and_never_hangs(tmp_path: Path) -> None:
    write(tmp_path, "train.jsonl", GOOD)
    os.mkfifo(tmp_path / "pipe.jsonl")
    os.symlink(tmp_path / "gone", tmp_path / "link.jsonl")
    (tmp_path / "empty").mkdir()
    (tmp_path / "pipes").mkdir()
    os.mkfifo(tmp_path / "pipes" / "train.jsonl")
    os.mkfifo(tmp_path / "empty" / "state.json")
    cases = {"empty": 22, "pipe.jsonl": 23, "pipes": 23, "/dev/zero": 23, "link.jsonl": 24, "nowhere/a.jsonl": 20}
    cases["train.jsonl/x.json"] = 25
    for name, number in cases.items():
        with pytest.raises(DataError) as caught:
            read_source(name, base=tmp_path)
        assert caught.value.number == number, name
    for odd in ("", "a\0b", "x" * 300 + ".json", "~nobody-of-this-name/a.json"):
        with pytest.raises(DataError):
            read_source(odd, base=tmp_path)


@pytest.mark.parametrize("name", ["a.jsonl", "folder", "folder/a.jsonl"])
def test_fault_030_a_file_without_permission_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    path = write(tmp_path, "a.jsonl", GOOD)
    write(tmp_path, "folder/a.jsonl", GOOD)
    path.chmod(0)
    (tmp_path / "folder").chmod(0)
    was_root = os.geteuid() == 0
    if was_root:
        for above in tmp_path.parents[:2]:  # made by pytest, for its user alone
            above.chmod(0o755)
        os.seteuid(65534)
    try:
        with pytest.raises(DataError) as caught:
            read_source(tmp_path / name)
    finally:
        if was_root:
            os.seteuid(0)
        (tmp_path / "folder").chmod(0o755)
    assert caught.value.number == 25 and name.partition("/")[0] in caught.value.where


def test_a_missing_file_gets_a_guess(tmp_path: Path) -> None:
    write(tmp_path, "train.jsonl", GOOD)
    with pytest.raises(DataError, match=r"did you mean train\.jsonl\?") as caught:
        read_source("train.jsnol", base=tmp_path)
    assert caught.value.number == 20


def test_names_that_are_nothing_are_told_apart(tmp_path: Path) -> None:
    for name, words in {
        "https://example.org/a.json#5": "web addresses are not read",
        "alpca": "did you mean alpaca?",
        "chat": "did you mean sample:chat?",
        "both": "stands for alpaca and daily_dialog",
    }.items():
        with pytest.raises(DataError, match=re.escape(words)) as caught:
            read_source(name, base=tmp_path)
        assert caught.value.number == 21


def test_a_hub_name_without_a_network_says_so(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="owner/unseen is no file here and not in the hub's cache") as caught:
        read_source("owner/unseen:train[:10%]", base=tmp_path)
    assert caught.value.why == "HF_HUB_OFFLINE is set"


def test_local_copies_of_named_sets_come_first(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write(tmp_path, "data/alpaca_data.json.gz", gzip.compress(b'[{"instruction": "a", "output": "b"}]'))
    write(tmp_path, "dialogues_text.txt", "Hi . __eou__ Hello . __eou__\nBye . __eou__ Bye ! __eou__\n")
    alpaca = read_source("alpaca#1", base=tmp_path)
    assert alpaca.rows == [{"instruction": "a", "output": "b"}] and alpaca.licence == Licence("CC BY-NC 4.0", commercial=False)
    assert "alpaca is read from" in alpaca.notes[0]
    for name in ("daily_dialog", "dailydialog"):
        dialogues = read_source(name, base=tmp_path)
        assert dialogues.rows == [{"dialog": ["Hi .", "Hello ."]}, {"dialog": ["Bye .", "Bye !"]}]
        assert dialogues.licence == Licence("CC BY-NC-SA 4.0", commercial=False)
        assert held_out_beside(name, base=tmp_path) is None
    os.remove(tmp_path / "dialogues_text.txt")
    for part in ("train", "validation"):
        (tmp_path / "data" / "daily_dialog").mkdir(exist_ok=True)
        write(tmp_path, f"data/daily_dialog/{part}.jsonl", f'{{"dialog": ["{part}", "b"]}}\n')
    assert held_out_beside("daily_dialog", base=tmp_path) == "daily_dialog:validation"
    held_out = read_source("daily_dialog:validation", base=tmp_path)
    assert held_out.rows[0]["dialog"][0] == "validation" and held_out.licence is not None


# --- real files and speed ----------------------------------------------------------------------------------


@needs_shared
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("sft/alpaca_data.json.gz", 52_002),
        ("sft/databricks-dolly-15k.jsonl.gz", 15_011),
        ("sft/gsm8k_train.jsonl.gz", 7_473),
        ("sft/gsm8k_test.jsonl.gz", 1_319),
        ("sft/llamafactory/alpaca_en_demo.json", 999),
        ("sft/llamafactory/glaive_toolcall_en_demo.json", 300),
        ("sft/llamafactory/identity.json", 91),
        ("sft/llamafactory/reason_tool_use_demo_50.jsonl", 50),
        ("dialogue/sgd_sharegpt_train.jsonl.gz", 12_174),
        ("dialogue/sgd_sharegpt_test.jsonl.gz", 2_921),
        ("preference/llamafactory/dpo_en_demo.json", 300),
        ("preference/llamafactory/kto_en_demo.json", 300),
        ("sft/llamafactory/v1_sft_demo.jsonl", 500),
        ("dialogue/sgd_sharegpt_dev.jsonl.gz", 2_098),
        ("text/tinystories_sample_2MiB.txt.gz", 2_317),
        ("text/c4_demo.jsonl.gz", 300),
    ],
)
def test_real_files_are_read_whole(name: str, count: int) -> None:
    start = time.process_time()
    source = read_source(SHARED / name)
    assert time.process_time() - start < 6
    assert len(source.rows) == count
    assert source.notes == []


@needs_shared
@pytest.mark.parametrize(
    ("name", "count", "columns", "said"),
    [
        ("dialogue/dailydialog_text_8096.txt.gz", 8_096, ["dialog"], "8,096 dialogues"),
        ("dialogue/dailydialog_dev.tsv.gz", 995, ["dialog", "topic", "act", "emotion"], "has no header"),
        ("dialogue/dailydialog_test.tsv.gz", 996, ["dialog", "topic", "act", "emotion"], "has no header"),
        ("text/wiki_demo.txt.gz", 30, ["text"], "30 documents, one to a line"),
        ("text/tinyshakespeare.txt.gz", 1, ["text"], "one document"),
    ],
)
def test_real_files_without_a_header_or_separators(name: str, count: int, columns: list[str], said: str) -> None:
    source = read_source(SHARED / name)
    assert len(source.rows) == count
    assert all(list(row) == columns for row in source.rows)
    assert len(source.notes) == 1 and said in source.notes[0]
    if "dialog" in columns:
        turns = [row["dialog"] for row in source.rows]
        assert all(len(dialog) > 1 and all(dialog) for dialog in turns)
        assert not any("__eou__" in text for dialog in turns for text in dialog)


def test_line_separators_inside_texts_do_not_end_lines(tmp_path: Path) -> None:
    rows = [{"text": "a\u2028b\u2029c\x85d"}, {"text": "e"}]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    source = read(tmp_path, "a.jsonl", lines)
    assert source.rows == rows and source.place(1) == "a.jsonl line 2"


def test_importing_brings_no_heavy_package() -> None:
    code = f"import sys; sys.path[:] = {sys.path!r}; import llm_finetune_kit.data.formats; "
    code += "print({'torch', 'numpy', 'pydantic', 'datasets'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
