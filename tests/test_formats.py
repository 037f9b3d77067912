"""Rows of every known shape become messages or text; rows that cannot are named, and nothing is lost in silence."""

from __future__ import annotations

import gzip
import json
import random
import time
from pathlib import Path
from typing import Any, Literal

import pytest

from llm_finetune_kit.data.formats import FORMATS, Example, Formatted, detect, refuse_untrainable, to_examples
from llm_finetune_kit.data.formats.tools import flattened
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


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


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
        ({"messages": json.dumps([ASK, ANSWER])}, "messages"),
        ({"conversations": '[{"from": "human", "value": "q"}, {"from": "model", "value": "a"}]'}, "sharegpt"),
        ({"conversation": [{"human": "q", "assistant": "a"}]}, "human-assistant"),
        ({"prompt": json.dumps([ASK]), "completion": json.dumps([ANSWER])}, "prompt-completion"),
        ({"dialog": ["q ", "a"], "act": [1, 2], "emotion": [0, 0]}, "daily-dialog"),
        ({"utterances": ["q", "a"]}, "daily-dialog"),
        ({"dialogue": ["q", "a"]}, "daily-dialog"),
        ({"dialog": '["q", "a"]'}, "daily-dialog"),
        ({"dialog": "q __eou__ a __eou__"}, "daily-dialog"),
        ({"text": "q __eou__ a"}, "eou-text"),
        ({"prompt": {"text": "q", "role": "prompter", "replies": [{"text": "a", "role": "assistant"}]}}, "oasst-tree"),
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


def test_sharegpt_calls_and_results_keep_their_structure() -> None:
    turns = [("human", "q"), ("gpt", "see:"), ("function_call", '{"name": "f", "arguments": "{\\"x\\": 1}"}')]
    turns += [("function_call", '[{"name": "g", "arguments": {}}]'), ("observation", "1"), ("tool", ""), ("gpt", "a")]
    row = {"conversations": [{"from": name, "value": said} for name, said in turns], "tools": '[{"name": "f"}]'}
    example = formatted([row]).examples[0]
    assert example.messages == [
        ASK,
        {"role": "assistant", "content": "see:", "tool_calls": [call("f", x=1), call("g")]},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": ""},
        ANSWER,
    ]
    assert example.tools == [{"type": "function", "function": {"name": "f"}}]
    for none in ("[]", "", None, []):
        assert formatted([{**row, "tools": none}]).examples[0].tools is None


def test_openai_tool_calls_keep_their_structure() -> None:
    asked = {"role": "assistant", "content": None, "tool_calls": [{"id": "7", **call("f"), "index": 0}]}
    result = {"role": "tool", "content": "1", "tool_call_id": "7"}
    assert messages({"messages": [ASK, asked, result, {**ANSWER, "tool_calls": None}]}) == [
        ASK,
        {"role": "assistant", "content": "", "tool_calls": [{**call("f"), "id": "7"}]},
        result,
        ANSWER,
    ]
    old = {"role": "assistant", "content": "see:", "function_call": {"name": "f", "arguments": ""}}
    made = messages({"messages": [ASK, old]})
    assert made and made[1] == {"role": "assistant", "content": "see:", "tool_calls": [call("f")]}


