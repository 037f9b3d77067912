"""Examples as rows of another shape, and rows as a file; what a shape cannot hold is refused or counted."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from llm_finetune_kit.data.cells import guarded
from llm_finetune_kit.data.formats.rows import Example, Message, Notes, Row
from llm_finetune_kit.errors import DataError, nearest

# What an example may have that a shape cannot hold. The words stand in errors ("12 of them have ...").
TEXT, ROLES = "plain text without roles", "roles, which only a chat template turns into text"
TOOLS, UNPAIRED = "tools or tool calls", "no rejected answer"
# The same for parts; the words stand in notes ("12 rows: they ...").
BAD, PAIR = "are rated as bad, and were left out", "lost their rejected answer"
THOUGHT = "lost the thought before an answer"
EARLY_OUT, LAST_OUT = "lost the mark that an earlier answer is not learned", "lost the mark that the last answer is not learned"
EARLY_IN = "lost the mark that an earlier answer is learned too"


@dataclass(frozen=True)
class Shape:
    """A shape to write; `text_only` is for sets in which every example is one plain question and answer."""

    write: Callable[[Example], Row]
    refuses: frozenset[str]
    loses: frozenset[str]
    text_only: Callable[[Example], Row] | None = None


def convert(examples: Sequence[Example], to: str, lost: Notes | None = None) -> Iterator[Row]:
    """The examples as rows of the shape `to`, in their order; `lost` takes the counts of what the rows cannot hold.

    Raises DataError 88 if the meaning would be lost (nothing is written then), 89 for an unknown shape.
    """
    shape = SHAPES.get(to.strip().lower().replace("_", "-"))
    if shape is None:
        near = nearest(to, list(SHAPES))
        guess = f"did you mean {near[0]}? " if near else ""
        raise DataError(89, f"rows cannot be written as '{to}'", fix=f"{guess}known: {', '.join(SHAPES)}")
    kept = [example for example in examples if example.label is not False]
    counts = Counter(feature for example in kept for feature in _features(example))
    for feature in sorted(shape.refuses & counts.keys()):
        problem = f"{counts[feature]:,} of {len(kept):,} examples have {feature}, which {to} rows cannot hold"
        others = [name for name, other in SHAPES.items() if not other.refuses & counts.keys()]
        raise DataError(88, problem, fix=f"write them as {' or '.join(others)}")
    if lost is not None:
        lost.update({feature: counts[feature] for feature in shape.loses & counts.keys()})
        lost.update({BAD: len(examples) - len(kept)} if len(kept) < len(examples) else {})
    plain = shape.text_only if shape.text_only and all(_is_plain(example) for example in kept) else None
    return map(plain or shape.write, kept)


def _features(example: Example) -> set[str]:
    if example.messages is None:
        return {TEXT, UNPAIRED}
    end = _end_of_prompt(example.messages)
    answers = [(at < end, message) for at, message in enumerate(example.messages) if message["role"] == "assistant"]
    tools = example.tools or any("tool_calls" in message for _, message in answers)
    learned = {(early, message.get("train", True)) for early, message in answers}
    found = {
        ROLES: True,
        PAIR: example.rejected is not None,
        UNPAIRED: example.rejected is None,
        TOOLS: bool(tools),
        THOUGHT: any("reasoning_content" in message for _, message in answers),
        EARLY_OUT: (True, False) in learned,
        EARLY_IN: (True, True) in learned,
        LAST_OUT: (False, False) in learned and example.rejected is None,
    }
    return {feature for feature, there in found.items() if there}


def _end_of_prompt(messages: Sequence[Message]) -> int:
    """The number of messages up to the last of the user's."""
    return 1 + max(at for at, message in enumerate(messages) if message["role"] == "user")


def _is_plain(example: Example) -> bool:
    """Whether this is one question and one answer, and no more than text."""
    ends = [*(example.messages or [])[1:], *(example.rejected or [])]
    few = len(example.messages or []) == 2 and len(example.rejected or [0]) == 1
    return few and not example.tools and not any({"tool_calls", "reasoning_content"} & message.keys() for message in ends)


# --- one example in each shape -----------------------------------------------------------------------------


