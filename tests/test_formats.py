"""Rows of every known shape become messages or text; rows that cannot are named, and nothing is lost in silence."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any, Literal

import pytest

from llm_finetune_kit.data.formats import FORMATS, Formatted, detect, to_examples
from llm_finetune_kit.data.sources import Source, read_source
from llm_finetune_kit.errors import DataError

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data folder is not here")
ASK = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}


def formatted(
    source: Source | list[Any],
    asked: str | None = None,
    *,
    on_bad_rows: Literal["stop", "drop"] = "stop",
    system_prompt: str | None = None,
) -> Formatted:
    source = read_source(source) if isinstance(source, list) else source
    return to_examples(source, detect(source, asked), on_bad_rows=on_bad_rows, system_prompt=system_prompt)


def messages(row: dict[str, Any], asked: str | None = None) -> list[dict[str, Any]] | None:
    return formatted([row], asked).examples[0].messages


def stopped(rows: list[Any], asked: str | None = None) -> DataError:
    with pytest.raises(DataError) as caught:
        formatted(rows, asked)
    return caught.value


def chat(*roles: str, **changes: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": "words", **changes} for role in roles]}


# --- shapes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"messages": [ASK, ANSWER]}, "messages"),
        ({"conversations": [ASK, ANSWER]}, "messages"),
        ({"dialogue": [ASK, ANSWER]}, "messages"),
        ({"texts": [ASK, ANSWER]}, "messages"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "sharegpt"),
        ({"conversations": [{"from": "user", "value": "q"}, {"from": "chatgpt", "value": "a"}]}, "sharegpt"),
        ({"output": "a", "id": 5, "instruction": "q"}, "alpaca"),
        ({"Instruction": "q", "OUTPUT": "a", "Input": ""}, "alpaca"),
        ({"instruction": "q", "response": "a", "context": "", "category": "qa"}, "dolly"),
        ({"instruction": "q", "answer": "a"}, "instruction-answer"),
        ({"prompt": "q", "response": "a"}, "prompt-response"),
        ({"prompt": "q", "completion": "a"}, "prompt-completion"),
        ({"prompt": [ASK], "completion": [ANSWER]}, "prompt-completion"),
        ({"question": "q", "answer": "a"}, "question-answer"),
        ({"query": "q", "answer": "a"}, "query-answer"),
        ({"query": "q", "response": "a"}, "query-response"),
        ({"problem": "q", "solution": "a"}, "pairs"),
        ({"input": "q", "targets": "a"}, "pairs"),
        ({"prompt": "q", "text": "a"}, "pairs"),
    ],
)
def test_every_shape_becomes_the_same_conversation(row: dict[str, Any], name: str) -> None:
    source = read_source([row])
    assert detect(source, None).format.name == name
    assert messages(row) == [ASK, ANSWER]


def test_raw_text_stays_text() -> None:
    for row in ({"text": "words"}, {"content": "words", "url": "x"}, "words"):
        example = formatted([row]).examples[0]
        assert example.text == "words" and example.messages is None


def test_an_input_is_joined_and_kept_apart_too() -> None:
    joined = {"role": "user", "content": "q\n\ni", "instruction": "q", "input": "i"}
    assert messages({"instruction": "q", "input": "i", "output": "a"}) == [joined, ANSWER]
    assert messages({"instruction": "q", "context": "i", "response": "a"}) == [joined, ANSWER]
    for nothing in (None, "", "  \n"):
        assert messages({"instruction": "q", "input": nothing, "output": "a"}) == [ASK, ANSWER]


def test_alpaca_takes_system_and_history() -> None:
    row = {"instruction": "q", "output": "a", "system": "s", "history": [["q", "a"], ["q", "a"]]}
    assert messages(row) == [SYSTEM, ASK, ANSWER, ASK, ANSWER, ASK, ANSWER]
    assert stopped([{**row, "history": [["q"]]}]).where == "rows[0], field history[0]"


def test_a_system_prompt_is_added_where_there_is_none() -> None:
    rows = [{"messages": [ASK, ANSWER]}, {"messages": [{**SYSTEM, "content": "own"}, ASK, ANSWER]}]
    found = [example.messages[0]["content"] for example in formatted(rows, system_prompt="s").examples if example.messages]
    assert found == ["s", "own"]


def test_typed_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "value": "two"}]
    made = messages({"messages": [{"role": "user", "content": parts}, ANSWER]})
    assert made and made[0]["content"] == "one two"
    image = [{"type": "image_url", "image_url": "x"}]
    error = stopped([{"messages": [{"role": "user", "content": image}, ANSWER]}])
    assert error.where == "rows[0], field messages[0].content[0].type" and "image_url" in error.problem


@pytest.mark.parametrize("key", ["train", "training", "loss", "weight", "loss_weight"])
def test_what_is_learned_can_be_said_per_message(key: str) -> None:
    made = messages({"messages": [ASK, {**ANSWER, key: 0}, ASK, {**ANSWER, key: True}]})
    assert made and [message.get("train") for message in made] == [None, False, None, True]
    assert stopped([{"messages": [ASK, {**ANSWER, key: False}]}]).number == 8
    assert stopped([{"messages": [ASK, {**ANSWER, key: 0.5}]}]).where.endswith(f"messages[1].{key}")


def test_of_a_list_of_prompts_only_the_completion_is_learned() -> None:
    made = messages({"prompt": [SYSTEM, ASK, ANSWER, ASK], "completion": [ANSWER]})
    assert made and [message.get("train") for message in made] == [None, None, False, None, None]
    error = stopped([{"prompt": [ASK], "completion": [{"role": "assistant", "content": 5}]}])
    assert error.where == "rows[0], field completion[0].content"


def test_tool_turns_are_text_with_a_warning() -> None:
    turns = [("human", "q"), ("function_call", "f()"), ("observation", "1"), ("observation", "2"), ("gpt", "a")]
    result = formatted([{"conversations": [{"from": name, "value": said} for name, said in turns], "tools": "[]"}])
    assert result.examples[0].messages == [
        ASK,
        {"role": "assistant", "content": "f()"},
        {"role": "user", "content": "1\n2"},
        ANSWER,
    ]
    assert any("tool calls" in warning for warning in result.warnings)
    assert any("not shown to the model" in warning for warning in result.warnings)


def test_openai_tool_calls_are_not_lost() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    made = messages({"messages": [ASK, call, {"role": "tool", "content": "1"}, {**ANSWER, "tool_calls": None}]})
    assert made and made[1]["content"] == '{"name": "f", "arguments": "{}"}' and made[3] == ANSWER
    made = messages({"messages": [ASK, {**call, "content": "see:"}]})
    assert made and made[1]["content"].startswith("see:\n{")


def test_leading_answer_and_trailing_question_are_left_out_with_a_warning() -> None:
    result = formatted([{"messages": [ANSWER, ASK, ANSWER, ASK]}, {"messages": [SYSTEM, ANSWER, ASK, ANSWER]}])
    assert [example.messages for example in result.examples] == [[ASK, ANSWER], [SYSTEM, ASK, ANSWER]]
    assert any(warning.startswith("2 rows") and "begin with an answer" in warning for warning in result.warnings)
    assert any(warning.startswith("1 row:") and "end with a question" in warning for warning in result.warnings)


# --- detection ---------------------------------------------------------------------------------------------


def test_the_reason_names_used_and_unused_columns() -> None:
    source = read_source([{"category": "x", "response": "a", "instruction": "q"}])
    assert detect(source, None).why == "found instruction + response; not used: category"
    assert detect(source, "dolly").why == "you asked for it"


def test_a_format_asked_for_must_exist_and_fit() -> None:
    source = read_source([{"instruction": "q", "output": "a"}])
    with pytest.raises(DataError, match="did you mean alpaca"):
        detect(source, "alpacca")
    with pytest.raises(DataError, match="needs messages/conversations") as caught:
        detect(source, "openai")
    assert caught.value.number == 1


def test_preference_data_is_not_learned_as_if_all_were_good() -> None:
    assert stopped([{"prompt": "q", "chosen": "a", "rejected": "b"}]).number == 11
    assert stopped([{"prompt": "q", "completion": "a", "label": False}]).number == 11
    assert messages({"prompt": "q", "completion": "a", "label": False}, "prompt-completion") == [ASK, ANSWER]
    assert messages({"prompt": "q", "completion": "a", "label": 3}) == [ASK, ANSWER]


def test_every_format_is_named_once() -> None:
    names = [shape.name for shape in FORMATS]
    assert len(names) == len(set(names))


# --- faults ------------------------------------------------------------------------------------------------


def test_fault_015_unknown_columns_name_the_nearest_and_the_shapes() -> None:
    error = stopped([{"instructon": "q", "output": "a"}])
    assert "instructon, output" in error.problem
    assert "did you mean 'instruction' instead of 'instructon'" in error.fix
    assert "alpaca (instruction + output)" in error.fix


def test_fault_015_a_misspelt_column_is_not_left_out_in_silence() -> None:
    assert "did you mean 'instruction'?" in stopped([{"instructon": "q", "input": "i", "output": "a"}]).problem
    assert "did you mean 'input'?" in stopped([{"instruction": "q", "inputs": "i", "output": "a"}]).problem
    assert messages({"instruction": "q", "inputs": "i", "output": "a"}, "alpaca") == [ASK, ANSWER]


@pytest.mark.parametrize(
    ("value", "number", "problem"),
    [
        (None, 4, "is null"),
        (5, 5, "is a number"),
        (["a"], 5, "is a list"),
        ({}, 5, "is an object"),
        (True, 5, "is true"),
    ],
)
def test_fault_016_what_is_no_text_is_named_with_place_and_kind(value: Any, number: int, problem: str) -> None:
    for bad, field in (
        ({"instruction": "q", "output": value}, "output"),
        ({"Instruction": value, "output": "a"}, "Instruction"),
        ({"messages": [ASK, {"role": "assistant", "content": value}]}, "messages[1].content"),
        ({"conversations": [{"from": "human", "value": value}]}, "conversations[0].value"),
    ):
        if field.endswith(("content", "value")) and isinstance(value, list):
            continue
        error = stopped([bad])
        assert (error.number, error.where) == (number, f"rows[0], field {field}")
        assert problem in error.problem


def test_fault_016_the_message_names_file_line_field_and_the_other_lines(tmp_path: Path) -> None:
    good, bad = '{"instruction": "q", "output": "a"}\n', '{"instruction": "q", "output": null}\n'
    (tmp_path / "train.jsonl").write_text(good + bad + good + bad + bad)
    with pytest.raises(DataError) as caught:
        formatted(read_source("train.jsonl", base=tmp_path))
    assert str(caught.value).splitlines() == [
        "error[DATA-004] train.jsonl line 2, field output: is null",
        "  why:  2 more rows have faults (lines 4, 5)",
        "  fix:  correct the row, or set data.on_bad_rows=drop to train without it",
    ]


def test_fault_016_bad_rows_can_be_dropped_and_are_reported() -> None:
    rows = [{"question": "q", "answer": "a"}, {"question": "q", "answer": None}, {"question": "q", "answer": " "}]
    result = formatted(rows, on_bad_rows="drop")
    assert [example.row for example in result.examples] == [0]
    assert result.dropped == [(1, "answer: is null"), (2, "empty answer")]
    assert len(result.warnings) == 2 and "rows[1]" in "".join(result.warnings)


def test_fault_017_a_row_of_another_shape_is_named() -> None:
    rows: list[Any] = [{"question": "q", "answer": "a"}] * 899
    error = stopped([*rows, {"prompt": "q", "response": "a"}])
    assert error.number == 3 and error.where == "rows[899], field question"
    assert "prompt, response" in error.problem
    assert stopped([{"messages": [ASK, ANSWER]}, {"messages": "text"}]).where == "rows[1], field messages"
    mixed = [{"messages": [ASK, {"from": "gpt", "value": "a"}]}]
    assert stopped(mixed).where == "rows[0], field messages[1].role"


@pytest.mark.parametrize(
    ("row", "number", "field"),
    [
        (chat("user", "asistant"), 6, "messages[1].role"),
        (chat("user", "assistant", "assistant"), 7, "messages[2]"),
        (chat("user", "user", "assistant"), 7, "messages[1]"),
        (chat("user", "system", "assistant"), 7, "messages[1]"),
        (chat("system", "system", "user"), 7, "messages[1]"),
        (chat("user"), 8, "messages"),
        (chat("assistant"), 8, "messages"),
        (chat(), 8, "messages"),
        ({"messages": [ASK, "a"]}, 5, "messages[1]"),
        ({"messages": [ASK, {"role": ["x"], "content": "a"}]}, 6, "messages[1].role"),
        ({"messages": [ASK, {"role": "assistant"}]}, 3, "messages[1].content"),
    ],
)
def test_fault_018_roles_out_of_order_name_the_message(row: dict[str, Any], number: int, field: str) -> None:
    error = stopped([{"messages": [ASK, ANSWER]}, row])
    assert (error.number, error.where) == (number, f"rows[1], field {field}")


def test_fault_018_an_unknown_role_gets_a_guess() -> None:
    assert "did you mean 'assistant'?" in stopped([chat("user", "asistant")]).problem


@pytest.mark.parametrize("blank", ["", " \n\t"])
def test_fault_019_empty_answers_are_dropped_and_counted(blank: str) -> None:
    empty = {"role": "assistant", "content": blank}
    for good, bad in (
        ({"instruction": "q", "output": "a"}, {"instruction": "q", "output": blank}),
        ({"prompt": "q", "response": "a"}, {"prompt": "q", "response": blank}),
        ({"messages": [ASK, ANSWER]}, {"messages": [ASK, ANSWER, ASK, empty]}),
    ):
        result = formatted([good, bad])
        assert result.dropped == [(1, "empty answer")]
        assert result.warnings == ["1 row left out for an empty answer (rows[1])"]
    assert formatted(["words", blank]).dropped == [(1, "empty text")]
    assert stopped([{"messages": [ASK, empty, ASK, ANSWER]}]).number == 9
    assert stopped([{"prompt": blank, "response": "a"}]).number == 9


def test_fault_019_nothing_left_is_an_error() -> None:
    error = stopped([{"question": "q", "answer": ""}] * 3)
    assert error.number == 10 and error.why == "3 x empty answer"


# --- real files --------------------------------------------------------------------------------------------


@needs_shared
@pytest.mark.parametrize(
    ("name", "shape", "used", "dropped"),
    [
        ("sft/alpaca_data.json.gz", "alpaca", 51_974, 28),
        ("sft/databricks-dolly-15k.jsonl.gz", "dolly", 15_011, 0),
        ("sft/gsm8k_train.jsonl.gz", "question-answer", 7_473, 0),
        ("dialogue/sgd_sharegpt_dev.jsonl.gz", "sharegpt", 2_098, 0),
        ("sft/llamafactory/alpaca_en_demo.json", "alpaca", 999, 0),
        ("sft/llamafactory/identity.json", "alpaca", 91, 0),
        ("sft/llamafactory/glaive_toolcall_en_demo.json", "sharegpt", 300, 0),
        ("sft/llamafactory/v1_sft_demo.jsonl", "messages", 500, 0),
        ("text/c4_demo.jsonl.gz", "text", 300, 0),
    ],
)
def test_real_files_are_recognised_and_used(name: str, shape: str, used: int, dropped: int) -> None:
    source = read_source(SHARED / name)
    detected = detect(source, None)
    start = time.perf_counter()
    result = to_examples(source, detected, on_bad_rows="stop", system_prompt=None)
    assert time.perf_counter() - start < 0.7
    assert (detected.format.name, len(result.examples), len(result.dropped)) == (shape, used, dropped)
    for example in result.examples:
        assert example.text or (example.messages and example.messages[-1]["role"] == "assistant")


@needs_shared
@pytest.mark.parametrize("name", ["dpo_en_demo.json", "kto_en_demo.json"])
def test_real_preference_files_are_refused(name: str) -> None:
    with pytest.raises(DataError, match="preference data"):
        detect(read_source(SHARED / "preference" / "llamafactory" / name), None)


@pytest.mark.parametrize("name", ["chat", "instruct"])
def test_the_samples_of_the_package_have_no_flaw(name: str) -> None:
    result = formatted(read_source(f"sample:{name}"))
    assert len(result.examples) == 20 and not result.dropped and not result.warnings


# --- fuzz --------------------------------------------------------------------------------------------------

VALUES = [
    None,
    True,
    0,
    -1.5,
    "",
    " ",
    "x",
    [],
    {},
    ["x"],
    [[1]],
    {"a": 1},
    [None],
    [{"role": "user"}],
    "\u2028",
    "x" * 99,
]
SEEDS: list[list[dict[str, Any]]] = [
    [{"messages": [SYSTEM, ASK, ANSWER]}, {"messages": [ASK, {**ANSWER, "weight": 1}]}],
    [{"conversations": [{"from": "human", "value": "q\u00e9"}, {"from": "gpt", "value": "a"}], "tools": "[]"}] * 2,
    [{"instruction": "q", "input": "i", "output": "a", "history": [["q", "a"]], "system": "s"}] * 2,
    [{"prompt": [ASK], "completion": [ANSWER]}, {"prompt": "q", "completion": "a"}],
    [{"text": "words\nmore"}, {"text": "more words"}],
    [
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "q"}]},
                {**ANSWER, "tool_calls": [{"a": 1}]},
            ]
        }
    ],
]


def mutated_value(value: Any, chance: random.Random) -> Any:
    """The value with one place in it replaced, removed or repeated."""
    if chance.random() < 0.25 or not isinstance(value, (dict, list)) or not value:
        return chance.choice(VALUES)
    key = chance.choice(list(value) if isinstance(value, dict) else list(range(len(value))))
    changed: Any = dict(value) if isinstance(value, dict) else list(value)
    if chance.random() < 0.15:
        del changed[key]
    elif isinstance(changed, dict) and chance.random() < 0.1:
        changed[chance.choice(["role", "from", "text", "Output", "label", ""])] = changed.pop(key)
    else:
        changed[key] = mutated_value(value[key], chance)
    return changed


def mutated_bytes(raw: bytes, chance: random.Random) -> bytes:
    """The file with bytes flipped, cut or repeated."""
    content = bytearray(raw)
    for _ in range(chance.randint(0, 3)):
        at = chance.randrange(len(content) + 1)
        kind = chance.randrange(4)
        if kind == 0 and at < len(content):
            content[at] = chance.randrange(256)
        elif kind == 1:
            del content[at : at + chance.randint(1, 30)]
        elif kind == 2:
            content[at:at] = content[at : at + chance.randint(1, 30)]
        else:
            content[at:at] = chance.choice([b"\n", b"\0", b"\xff", b"{", b"]", b'"', b",", b"\\ud800", b"NaN", b"\r", b"'"])
    return bytes(content)


def as_file(rows: list[Any], suffix: str) -> bytes:
    if suffix == ".json":
        return json.dumps(rows, indent=1).encode()
    if suffix == ".jsonl":
        return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    table = [list(rows[0]), *(list(row.values()) for row in rows if isinstance(row, dict))]
    return "\n".join(("\t" if suffix == ".tsv" else ",").join(json.dumps(str(c)) for c in line) for line in table).encode()


def test_fault_032_only_data_errors_escape_from_2000_mutated_files(tmp_path: Path) -> None:
    chance = random.Random(20)
    start, used, refused = time.perf_counter(), 0, 0
    for index in range(2000):
        suffix = chance.choice([".json", ".jsonl", ".csv", ".tsv", ".txt"])
        rows: list[Any] = chance.choice(SEEDS)
        raw = as_file(rows, suffix if suffix != ".txt" else ".jsonl")
        if suffix in (".json", ".jsonl") and chance.random() < 0.7:
            raw = as_file([mutated_value(row, chance) for row in rows], suffix)
        raw = mutated_bytes(raw, chance)
        path = tmp_path / f"file{suffix}"
        path.write_bytes(raw)
        try:
            formatted(read_source(path), on_bad_rows=chance.choice(["stop", "drop"]), system_prompt=None)
            used += 1
        except DataError as error:
            refused += 1
            assert "file" in str(error) and error.fix, (index, str(error))
        except Exception as error:
            raise AssertionError(f"file {index}: {raw!r}") from error
    assert time.perf_counter() - start < 10
    assert used > 100 and refused > 500, "the mutations must reach both ends"