def test_a_call_in_words_of_its_own_is_learned_as_text() -> None:
    made = messages({"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "[f(x=1)]"}]})
    assert made and made[1] == {"role": "assistant", "content": "[f(x=1)]"}


@pytest.mark.parametrize(
    ("turn", "number", "field"),
    [
        ({"content": None, "tool_calls": [{"function": {"arguments": {}}}]}, 80, "tool_calls[0]"),
        ({"content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}, 80, "tool_calls[0].arguments"),
        ({"content": None, "tool_calls": [{"function": {"name": "f", "arguments": [1]}}]}, 80, "tool_calls[0].arguments"),
        ({"content": [{"type": "tool_call", "value": "{"}]}, 80, "content[0]"),
        ({"content": "", "tool_calls": "x"}, 80, "tool_calls"),
    ],
)
def test_a_broken_call_is_named(turn: dict[str, Any], number: int, field: str) -> None:
    error = stopped([{"messages": [ASK, {"role": "assistant", **turn}]}])
    assert (error.number, error.where) == (number, f"rows[0], field messages[1].{field}")


@pytest.mark.parametrize("tools", ["[", "[1]", [{"description": "x"}], 5])
def test_broken_tools_are_named(tools: Any) -> None:
    error = stopped([{"messages": [ASK, ANSWER], "tools": tools}])
    assert error.number == 81 and error.where.startswith("rows[0], field tools")


def test_a_thought_is_kept_apart_from_the_answer() -> None:
    parts = [{"type": "reasoning", "value": "hm"}, {"type": "text", "value": "a"}]
    for turn in (
        {"role": "assistant", "content": parts},
        {**ANSWER, "reasoning": "hm"},
        {**ANSWER, "reasoning_content": "hm", "thinking": None},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}, "a"]},
    ):
        assert messages({"messages": [ASK, turn]}) == [ASK, {**ANSWER, "reasoning_content": "hm"}]


def test_flattened_says_everything_in_text() -> None:
    spoken = [
        {"role": "system", "content": "s"},
        ASK,
        {**ANSWER, "tool_calls": [call("f", x=1)], "train": False},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
        ANSWER,
    ]
    tools = [{"type": "function", "function": {"name": "f"}}]
    kept = json.dumps([spoken, tools])
    plain = flattened(spoken, tools)
    assert [message["role"] for message in plain] == ["system", "user", "assistant", "user", "assistant"]
    assert plain[0]["content"].startswith("s\n") and plain[0]["content"].endswith('{"name": "f"}')
    assert plain[2] == {**ANSWER, "content": 'a\n{"name": "f", "arguments": {"x": 1}}', "train": False}
    assert plain[3]["content"] == "1\n2"
    assert json.dumps([spoken, tools]) == kept
    assert flattened([ASK, ANSWER]) == [ASK, ANSWER]


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


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        ({"prompt": "Frage", "response": "Antwort"}, "prompt-response"),
        ({"PROMPT": "Frage", "answer": "Antwort"}, "prompt-response"),
        ({"instruction": "Frage", "output": "Antwort"}, "alpaca"),
        ({"text": "Antwort"}, "text"),
    ],
)
def test_columns_can_be_named_by_the_user(columns: dict[str, str], name: str) -> None:
    source = read_source([{"Frage": "q", "Antwort": "a", "answer": "other", "text": "other"}])
    detected = detect(source, None, columns)
    assert detected.format.name == name and f"Antwort (as {list(columns)[-1]})" in detected.why
    example = to_examples(source, detected, on_bad_rows="stop", system_prompt=None).examples[0]
    assert example.text == "a" if name == "text" else example.messages == [ASK, ANSWER]


def test_columns_go_with_a_format_that_was_asked_for() -> None:
    source = read_source([{"Frage": "q", "Antwort": "a"}, {"Frage": "q"}])
    detected = detect(source, "dolly", {"instruction": "Frage", "output": "Antwort"})
    assert detected.format.name == "dolly"
    with pytest.raises(DataError) as caught:
        to_examples(source, detected, on_bad_rows="stop", system_prompt=None)
    assert caught.value.where == "rows[1], field Antwort"


@pytest.mark.parametrize(
    ("columns", "number", "words"),
    [
        ({"promt": "Frage"}, 83, "did you mean 'prompt'"),
        ({"prompt": "Frge"}, 83, "did you mean 'Frage'"),
        ({"prompt": "Frage", "messages": "Antwort"}, 1, "no format has all"),
    ],
)
def test_columns_that_fit_nothing_are_named(columns: dict[str, str], number: int, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        detect(read_source([{"Frage": "q", "Antwort": "a"}]), None, columns)
    assert caught.value.number == number


def test_every_format_is_named_once() -> None:
    names = [shape.name for shape in FORMATS]
    assert len(names) == len(set(names))


# --- preferences -------------------------------------------------------------------------------------------

WORSE = {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"question": "q", "chosen": "a", "rejected": "b"},
        {"instruction": "q", "input": "", "chosen": "a", "rejected": "b"},
        {"prompt": [ASK], "chosen": [ANSWER], "rejected": [WORSE]},
        {"prompt": json.dumps([ASK]), "chosen": json.dumps([ANSWER]), "rejected": json.dumps([WORSE])},
        {"chosen": [ASK, ANSWER], "rejected": [ASK, WORSE]},
        {"prompt": "q", "chosen": [ASK, ANSWER], "rejected": [ASK, WORSE]},
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        {"messages": [ASK, ANSWER], "rejected_response": "b"},
        {"query": "q", "response": "a", "rejected_response": "b"},
    ],
)
def test_every_shape_of_a_pair_is_the_same_pair(row: dict[str, Any]) -> None:
    source = read_source([row])
    detected = detect(source, None)
    assert detected.format.kind == "preference"
    assert formatted([row]).examples == [Example([ASK, ANSWER], None, 0, rejected=[WORSE])]
    with pytest.raises(DataError, match="preference data") as caught:
        refuse_untrainable(detected, source)
    assert caught.value.number == 11 and "--to messages" in caught.value.fix


