"""Examples written in another shape and read again are the same; what a shape cannot hold is refused or counted."""

from __future__ import annotations

import csv
import gzip
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from llm_finetune_kit.data.formats import Example, detect, to_examples
from llm_finetune_kit.data.formats.convert import SHAPES, WRITERS, convert, write_rows
from llm_finetune_kit.data.formats.rows import Notes
from llm_finetune_kit.data.sources import Source, read_source
from llm_finetune_kit.errors import DataError

ASK = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": [1, None, "é"]}}}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
ROWS: dict[str, dict[str, Any]] = {
    "one question": {"messages": [ASK, ANSWER]},
    "several turns": {"messages": [{"role": "system", "content": "s"}, ASK, ANSWER, ASK, ANSWER]},
    "weights": {"messages": [ASK, {**ANSWER, "weight": 0}, ASK, ANSWER]},
    "thought": {"messages": [ASK, {**ANSWER, "reasoning_content": "hm"}]},
    "tools": {
        "messages": [
            ASK,
            {**ANSWER, "tool_calls": [CALL, {**CALL, "id": "1"}]},
            {"role": "tool", "content": "", "name": "f"},
            {"role": "tool", "content": "2", "tool_call_id": "1"},
            ANSWER,
        ],
        "tools": TOOLS,
    },
}


def read(source: Source | list[Any]) -> list[Example]:
    source = read_source(source) if isinstance(source, list) else source
    return to_examples(source, detect(source, None), on_bad_rows="stop", system_prompt=None).examples


def meaning(example: Example) -> Any:
    """All that is learned from an example; `train: True` and no word about it are the same."""
    messages = [
        {key: value for key, value in message.items() if key not in ("instruction", "input") and (key, value) != ("train", True)}
        for message in example.messages or []
    ]
    for message in messages:
        if message["role"] != "assistant":
            message.pop("train", None)
    return messages, example.text, example.tools, example.rejected, example.label


def there_and_back(examples: list[Example], to: str) -> tuple[list[Any], Notes]:
    lost: Notes = Counter()
    rows = list(convert(examples, to, lost))
    source = read_source(rows)
    assert detect(source, None).format.name == to
    return [meaning(example) for example in read(source)], lost


# --- round trips -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["messages", "sharegpt"])
@pytest.mark.parametrize("what", ROWS)
def test_nothing_is_lost_between_conversations(what: str, to: str) -> None:
    examples = read([ROWS[what]])
    again, lost = there_and_back(examples, to)
    assert again == [meaning(example) for example in examples] and not lost


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("sft/alpaca_data.json.gz", "messages sharegpt alpaca prompt-response prompt-completion"),
        ("sft/databricks-dolly-15k.jsonl.gz", "messages sharegpt alpaca prompt-response prompt-completion"),
        ("sft/gsm8k_test.jsonl.gz", "messages sharegpt alpaca prompt-response prompt-completion"),
        ("sft/llamafactory/v1_sft_demo.jsonl", "messages sharegpt alpaca prompt-response prompt-completion"),
        ("sft/llamafactory/glaive_toolcall_en_demo.json", "messages sharegpt"),
        ("sft/llamafactory/reason_tool_use_demo_50.jsonl", "messages sharegpt"),
        ("dialogue/sgd_sharegpt_dev.jsonl.gz", "messages sharegpt alpaca prompt-response"),
        ("preference/llamafactory/dpo_en_demo.json", "preference"),
        ("text/c4_demo.jsonl.gz", "text"),
    ],
)
def test_real_files_survive_every_lossless_way(shared: Path, name: str, shapes: str) -> None:
    examples = read(read_source(shared / name))[:3000]
    before = [meaning(example) for example in examples]
    for to in shapes.split():
        again, lost = there_and_back(examples, to)
        assert again == before and not lost, to


def test_alpaca_keeps_input_and_history() -> None:
    row = {"instruction": "q", "input": "i", "output": "a", "system": "s", "history": [["q0", "a0"]]}
    assert list(convert(read([row]), "alpaca")) == [row]
    again, lost = there_and_back(read([ROWS["weights"]]), "alpaca")
    assert again != [meaning(example) for example in read([ROWS["weights"]])]
    assert list(lost.values()) == [1] and "earlier answer is not learned" in next(iter(lost))


