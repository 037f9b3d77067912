"""Rows that hold a question and its answer, a dialogue without roles or a text in columns of their own."""

from __future__ import annotations

from typing import Any

from llm_finetune_kit.data.formats.conversations import OPENAI_KEYS, conversation, opening, said_in_turn, turns_of_cell
from llm_finetune_kit.data.formats.rows import Example, Fault, Message, Notes, Row, Skipped, extra, listed, no_text, words
from llm_finetune_kit.data.formats.tools import tools_of

END_OF_UTTERANCE = "__eou__"


def text(row: Row, notes: Notes) -> Example:
    """Text to continue; no roles."""
    content = words(row, "text")
    if not content or content.isspace():
        raise Skipped("empty text")
    return Example(None, content, 0)


def alpaca(row: Row, notes: Notes) -> Example:
    """An instruction with an optional input, and the answer."""
    user = instructed(row)
    return Example([*opening(row), *history(row.get("history")), user, _answer(row, "output")], None, 0)


def instructed(row: Row) -> Message:
    """The user's message of an instruction and its input; a template may render the two apart, so both are kept."""
    instruction, given = words(row, "instruction"), extra(row, "input")
    blank = not instruction or instruction.isspace()
    if blank and not given:
        raise Fault(9, "instruction", "is empty")
    if given and not blank:
        return {"role": "user", "content": f"{instruction}\n\n{given}", "instruction": instruction, "input": given}
    return {"role": "user", "content": given if blank else instruction}


def history(rounds: Any) -> list[Message]:
    """Earlier turns, as pairs of question and answer (or the JSON text of them)."""
    if rounds is None or (type(rounds) is str and not rounds.strip()):
        return []
    messages: list[Message] = []
    for index, both in enumerate(listed(rounds, "history")):
        if type(both) is not list or len(both) != 2:
            raise Fault(5, f"history[{index}]", "is not a pair [question, answer]")
        for side, (role, content) in enumerate(zip(("user", "assistant"), both, strict=True)):
            if type(content) is not str:
                raise no_text(content, f"history[{index}][{side}]")
            if not content or content.isspace():
                raise Fault(9, f"history[{index}][{side}]", "is empty")
            messages.append({"role": role, "content": content})
    return messages


def _answer(row: Row, slot: str) -> Message:
    content = words(row, slot)
    if not content or content.isspace():
        raise Skipped("empty answer")
    return {"role": "assistant", "content": content}


# --- a prompt and its answer -------------------------------------------------------------------------------


def pair(row: Row, notes: Notes) -> Example:
    """A prompt and its answer, each a text or a list of messages; of these only the answer's are learned."""
    prompt, answer = row["prompt"], row["answer"]
    if type(prompt) is str and prompt.startswith("["):
        prompt, answer = turns_of_cell(prompt), turns_of_cell(answer) if type(answer) is str else answer
    if type(prompt) is list or type(answer) is list:
        return _pair_of_lists({**row, "prompt": prompt, "answer": answer}, notes)
    content = words(row, "prompt")
    if not content or content.isspace():
        raise Fault(9, "prompt", "is empty")
    earlier = history(row["history"]) if "history" in row else []
    return Example([*opening(row), *earlier, {"role": "user", "content": content}, _answer(row, "answer")], None, 0)


def _pair_of_lists(row: Row, notes: Notes) -> Example:
    asked = row["prompt"] if type(row["prompt"]) is list else [{"role": "user", "content": row["prompt"]}]
    given = row["answer"] if type(row["answer"]) is list else [{"role": "assistant", "content": row["answer"]}]
    half = len(asked)

    def place(index: int) -> str:
        return f"prompt[{index}]" if index < half else f"answer[{index - half}]"

    asked = [{"train": False, **turn} if type(turn) is dict else turn for turn in asked]
    messages = conversation([*asked, *given], OPENAI_KEYS, place, notes)
    for message in messages:
        if message["role"] != "assistant":
            message.pop("train", None)
    if messages[0]["role"] != "system":
        messages = [*opening(row), *messages]
    return Example(messages, None, 0, tools_of(row["tools"]) if "tools" in row else None)


# --- dialogues without roles -------------------------------------------------------------------------------


def dialog(row: Row, notes: Notes) -> Example:
    """Utterances of two people in turn, the first of them the user; a list, its JSON text or joined by __eou__."""
    said = _utterances(row["dialog"])
    turns: list[Row] = [{"role": ("user", "assistant")[index % 2], "content": one} for index, one in enumerate(said)]
    messages = said_in_turn(turns, lambda index: f"dialog[{index}]", notes)
    return Example([*opening(row), *messages], None, 0)


def _utterances(value: Any) -> list[Any]:
    if type(value) is str and END_OF_UTTERANCE in value:
        return [one.strip() for one in value.strip().removesuffix(END_OF_UTTERANCE).split(END_OF_UTTERANCE)]
    return [one.strip() if type(one) is str else one for one in listed(value, "dialog")]
