"""Rows as questions: what a model is asked where the answer is missing, or is not to be seen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from llm_finetune_kit.data.formats import Detected, detect, to_examples
from llm_finetune_kit.data.formats.rows import Message, Row
from llm_finetune_kit.data.sources import Source, read_source
from llm_finetune_kit.errors import DataError

LINES = ("", ".txt", ".md", ".prompts")  # endings of files with a question on each line
ANSWER = "?"  # stands where a format wants an answer; no model sees it
TURNS = {"role": ("content", "assistant", ("assistant",)), "from": ("value", "gpt", ("gpt", "assistant", "bot", "chatgpt"))}


def questions(path: str) -> list[list[Message]]:
    """The conversation up to where an answer is due, for each line of a text file or each row of any other.

    Rows may have any format that training reads, with or without their answers. Raises DataError.
    """
    if Path(path).suffix.lower() in LINES:
        return [[{"role": "user", "content": line}] for line in _lines(path)]
    source = read_source(path)
    source = replace(source, rows=[_with_an_end(row) for row in source.rows])
    detected, source = _detected(source)
    if detected.format.kind not in ("answers", "text"):
        raise DataError(150, f"holds {detected.format.name} rows, not questions", where=path, fix="give rows with a prompt")
    examples = to_examples(source, detected, on_bad_rows="stop", system_prompt=None).examples
    return [_asked(example.messages, example.text) for example in examples]


def _asked(messages: list[Message] | None, text: str | None) -> list[Message]:
    if messages is None:
        return [{"role": "user", "content": text}]
    last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
    return messages[:last]


def _lines(path: str) -> list[str]:
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        fix = "name a text file with a prompt on each line, or rows such as prompts.jsonl"
        raise DataError(150, f"the prompts cannot be read: {reason}", where=path, fix=fix) from None
    found = [line for line in lines if line]
    if not found:
        raise DataError(150, "holds no prompts", where=path, fix="write a prompt on each line")
    return found


def _detected(source: Source) -> tuple[Detected, Source]:
    """The format of the rows; where they have no answers, that of the rows with some."""
    try:
        return detect(source, None), source
    except DataError:
        slot = "output" if "instruction" in source.rows[0] else "response"
        answered = replace(source, rows=[{**row, slot: ANSWER} for row in source.rows])
        try:
            return detect(answered, None), answered
        except DataError:
            problem = f"no prompt is found in the columns: {', '.join(source.rows[0])}"
            fix = "name the column prompt, or give conversations as messages"
            raise DataError(150, problem, where=source.place(0), fix=fix) from None


def _with_an_end(row: Row) -> Row:
    """The row, its conversation closed by an answer if it ends with a question."""
    for column, turns in row.items():
        last = turns[-1] if type(turns) is list and turns else None
        key = next((key for key in TURNS if type(last) is dict and key in last), None)
        if key is not None and isinstance(last, dict):
            words, ours, theirs = TURNS[key]
            if last[key] not in theirs:
                return {**row, column: [*turns, {key: ours, words: ANSWER}]}
    return row