def test_prompt_completion_is_text_where_all_examples_are() -> None:
    assert list(convert(read([ROWS["one question"]]), "prompt-completion")) == [{"prompt": "q", "completion": "a"}]
    lost: Notes = Counter()
    rows = list(convert(read([ROWS["one question"], ROWS["several turns"]]), "prompt-completion", lost))
    assert [type(row["prompt"]) for row in rows] == [list, list]
    assert list(lost.values()) == [1] and "earlier answer is learned too" in next(iter(lost))


def test_preference_data_keeps_the_good_answers_only(shared: Path) -> None:
    pairs = read(read_source(shared / "preference/llamafactory/dpo_en_demo.json"))
    lost: Notes = Counter()
    rows = list(convert(pairs, "messages", lost))
    assert len(rows) == 300 and list(lost.values()) == [300]
    assert [row["messages"][-1]["content"] for row in rows] == [(pair.messages or [])[-1]["content"] for pair in pairs]
    rated = read(read_source(shared / "preference/llamafactory/kto_en_demo.json"))
    lost = Counter()
    rows = list(convert(rated, "messages", lost))
    assert len(rows) == 150 and lost == {"are rated as bad, and were left out": 150}
    with pytest.raises(DataError, match="150 of 150 examples have no rejected answer"):
        convert(rated, "preference")


def test_preference_pairs_that_part_late_stay_apart_at_the_same_place() -> None:
    call = {**ANSWER, "content": "", "tool_calls": [CALL]}
    result = {"role": "tool", "content": "1"}
    row = {"chosen": [ASK, call, result, ANSWER], "rejected": [ASK, call, result, {**ANSWER, "content": "b"}], "tools": TOOLS}
    examples = read([row])
    assert examples[0].rejected == [{**ANSWER, "content": "b"}]
    again, _ = there_and_back(examples, "preference")
    assert again == [meaning(example) for example in examples]