def test_the_answers_of_a_prompt_are_not_learned_and_the_history_counts() -> None:
    ends = {"system": "s", "response": "a", "rejected_response": "b"}
    row = {"query": "q", "history": [["q", "a"]], **ends}
    assert formatted([row]).examples[0].messages == [SYSTEM, ASK, {**ANSWER, "train": False}, ASK, ANSWER]
    rated = {"messages": [ASK, ANSWER, ASK, ANSWER], "label": True}
    assert formatted([rated]).examples[0].messages == [ASK, {**ANSWER, "train": False}, ASK, ANSWER]


@pytest.mark.parametrize(
    ("row", "number", "field"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": None}, 4, "rejected"),
        ({"prompt": "q", "chosen": 5, "rejected": "b"}, 5, "chosen"),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, 9, "prompt"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, 87, "rejected"),
        ({"chosen": "a", "rejected": "b"}, 3, "prompt"),
        ({"chosen": [ASK, ANSWER], "rejected": [{**ASK, "content": "p"}, WORSE]}, 87, "rejected"),
        ({"messages": [ASK, {"role": "assistant"}], "rejected_response": "b"}, 3, "messages[1].content"),
        ({"prompt": "q", "completion": "a", "label": None}, 4, "label"),
        ({"prompt": "q", "completion": "a", "label": "maybe"}, 5, "label"),
    ],
)
def test_a_pair_or_label_that_says_nothing_is_a_fault(row: dict[str, Any], number: int, field: str) -> None:
    good = {**row, "label": True} if "label" in row else {"prompt": "q", "chosen": "a", "rejected": "b"}
    error = stopped([good, row] if good.keys() == row.keys() else [row])
    assert (error.number, error.where.partition(", ")[2]) == (number, f"field {field}")


@pytest.mark.parametrize(("label", "good"), [(True, True), (False, False), (1, True), (0, False), ("False", False)])
def test_labels_are_read(label: Any, good: bool) -> None:
    for row in (
        {"prompt": "q", "completion": "a", "label": label},
        {"messages": [ASK, ANSWER], "label": label},
        {"query": "q", "response": "a", "kto_tag": label},
    ):
        source = read_source([row])
        assert detect(source, None).format.kind == "rated"
        assert formatted(source).examples == [Example([ASK, ANSWER], None, 0, label=good)]


def test_preference_data_can_be_read_as_plain_answers_if_asked() -> None:
    source = read_source([{"prompt": "q", "completion": "a", "label": False}])
    refuse_untrainable(detect(source, "prompt-completion"), source)
    assert formatted(source, "prompt-completion").examples[0].messages == [ASK, ANSWER]
    classes = read_source([{"prompt": "q", "completion": "a", "label": 1}, {"prompt": "q", "completion": "a", "label": 3}])
    assert detect(classes, None).format.name == "prompt-completion"


# --- threads -----------------------------------------------------------------------------------------------


def said(name: str, parent: str | None, text: str, rank: int | None = None, **more: Any) -> dict[str, Any]:
    role = "prompter" if text.startswith("q") else "assistant"
    return {"message_id": name, "parent_id": parent, "text": text, "role": role, "rank": rank, **more}


FLAT = [
    said("3", "2", "q2"),
    said("2", "1", "a1", 1),
    said("4", "3", "a2"),
    said("1", None, "q1"),
    said("5", "1", "a0", 0),
    said("6", "5", "q3"),
    said("7", "1", "a9", 2, deleted=True),
    said("8", "7", "q9"),
]


def nested(rows: list[dict[str, Any]], parent: str | None = None) -> list[dict[str, Any]]:
    return [{**row, "replies": nested(rows, row["message_id"])} for row in rows if row["parent_id"] == parent]


def threads(rows: list[Any], which: Literal["best", "all"]) -> list[list[str]]:
    source = read_source(rows)
    result = to_examples(source, detect(source, None), on_bad_rows="stop", system_prompt=None, threads=which)
    return sorted([message["content"] for message in example.messages or []] for example in result.examples)


@pytest.mark.parametrize("rows", [FLAT, [{"message_tree_id": "1", "prompt": nested(FLAT)[0]}]])
def test_threads_are_rebuilt_and_end_with_an_answer(rows: list[Any]) -> None:
    assert threads(rows, "best") == [["q1", "a0"]]
    assert threads(rows, "all") == [["q1", "a0"], ["q1", "a1", "q2", "a2"]]
    warnings = formatted(rows).warnings
    assert any("best ranked thread" in warning for warning in warnings)
    assert any("deleted or refused" in warning for warning in warnings)


