"""The table of formats: which columns prove a shape of rows, which more it uses, and what makes examples of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from llm_finetune_kit.data.formats.answers import END_OF_UTTERANCE, alpaca, dialog, pair, text
from llm_finetune_kit.data.formats.conversations import human_assistant, openai, sharegpt
from llm_finetune_kit.data.formats.preferences import preference, rated, rated_messages, rejected_response
from llm_finetune_kit.data.formats.rows import Example, Fault, Notes, Row, listed, truth
from llm_finetune_kit.data.formats.threads import Outcome, Threads, View, oasst_messages, oasst_trees

Kind = Literal["answers", "text", "preference", "rated"]
Columns = dict[str, tuple[str, ...]]
Convert = Callable[[Row, Notes], Example]
Gather = Callable[[Sequence[Row], View, Threads, Notes], Iterator[tuple[int, Outcome]]]
Shown = Callable[[Sequence[Row]], bool | None]  # whether the values are of the shape; None if they leave it open


@dataclass(frozen=True)
class Format:
    """A shape of rows. Each slot lists the columns that may fill it, best first; all of `needs` prove the shape.

    Rows become examples one by one (`convert`), or all together (`gather`) where one row is not one example.
    """

    name: str
    needs: Columns
    convert: Convert | None = None
    takes: Columns = field(default_factory=dict)
    kind: Kind = "answers"
    shown: Shown | None = None  # where columns alone are no proof
    home: str = ""  # the column whose name is proof enough if the values leave it open
    gather: Gather | None = None
    whole: bool = False  # one example may need rows from anywhere in the file

    def __str__(self) -> str:
        return " + ".join("/".join(columns[:4]) for columns in self.needs.values())


# --- proofs by value ---------------------------------------------------------------------------------------


def _by_first(test: Callable[[Row], bool | None]) -> Shown:
    """The first row that tells decides: a later one of another shape is a fault of its own."""
    return lambda rows: next((said for row in rows if (said := test(row)) is not None), None)


def _turns_have(key: str) -> Shown:
    def test(row: Row) -> bool | None:
        first = _first(row["messages"], "messages")
        return key in first if type(first) is dict else None

    return _by_first(test)


def _first(value: Any, place: str) -> Any:
    """The first thing in a list, or in the JSON text of one."""
    try:
        return next(iter(listed(value, place)), None)
    except Fault:
        return None


def _is_dialog(row: Row) -> bool | None:
    value = row["dialog"]
    if type(value) is str and END_OF_UTTERANCE in value:
        return True
    first = _first(value, "dialog")
    return None if first is None else type(first) is str


def _has_marks(row: Row) -> bool | None:
    return type(row["dialog"]) is str and END_OF_UTTERANCE in row["dialog"]


def _is_tree(row: Row) -> bool | None:
    value = row["prompt"]
    return None if value is None else type(value) is dict and ("replies" in value or "text" in value)


def _are_labels(rows: Sequence[Row]) -> bool | None:
    """True or false anywhere, or only what may stand for it; other numbers or words are a class or a score."""
    labels = [row["label"] for row in rows if row["label"] is not None]
    if not labels:
        return None
    return any(type(label) is bool for label in labels) or all(truth(label) is not None for label in labels)


# --- the table ---------------------------------------------------------------------------------------------

SYSTEM: Columns = {"system": ("system", "system_prompt")}
HISTORY: Columns = {"history": ("history",)}
TOOLS: Columns = {"tools": ("tools", "functions")}
INPUT: Columns = {"input": ("input", "context")}
QUESTIONS = ("query", "prompt", "input", "question", "problem")
ANSWERS = (
    "response", "answer", "output", "targets", "target", "answer_key", "answers", "solution", "text", "completion",
    "content",
)  # fmt: skip
TURNS = ("messages", "conversations", "conversation")
LABELS = ("label", "kto_tag")
ASKED: Columns = {"messages": TURNS, "prompt": ("prompt", "query", "question", "problem"), "instruction": ("instruction",)}


def _asks(name: str, question: str, answer: str, more: Columns | None = None) -> Format:
    return Format(name, {"prompt": (question,), "answer": (answer,)}, pair, {**SYSTEM, **HISTORY, **(more or {})})


def _follows(name: str, output: tuple[str, ...], given: tuple[str, ...]) -> Format:
    return Format(name, {"instruction": ("instruction",), "output": output}, alpaca, {"input": given, **HISTORY, **SYSTEM})


# First match wins; the columns of `needs` prove the format, those of `takes` are used when they are there.
FORMATS: tuple[Format, ...] = (
    Format("preference", {"chosen": ("chosen",), "rejected": ("rejected",)}, preference,
           ASKED | INPUT | HISTORY | SYSTEM | TOOLS, "preference"),
    Format("rejected-response", {"rejected": ("rejected_response",)}, rejected_response,
           {"messages": TURNS, "prompt": ASKED["prompt"], "answer": ("response", "answer", "output")}
           | HISTORY | SYSTEM | TOOLS, "preference"),
    Format("rated-messages", {"messages": TURNS, "label": LABELS}, rated_messages, SYSTEM | TOOLS, "rated", _are_labels),
    Format("rated", {"prompt": QUESTIONS, "answer": ("completion", "response", "answer", "output"), "label": LABELS},
           rated, HISTORY | SYSTEM, "rated", _are_labels),
    Format("messages", {"messages": ("messages", "conversations", "conversation", "dialogue", "texts")}, openai,
           SYSTEM | TOOLS, shown=_turns_have("role"), home="messages"),
    Format("sharegpt", {"messages": ("conversations", "conversation", "messages")}, sharegpt,
           SYSTEM | TOOLS, shown=_turns_have("from"), home="conversations"),
    Format("human-assistant", {"messages": ("conversation", "conversations", "messages")}, human_assistant,
           SYSTEM, shown=_turns_have("human"), home="conversation"),
    Format("daily-dialog", {"dialog": ("dialog", "utterances", "dialogue")}, dialog, SYSTEM,
           shown=_by_first(_is_dialog), home="dialog"),
    Format("eou-text", {"dialog": ("text",)}, dialog, SYSTEM, shown=_by_first(_has_marks)),
    Format("oasst-tree", {"prompt": ("prompt",)}, shown=_by_first(_is_tree), gather=oasst_trees),
    Format("oasst", {"message_id": ("message_id",), "parent_id": ("parent_id",), "text": ("text",), "role": ("role",)},
           takes={name: (name,) for name in ("rank", "deleted", "review_result")}, gather=oasst_messages, whole=True),
    _follows("alpaca", ("output",), ("input", "context")),
    _follows("dolly", ("response",), ("context", "input")),
    _follows("instruction-answer", ANSWERS, ("input", "context")),
    _asks("prompt-response", "prompt", "response"),
    _asks("prompt-completion", "prompt", "completion", TOOLS),
    _asks("question-answer", "question", "answer"),
    _asks("query-answer", "query", "answer"),
    _asks("query-response", "query", "response"),
    Format("pairs", {"prompt": QUESTIONS, "answer": ANSWERS}, pair, SYSTEM | HISTORY),
    Format("text", {"text": ("text", "content")}, text, kind="text"),
)  # fmt: skip

# Names that people give to these shapes elsewhere; the first that fits the columns is meant.
ALSO_CALLED = {
    "openai": ("messages",), "chatml": ("messages",), "raw": ("text",), "gsm8k": ("question-answer",),
    "dailydialog": ("daily-dialog", "eou-text"), "dpo": ("preference", "rejected-response"),
    "kto": ("rated", "rated-messages"), "oasst-messages": ("oasst",), "swift": ("human-assistant",),
}  # fmt: skip

EXPECTED = sorted({name for shape in FORMATS for names in (shape.needs | shape.takes).values() for name in names})
SLOTS = sorted({slot for shape in FORMATS for slot in shape.needs | shape.takes} | set(EXPECTED))


def shapes_in_words() -> str:
    """The accepted shapes, for messages to people."""
    return "; ".join(f"{shape.name} ({shape})" for shape in FORMATS)