@pytest.mark.parametrize(
    ("what", "to", "words"),
    [
        ("tools", "alpaca", "1 of 2 examples have tools"),
        ("tools", "prompt-response", "1 of 2 examples have tools"),
        ("tools", "text", "2 of 2 examples have roles"),
        ("tools", "preference", "2 of 2 examples have no rejected answer"),
    ],
)
def test_what_would_lose_the_meaning_is_refused_with_a_count(what: str, to: str, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        convert(read([ROWS["one question"], ROWS[what]]), to)
    assert caught.value.number == 88 and "write them as" in caught.value.fix
    with pytest.raises(DataError, match="1 of 1 examples have plain text"):
        convert(read(["words"]), "messages")


def test_an_unknown_shape_gets_a_guess() -> None:
    with pytest.raises(DataError, match="did you mean sharegpt") as caught:
        convert(read([ROWS["one question"]]), "shargpt")
    assert caught.value.number == 89


# --- files -------------------------------------------------------------------------------------------------

HARD = ["=1+1", "+x", "-x", "@x", "a,b\tc", 'say "no"', "two\nlines", "win\r\nlines", "old\rmac", " spaces ", "é 漢 \u2028", "'"]


@pytest.mark.parametrize("ending", [ending for ending in WRITERS if ending != ".parquet"])
def test_every_text_file_is_read_back_as_it_was(tmp_path: Path, ending: str) -> None:
    rows = [{"prompt": f"q{text}", "response": text} for text in HARD]
    path = tmp_path / f"out{ending}"
    assert write_rows(path, iter(rows)) == len(rows)
    assert read_source(path).rows == rows
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("ending", [".jsonl", ".json.gz", ".csv", ".tsv.gz", ".parquet"])
@pytest.mark.parametrize("to", ["messages", "sharegpt"])
def test_conversations_survive_every_kind_of_file(tmp_path: Path, ending: str, to: str) -> None:
    examples = read(list(ROWS.values()))
    path = tmp_path / f"out{ending}"
    write_rows(path, convert(examples, to))
    source = read_source(path)
    detected = detect(source, None)
    assert detected.format.name == to
    assert [meaning(example) for example in read(source)] == [meaning(example) for example in examples]


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet"])
def test_other_shapes_survive_files_too(tmp_path: Path, ending: str) -> None:
    several = read([ROWS["one question"], ROWS["several turns"]])
    pair = read([{"prompt": [ASK, ANSWER, ASK], "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "b"}]}])
    for number, (examples, to) in enumerate([(several, "alpaca"), (several, "prompt-response"), (pair, "preference")]):
        path = tmp_path / f"out{number}{ending}"
        write_rows(path, convert(examples, to))
        assert [meaning(example) for example in read(read_source(path))] == [meaning(example) for example in examples]
    for number, to in enumerate(["prompt-completion"]):
        path = tmp_path / f"pairs{number}{ending}"
        write_rows(path, convert(several, to))
        assert [meaning(e) for e in read(read_source(path))] == there_and_back(several, to)[0]


@pytest.mark.parametrize("ending", [".csv", ".tsv"])
def test_fault_112_no_cell_of_a_table_is_a_formula_and_reading_it_gives_the_texts_back(tmp_path: Path, ending: str) -> None:
    starts = ["=", "+", "-", "@", "\t", "\r", "\n", "'", "''", "'=", "''-", "a", "5", "-", "", " "]
    texts = [first + second + rest for first in starts for second in starts for rest in ("", "cmd|' /C calc'!A0", "1.5")]
    texts = [*dict.fromkeys(text for text in texts if text.strip()), *HARD]
    rows = [{"prompt": text, "response": text, "=extra": text, "number": -1.5} for text in texts]
    write_rows(tmp_path / f"out{ending}", rows)
    with open(tmp_path / f"out{ending}", encoding="utf-8", newline="") as file:
        head, *written = list(csv.reader(file, delimiter="\t" if ending == ".tsv" else ","))
    assert head == ["prompt", "response", "'=extra", "number"]
    cells = [cell for row in written for cell in row[:3]]
    assert not [cell for cell in cells if cell[:1] in tuple("=+-@\t\r\n") and not re.fullmatch(r"[+-]?\d+(\.\d+)?", cell)]
    assert {row[3] for row in written} == {"-1.5"}
    assert [{**row, "number": "-1.5"} for row in rows] == read_source(tmp_path / f"out{ending}").rows


def test_a_packed_file_is_the_same_every_time(tmp_path: Path) -> None:
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        write_rows(tmp_path / name, [{"text": "words"}])
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()
    assert json.loads(gzip.decompress((tmp_path / "a.jsonl.gz").read_bytes())) == {"text": "words"}


def test_a_file_is_never_overwritten_unasked(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("precious")
    with pytest.raises(DataError) as caught:
        write_rows(path, [{"text": "words"}])
    assert caught.value.number == 90 and path.read_text() == "precious"
    write_rows(path, [{"text": "words"}], overwrite=True)
    assert json.loads(path.read_text()) == {"text": "words"}


def test_a_failed_write_leaves_the_old_file_and_no_draft(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("precious")

    def rows() -> Any:
        yield {"text": "words"}
        raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match="No space left") as caught:
        write_rows(path, rows(), overwrite=True)
    assert caught.value.number == 91
    with pytest.raises(DataError, match="no rows to write"):
        write_rows(path, [], overwrite=True)
    assert path.read_text() == "precious" and len(list(tmp_path.iterdir())) == 1


def test_an_unknown_ending_or_folder_is_named(tmp_path: Path) -> None:
    for name, number in (("out.xlsx", 89), ("out", 89), ("none/out.jsonl", 91)):
        with pytest.raises(DataError) as caught:
            write_rows(tmp_path / name, [{"text": "words"}])
        assert caught.value.number == number, name


def test_every_shape_is_one_that_is_read() -> None:
    from llm_finetune_kit.data.formats import FORMATS

    assert set(SHAPES) <= {shape.name for shape in FORMATS}