def test_threads_as_a_table_holds_them() -> None:
    rows = [{key: "" if value is None else str(value) for key, value in {"deleted": False, **row}.items()} for row in FLAT]
    assert threads(rows, "all") == [["q1", "a0"], ["q1", "a1", "q2", "a2"]]


@pytest.mark.parametrize(
    ("row", "number", "field"),
    [
        (said("9", "none", "q"), 84, "parent_id"),
        (said("9", "9", "q"), 85, "parent_id"),
        (said("1", None, "q"), 86, "message_id"),
        ({**said("9", "1", "a"), "role": "asistant"}, 6, "role"),
        (said("9", None, ""), 9, "text"),
        (said("9", None, "q", rank=[1]), 5, "rank"),  # type: ignore[arg-type]
    ],
)
def test_a_message_outside_every_tree_is_a_fault(row: dict[str, Any], number: int, field: str) -> None:
    error = stopped([*FLAT, row])
    assert (error.number, error.where) == (number, f"rows[{len(FLAT)}], field {field}")


def test_a_long_circle_is_named_and_replies_without_a_root_are_counted() -> None:
    ring = [said(str(at), str((at + 1) % 3000), "q") for at in range(3000)]
    source = read_source(
        [*[{**row, "message_id": f"r{row['message_id']}", "parent_id": f"r{row['parent_id']}"} for row in ring], *FLAT]
    )
    result = formatted(source, on_bad_rows="drop")
    assert len(result.dropped) == 3000 and "circle" in result.dropped[0][1]
    lost = [*FLAT, said("20", "none", "q"), said("21", "20", "a")]
    dropped = formatted(lost, on_bad_rows="drop").dropped
    assert [row for row, _ in dropped] == [8, 9] and dropped[1][1] == "unreachable reply"


def test_the_reply_to_a_prompt_nobody_answered_is_counted() -> None:
    result = formatted([*FLAT, said("9", None, "q")])
    assert result.dropped == [(8, "unanswered prompt")]


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


def test_fault_015_a_misspelt_column_of_a_later_row_gets_a_guess() -> None:
    good = {"instruction": "q", "input": "i", "output": "a"}
    assert "did you mean 'ouput'?" in stopped([good, {"instruction": "q", "input": "i", "ouput": "a"}]).problem
    error = stopped([good, {"instruction": "q", "inputs": "i", "output": "a"}])
    assert error.where == "rows[1], field inputs" and "did you mean 'input'?" in error.problem


def test_fault_016_faults_of_several_kinds_are_counted_and_ten_are_listed() -> None:
    nulls: list[Any] = [{"question": "q", "answer": None}] * 20
    error = stopped([{"question": "q", "answer": 5}, *nulls, {"question": "", "answer": "a"}])
    assert error.why.startswith("22 rows have faults:\n")
    assert "20 x answer: is null" in error.why and "1 x question: is empty" in error.why
    assert error.why.count("rows[") == 9


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
        (chat("user", "tool", "assistant"), 7, "messages[1]"),
        (chat("user", "assistant", "tool", "user"), 7, "messages[3]"),
        (chat("tool", "assistant"), 7, "messages[0]"),
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
        ("sft/gsm8k_test.jsonl.gz", "question-answer", 1_319, 0),
        ("sft/llamafactory/reason_tool_use_demo_50.jsonl", "messages", 50, 0),
        ("dialogue/sgd_sharegpt_test.jsonl.gz", "sharegpt", 2_919, 2),
        ("dialogue/sgd_sharegpt_train.jsonl.gz", "sharegpt", 12_174, 0),
        ("text/tinyshakespeare.txt.gz", "text", 1, 0),
        ("text/tinystories_sample_2MiB.txt.gz", "text", 2_317, 0),
        ("text/wiki_demo.txt.gz", "text", 30, 0),
        ("dialogue/sgd_sharegpt_dev.jsonl.gz", "sharegpt", 2_098, 0),
        ("sft/llamafactory/alpaca_en_demo.json", "alpaca", 999, 0),
        ("sft/llamafactory/identity.json", "alpaca", 91, 0),
        ("sft/llamafactory/glaive_toolcall_en_demo.json", "sharegpt", 300, 0),
        ("sft/llamafactory/v1_sft_demo.jsonl", "messages", 500, 0),
        ("text/c4_demo.jsonl.gz", "text", 300, 0),
    ],
)
@pytest.mark.alone
def test_real_files_are_recognised_and_used(name: str, shape: str, used: int, dropped: int) -> None:
    source = read_source(SHARED / name)
    detected = detect(source, None)
    start = time.process_time()
    result = to_examples(source, detected, on_bad_rows="stop", system_prompt=None)
    assert time.process_time() - start < 0.7
    assert (detected.format.name, len(result.examples), len(result.dropped)) == (shape, used, dropped)
    for example in result.examples:
        assert example.text or (example.messages and example.messages[-1]["role"] == "assistant")