def _openai(message: Message) -> Row:
    made: Row = {key: message[key] for key in ("role", "content", "reasoning_content", "name", "tool_call_id") if key in message}
    if "tool_calls" in message:
        made["tool_calls"] = [_call_in_openai(call) for call in message["tool_calls"]]
    return made | ({"weight": int(message["train"])} if "train" in message else {})


def _call_in_openai(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": _json(function["arguments"])}}


def _sharegpt(message: Message) -> list[Row]:
    """A message as one turn, or as two where it says something and calls a function too."""
    more: Row = {key: message[key] for key in ("name", "tool_call_id", "train") if key in message}
    thought = {"reasoning_content": message["reasoning_content"]} if "reasoning_content" in message else {}
    name = {"user": "human", "assistant": "gpt", "tool": "observation"}.get(message["role"], message["role"])
    if "tool_calls" not in message:
        return [{"from": name, "value": message["content"], **thought, **more}]
    calls = [{**call["function"], **({"id": call["id"]} if "id" in call else {})} for call in message["tool_calls"]]
    turn = {"from": "function_call", "value": _json(calls[0] if len(calls) == 1 else calls), **more}
    return [{"from": name, "value": message["content"], **thought, **more}, turn] if message["content"] else [turn | thought]


def _as_messages(example: Example) -> Row:
    made: Row = {"messages": [_openai(message) for message in example.messages or []]}
    return made | ({"tools": example.tools} if example.tools else {})


def _as_sharegpt(example: Example) -> Row:
    made: Row = {"conversations": [turn for message in example.messages or [] for turn in _sharegpt(message)]}
    return made | ({"tools": _json([tool["function"] for tool in example.tools])} if example.tools else {})


def _as_alpaca(example: Example) -> Row:
    asked, answer, rest = _last_round(example)
    given = {"instruction": asked.get("instruction", asked["content"]), "input": asked.get("input", "")}
    return {**given, "output": answer["content"], **rest}


def _as_prompt_response(example: Example) -> Row:
    asked, answer, rest = _last_round(example)
    return {"prompt": asked["content"], "response": answer["content"], **rest}


def _last_round(example: Example) -> tuple[Message, Message, Row]:
    """The last question, its answer, and what comes before as `system` and `history`."""
    messages = example.messages or []
    rest: Row = {}
    if messages[0]["role"] == "system":
        rest["system"], messages = messages[0]["content"], messages[1:]
    if len(messages) > 2:
        said = [message["content"] for message in messages[:-2]]
        rest["history"] = [list(both) for both in zip(said[::2], said[1::2], strict=True)]
    return messages[-2], messages[-1], rest


def _as_prompt_completion(example: Example) -> Row:
    messages = _unmarked(example.messages)
    end = _end_of_prompt(messages)
    made: Row = {"prompt": messages[:end], "completion": messages[end:]}
    return made | ({"tools": example.tools} if example.tools else {})


def _as_preference(example: Example) -> Row:
    """The prompt goes up to where the two ends part: its answers are the ones that are not learned."""
    messages = example.messages or []
    end = next(at for at, each in enumerate(messages) if each["role"] == "assistant" and each.get("train", True))
    made: Row = {
        "prompt": _unmarked(messages[:end]),
        "chosen": _unmarked(messages[end:]),
        "rejected": _unmarked(example.rejected),
    }
    return made | ({"tools": example.tools} if example.tools else {})


def _unmarked(messages: Sequence[Message] | None) -> list[Row]:
    return [_openai({key: value for key, value in message.items() if key != "train"}) for message in messages or []]


def _prompt_and(answer: str) -> Callable[[Example], Row]:
    def write(example: Example) -> Row:
        asked, answered = example.messages or [{}, {}]
        worse = {"rejected": example.rejected[0]["content"]} if example.rejected else {}
        return {"prompt": asked["content"], answer: answered["content"], **(worse if answer == "chosen" else {})}

    return write


NO_ROLES, NO_TOOLS = frozenset({TEXT}), frozenset({TEXT, TOOLS})
PLAIN_LOSES = frozenset({PAIR, THOUGHT, EARLY_OUT, LAST_OUT})
SHAPES = {
    "messages": Shape(_as_messages, NO_ROLES, frozenset({PAIR})),
    "sharegpt": Shape(_as_sharegpt, NO_ROLES, frozenset({PAIR})),
    "alpaca": Shape(_as_alpaca, NO_TOOLS, PLAIN_LOSES),
    "prompt-response": Shape(_as_prompt_response, NO_TOOLS, PLAIN_LOSES),
    "prompt-completion": Shape(_as_prompt_completion, NO_ROLES, frozenset({PAIR, EARLY_IN, LAST_OUT}), _prompt_and("completion")),
    "text": Shape(lambda example: {"text": example.text}, frozenset({ROLES}), frozenset()),
    "preference": Shape(_as_preference, frozenset({TEXT, UNPAIRED}), frozenset(), _prompt_and("chosen")),
}


# --- files -------------------------------------------------------------------------------------------------


def write_rows(path: str | Path, rows: Iterable[Row], *, overwrite: bool = False) -> int:
    """Writes rows as the name's ending says (.jsonl, .json, .csv, .tsv, each also .gz; .parquet); returns their number.

    The file is there whole or not at all. Raises DataError 89 (ending), 90 (the file exists), 91 (cannot be written)
    or 10 (no rows).
    """
    path = Path(path)
    ending = "".join(path.suffixes[-2:] if path.suffix.lower() == ".gz" else path.suffixes[-1:]).lower()
    write = WRITERS.get(ending)
    if write is None:
        raise DataError(89, f"no rows can be written as '{ending or path.name}'", fix=f"name it {', '.join(WRITERS)}")
    if path.exists() and not overwrite:
        fix = "choose another name, or overwrite it: --overwrite"
        raise DataError(90, "exists already, and is not overwritten", where=str(path), fix=fix)
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(draft, "wb") as file:
            count = write(file, rows)
            file.flush()
            os.fsync(file.fileno())
        if not count:
            raise DataError(10, "there are no rows to write", where=str(path), fix="check what the rows were made from")
        os.replace(draft, path)
    except OSError as error:
        fix = "choose a folder that exists, can be written and has room"
        raise DataError(91, f"cannot be written: {error.strerror or error}", where=str(path), fix=fix) from None
    finally:
        draft.unlink(missing_ok=True)
    return count


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _write_lines(file: IO[bytes], rows: Iterable[Row]) -> int:
    count = 0
    for row in rows:
        file.write(f"{_json(row)}\n".encode())
        count += 1
    return count


def _write_list(file: IO[bytes], rows: Iterable[Row]) -> int:
    count = 0
    for count, row in enumerate(rows, 1):
        file.write(f"{',' if count > 1 else '['}\n{_json(row)}".encode())
    file.write(b"\n]\n")
    return count


def _columns(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(column for row in rows for column in row))


def _write_table(delimiter: str) -> Callable[[IO[bytes], Iterable[Row]], int]:
    """Texts that look like formulas are guarded (see `cells`); reading the table takes that back."""

    def cell(value: Any) -> str:
        return guarded(value) if type(value) is str else "" if value is None else _json(value)

    def write(file: IO[bytes], rows: Iterable[Row]) -> int:
        kept = list(rows)
        columns = _columns(kept)
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        table = csv.writer(text, delimiter=delimiter, lineterminator="\n", quoting=csv.QUOTE_ALL)
        table.writerow(map(guarded, columns))
        table.writerows([cell(row.get(column)) for column in columns] for row in kept)
        text.detach()
        return len(kept)

    return write


def _write_parquet(file: IO[bytes], rows: Iterable[Row]) -> int:
    """`tools` is written as JSON text: their schemas differ from row to row, and a column has one type only."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kept = [{**row, "tools": _json(row["tools"])} if type(row.get("tools")) is list else row for row in rows]
    table = pa.table({column: [row.get(column) for row in kept] for column in _columns(kept)})
    pq.write_table(table, file)
    return len(kept)


def _gzipped(write: Callable[[IO[bytes], Iterable[Row]], int]) -> Callable[[IO[bytes], Iterable[Row]], int]:
    def packed(file: IO[bytes], rows: Iterable[Row]) -> int:
        with gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0) as inner:
            return write(inner, rows)  # type: ignore[arg-type]

    return packed


TEXT_WRITERS = {".jsonl": _write_lines, ".json": _write_list, ".csv": _write_table(","), ".tsv": _write_table("\t")}
WRITERS = {
    **TEXT_WRITERS,
    **{f"{ending}.gz": _gzipped(write) for ending, write in TEXT_WRITERS.items()},
    ".parquet": _write_parquet,
}
