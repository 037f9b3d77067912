"""Small sound data files of every kind, and damage to them: the same number always does the same damage."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# --- sound files -------------------------------------------------------------------------------------------

CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 3}'}}
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
ASKED = {"role": "user", "content": "What is 2 + 3?"}
SAID = {"role": "assistant", "content": "5"}
TREE_REPLY = {"message_id": "b", "parent_id": "a", "text": "Steep it.", "role": "assistant", "rank": 0, "replies": []}
TREE = {"message_id": "a", "parent_id": None, "text": "How do I make tea?", "role": "prompter", "replies": [TREE_REPLY]}
ROWS: dict[str, list[dict[str, Any]]] = {
    "alpaca": [
        {"instruction": "Name a river.", "input": "", "output": "The Rhine."},
        {"instruction": "Add the numbers.", "input": "2 and 3", "output": "5 – naïve café 中文 😀"},
        {"instruction": "Greet.", "input": "", "output": "Hello!"},
    ],
    "prompts": [{"prompt": f"Count to {n}.", "response": " ".join(map(str, range(1, n + 1)))} for n in range(2, 6)],
    "messages": [
        {"messages": [{"role": "system", "content": "Be short."}, ASKED, SAID]},
        {
            "messages": [
                ASKED,
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "c1", "content": "5"},
                {**SAID, "weight": 1},
            ],
            "tools": [TOOL],
        },
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, {**SAID, "train": True}]},
    ],
    "sharegpt": [
        {"conversations": [{"from": "human", "value": f"Hello {n}"}, {"from": "gpt", "value": "Hi!"}], "tools": "[]"}
        for n in range(3)
    ],
    "dialogs": [{"dialog": ["Hi.", "Hello.", "How are you?", "Fine."], "act": [1, 1, 2, 1], "emotion": [0, 0, 0, 4]}] * 2,
    "oasst": [
        {"message_id": "a", "parent_id": None, "text": "How?", "role": "prompter", "lang": "en", "rank": None},
        {"message_id": "b", "parent_id": "a", "text": "So.", "role": "assistant", "lang": "en", "rank": 0},
        {"message_id": "c", "parent_id": "a", "text": "Not so.", "role": "assistant", "lang": "en", "rank": 1},
    ],
    "trees": [{"message_tree_id": "a", "tree_state": "ready_for_export", "prompt": TREE}],
    "preference": [{"prompt": f"Pick {n}.", "chosen": "This one.", "rejected": "No."} for n in range(3)],
    "kto": [{"prompt": "Pick.", "completion": "This.", "label": True}, {"prompt": "Go.", "completion": "No.", "label": False}],
    "texts": [{"text": "Once upon a time."}, {"text": "The end.\nReally."}],
}
DIALOGUES = "Hi , how are you ? __eou__ Fine , thanks . __eou__\nBye . __eou__ See you . __eou__ Soon . __eou__\n"
TABLE = "Hi . __eou__ Hello . __eou__\t1\t1 1\t0 0\nWhere ? __eou__ There . __eou__\t2\t2 1\t0 4\n"
STORY = "One day.\n<|endoftext|>\nAnother day.\r\n<|endoftext|>\nThe last day.\n"


def as_list(rows: list[Any]) -> bytes:
    return json.dumps(rows, indent=1, ensure_ascii=False).encode("utf-8", "surrogatepass")


def as_lines(rows: list[Any]) -> bytes:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode("utf-8", "surrogatepass")


def as_csv(rows: list[Any], delimiter: str = ",") -> bytes:
    sheet = io.StringIO()
    tables = [row for row in rows if isinstance(row, dict)]
    csv.writer(sheet, delimiter=delimiter).writerows([list(tables[0]) if tables else [], *(r.values() for r in tables)])
    return sheet.getvalue().encode("utf-8", "surrogatepass")


def as_tsv(rows: list[Any]) -> bytes:
    return as_csv(rows, "\t")


def as_columns(rows: list[Any], kind: str) -> bytes:
    """Parquet, an Arrow file or an Arrow stream; rows that no column can hold are left as JSON lines."""
    import pyarrow as pa
    import pyarrow.parquet

    sink = io.BytesIO()
    try:
        table = pa.Table.from_pylist(rows)
        if kind == "parquet":
            pyarrow.parquet.write_table(table, sink)
        else:
            open_sink = pa.ipc.new_file if kind == "arrow" else pa.ipc.new_stream
            with open_sink(sink, table.schema) as writer:
                writer.write_table(table)
    except (pa.ArrowException, AttributeError, TypeError, ValueError, OverflowError):
        return as_lines(rows)
    return sink.getvalue()


@dataclass(frozen=True)
class Seed:
    """A sound file: its rows and how they are written, or its text."""

    name: str
    write: Callable[[list[Any]], bytes]
    rows: list[dict[str, Any]]


def _texts(text: str) -> Callable[[list[Any]], bytes]:
    return lambda _: text.encode()


SEEDS = {
    seed.name: seed
    for seed in (
        Seed("alpaca.json", as_list, ROWS["alpaca"]),
        Seed("alpaca.csv", as_csv, ROWS["alpaca"]),
        Seed("alpaca.parquet", lambda rows: as_columns(rows, "parquet"), ROWS["alpaca"]),
        Seed("prompts.jsonl", as_lines, ROWS["prompts"]),
        Seed("prompts.tsv", as_tsv, ROWS["prompts"]),
        Seed("prompts.jsonl.gz", lambda rows: gzip.compress(as_lines(rows), mtime=0), ROWS["prompts"]),
        Seed("prompts.csv.gz", lambda rows: gzip.compress(as_csv(rows), mtime=0), ROWS["prompts"]),
        Seed("prompts.arrow", lambda rows: as_columns(rows, "arrow"), ROWS["prompts"]),
        Seed("messages.jsonl", as_lines, ROWS["messages"]),
        Seed("messages.json", as_list, ROWS["messages"]),
        Seed("sharegpt.jsonl", as_lines, ROWS["sharegpt"]),
        Seed("sharegpt.parquet", lambda rows: as_columns(rows, "parquet"), ROWS["sharegpt"]),
        Seed("dialogs.jsonl", as_lines, ROWS["dialogs"]),
        Seed("dialogs.arrow", lambda rows: as_columns(rows, "stream"), ROWS["dialogs"]),
        Seed("oasst.jsonl", as_lines, ROWS["oasst"]),
        Seed("trees.jsonl", as_lines, ROWS["trees"]),
        Seed("preference.json", as_list, ROWS["preference"]),
        Seed("kto.jsonl", as_lines, ROWS["kto"]),
        Seed("texts.jsonl", as_lines, ROWS["texts"]),
        Seed("story.txt", _texts(STORY), []),
        Seed("dialogues_text.txt", _texts(DIALOGUES), []),
        Seed("dailydialog.tsv", _texts(TABLE), []),
    )
}

# --- damage ------------------------------------------------------------------------------------------------

WORDS = [
    "role",
    "content",
    "from",
    "value",
    "text",
    "prompt",
    "response",
    "chosen",
    "label",
    "dialog",
    "tools",
    "messages",
    "gpt",
]
ODD: list[Any] = [
    None, True, 0, -1, 1e308, 10**30, float("nan"), "", " \n", "\ud800", "a\0b", "\x1b[31m", "x" * 3000, "\u2028", [], {}, [[]],
    ["x"], {"role": "user"}, [None], [{"role": "user", "content": "x"}], [{"from": "gpt", "value": ""}], {"a": [1]}, "[]", "{}",
]  # fmt: skip
JUNK = [
    b"\n", b"\r", b"\0", b"\xff", b"\xc3", b"\xed\xa0\x80", b"{", b"}", b"[", b"]", b'"', b"'", b",", b"\t", b";", b":", b"\\",
    b"\\ud800", b"NaN", b"-Infinity", b"1" * 5000, b"[" * 3000, b'{"a":' * 200, b"//", b"\xef\xbb\xbf", b"\xe2\x80\xa8",
    b"\x1f\x8b", b"PAR1", b"<|endoftext|>", b"__eou__", b"\x1b]0;x\x07", b'"messages": null, ',
]  # fmt: skip
CODINGS = ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig", "latin-1", "gbk", "cp1252"]
SUFFIXES = [".json", ".jsonl", ".csv", ".tsv", ".txt", ".parquet", ".arrow", ".json.gz", ".parquet.gz", ".md", ".bin", ""]


def changed_value(value: Any, chance: random.Random) -> Any:
    """The value with one thing inside it replaced, removed, repeated, renamed or added."""
    if not isinstance(value, (dict, list)) or not value or chance.random() < 0.2:
        return chance.choice(ODD)
    keys: list[Any] = list(value) if isinstance(value, dict) else list(range(len(value)))
    key, do = chance.choice(keys), chance.randrange(6)
    copy: Any = value.copy()
    if do == 0:
        del copy[key]
    elif do == 1 and isinstance(copy, dict):
        new = chance.choice([*WORDS, key.upper(), key[:-1], key + " ", ""])
        return {new if name == key else name: inner for name, inner in copy.items()}
    elif do == 1:
        copy.insert(key, copy[chance.choice(keys)])
    elif do == 2 and isinstance(copy, dict):
        copy[chance.choice(WORDS)] = chance.choice(ODD)
    else:
        copy[key] = changed_value(value[key], chance)
    return copy


def changed_bytes(raw: bytes, chance: random.Random) -> bytes:
    """The bytes with one place overwritten, cut, doubled, filled with junk, or with lines moved about."""
    at, length = chance.randrange(len(raw) + 1), chance.randint(1, 40)
    do = chance.randrange(8)
    if do == 0:
        return raw[:at] + bytes([chance.randrange(256)]) + raw[at + 1 :]
    if do == 1:
        return raw[:at] + raw[at + length :]
    if do == 2:
        return raw[:at] + raw[at : at + length] * 2 + raw[at + length :]
    if do == 3:
        return raw[:at]
    if do == 4:
        lines = raw.split(b"\n")
        chance.choice([chance.shuffle, lambda some: some.pop(), lambda some: some.extend(some)])(lines)
        return chance.choice([b"\n", b"\r\n", b"\n\n", b"", b"\r"]).join(lines)
    if do == 5:
        return bytes(byte ^ (1 << chance.randrange(8)) if chance.random() < 0.01 else byte for byte in raw)
    return raw[:at] + chance.choice(JUNK) + raw[at:]


def recoded(raw: bytes, chance: random.Random) -> bytes:
    return raw.decode("utf-8", "replace").encode(chance.choice(CODINGS), "replace")


def mutant(seed: Seed, number: int) -> tuple[str, bytes]:
    """Name and bytes of damaged file `number`: rows, then the plain bytes, then (if zipped) the zipped ones."""
    chance = random.Random(f"{seed.name} {number}")
    rows: list[Any] = seed.rows
    if seed.rows and chance.random() < 0.6:
        for _ in range(chance.randint(1, 3)):
            rows = changed_value(rows, chance)
            rows = rows if isinstance(rows, list) and rows else seed.rows
    raw = seed.write(rows)
    if raw[:2] == b"\x1f\x8b" and chance.random() < 0.6:
        raw = gzip.compress(changed_bytes(gzip.decompress(raw), chance), mtime=0)
    elif rows is seed.rows or chance.random() < 0.4:
        for _ in range(chance.choice([1, 1, 2, 5])):
            raw = changed_bytes(raw, chance)
        raw = recoded(raw, chance) if chance.random() < 0.1 else raw
    stem, dot, suffix = seed.name.partition(".")
    return stem + (chance.choice(SUFFIXES) if chance.random() < 0.08 else dot + suffix), raw