@needs_shared
def test_real_tool_calls_are_all_there() -> None:
    examples = formatted(read_source(SHARED / "sft/llamafactory/glaive_toolcall_en_demo.json")).examples
    spoken = [message for example in examples for message in example.messages or []]
    assert sum(len(message.get("tool_calls", [])) for message in spoken) == 211
    assert sum(message["role"] == "tool" for message in spoken) == 211
    assert sum(example.tools is not None for example in examples) == 191
    examples = formatted(read_source(SHARED / "sft/llamafactory/reason_tool_use_demo_50.jsonl")).examples
    spoken = [message for example in examples for message in example.messages or []]
    assert sum(len(message.get("tool_calls", [])) for message in spoken) == 41 + 2 * 9 + 3 * 3
    assert sum("reasoning_content" in message for message in spoken) == 59 + 41 + 9 + 3
    assert sum(example.tools is not None for example in examples) == 48


@needs_shared
def test_real_dialogues_without_roles_alternate() -> None:
    for name, count, at in (("dailydialog_text_8096.txt.gz", 8096, 1), ("dailydialog_dev.tsv.gz", 995, 4)):
        text = gzip.decompress((SHARED / "dialogue" / name).read_bytes()).decode()
        lines = [line.split("\t") for line in text.split("\n") if line.strip()]
        assert {len(line) for line in lines} == {at}
        result = formatted([dict(zip(("dialog", "topic", "act", "emotion"), line, strict=False)) for line in lines])
        assert len(result.examples) == count
        for example, line in zip(result.examples, lines, strict=True):
            utterances = line[0].replace("__eou__", "\n").split("\n")
            said = [one.strip() for one in utterances if one.strip()]
            assert [message["content"] for message in example.messages or []] == said[: len(said) // 2 * 2]


@needs_shared
@pytest.mark.parametrize(("name", "kind"), [("dpo_en_demo.json", "preference"), ("kto_en_demo.json", "rated")])
def test_real_preference_files_are_read_and_not_trained_as_answers(name: str, kind: str) -> None:
    source = read_source(SHARED / "preference" / "llamafactory" / name)
    detected = detect(source, None)
    examples = formatted(source).examples
    assert detected.format.kind == kind and len(examples) == 300
    for row, example in zip(source.rows, examples, strict=True):
        if kind == "preference":
            assert example.rejected == [{"role": "assistant", "content": row["rejected"]["value"]}]
            assert example.messages and example.messages[-1]["content"] == row["chosen"]["value"]
        else:
            assert example.label is row["label"]
    with pytest.raises(DataError, match="preference data"):
        refuse_untrainable(detected, source)


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


SEEDS += [
    [{"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": '{"name": "f"}'}], "tools": "[]"}],
    [{"prompt": "q", "chosen": [ANSWER], "rejected": [WORSE]}, {"prompt": [ASK], "chosen": "a", "rejected": "b"}],
    [{"chosen": [ASK, ANSWER], "rejected": [ASK, WORSE]}] * 2,
    [{"messages": [ASK, ANSWER], "rejected_response": "b"}, {"messages": [ASK, ANSWER], "rejected_response": ["b"]}],
    [{"prompt": "q", "completion": "a", "label": True}, {"prompt": "q", "completion": "a", "label": 0}],
    [{"messages": [ASK, ANSWER], "kto_tag": False}] * 2,
    [{"dialog": ["q", "a"]}, {"dialog": "q __eou__ a"}],
    [{"conversation": [{"human": "q", "assistant": "a"}]}] * 2,
    [{"prompt": nested(FLAT)[0]}],
    FLAT,
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


def test_fault_032_only_data_errors_escape_from_10000_mutated_files(tmp_path: Path) -> None:
    chance = random.Random(20)
    start, used, refused = time.process_time(), 0, 0
    for index in range(10_000):
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
    assert time.process_time() - start < 60
    assert used > 500 and refused > 2500, "the mutations must reach both ends"
