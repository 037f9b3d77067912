"""Writes the golden token sets beside it: `python tests/golden/make.py` from the repository root, after looking at `--diff`.

For each family of templates: three fixed conversations as rendered text, ids and learned flags. The tokenizer is
the demo model's with the family's special tokens added, so that ids depend on nothing that is trained at test time.
"""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import numpy as np  # noqa: E402
from tokenizers import AddedToken, Tokenizer, processors  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

from families import FAMILIES, TEMPLATES, TWINS, Talk, family_of, talk  # noqa: E402
from llm_finetune_kit.data.formats import Example  # noqa: E402
from llm_finetune_kit.data.masks import encode  # noqa: E402
from llm_finetune_kit.models.locate import demo_folder  # noqa: E402
from llm_finetune_kit.models.tokenizer import ChatTokenizer  # noqa: E402

# llama3_2 writes today's date into every conversation: its tokens change from day to day.
NAMES = sorted({*FAMILIES, *TWINS, "metharme"} - {"trl/llama3_2"})

CONVERSATIONS: dict[str, Talk] = {
    "one answer": talk("What is the capital of France?", "Paris."),
    "three answers with a system prompt": talk(
        "Hi!",
        "Hello.\nHow can I help?",
        " Tell me 2 + 2 ",
        " 4 ",
        "Danke schön 🙂",
        "Gern geschehen – bis bald!",
        system="Be brief.",
    ),
    "special-token text": talk(
        "What do <s>, </s>, <|im_end|>, <|eot_id|>, <end_of_turn> and <|end|> mean?",
        "They end a turn: </s> in Llama 2, <|im_end|> in ChatML, <|eot_id|>, <end_of_turn> and <|end|> elsewhere.",
    ),
}


@cache
def chat_of(name: str) -> ChatTokenizer:
    family = family_of(name)
    tree = json.loads((demo_folder() / "tokenizer.json").read_text(encoding="utf-8"))
    tree["added_tokens"], tree["post_processor"] = [], None
    backend = Tokenizer.from_str(json.dumps(tree))
    backend.add_special_tokens([AddedToken(text, normalized=False, rstrip=family.swallows) for text in family.specials])
    if name.startswith("trl/qwen3"):
        backend.add_tokens(["<think>", "</think>"])
    if family.adds_bos:
        first = (str(family.bos), backend.token_to_id(str(family.bos)))
        backend.post_processor = processors.TemplateProcessing(single=f"{first[0]} $A", special_tokens=[first])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=family.bos, eos_token=family.eos)
    if family.template:
        tokenizer.chat_template = (TEMPLATES / f"{family.template}.jinja").read_text(encoding="utf-8")
    return ChatTokenizer(tokenizer)


def token_set(name: str) -> dict[str, Any]:
    """The conversations of a family: rendered text, ids, learned flags as a string of 0 and 1, and the learned text."""
    chat = chat_of(name)
    found: dict[str, Any] = {}
    for what, messages in CONVERSATIONS.items():
        ids, trained = encode([Example(messages, None, 0)], chat).example(0)
        edges = np.flatnonzero(np.diff(np.concatenate([[0], trained.astype(int), [0]]))).reshape(-1, 2)
        found[what] = {
            "text": chat.render([chat.shaped(messages)])[0],
            "ids": ids.tolist(),
            "trained": "".join(map(str, trained.astype(int).tolist())),
            "learned": [chat.decode(ids[first:last].tolist(), keep_special=True) for first, last in edges],
        }
    return found


def path_of(name: str) -> Path:
    return HERE / f"{name.replace('/', '-')}.json"


def written(tokens: dict[str, Any]) -> str:
    """Short lists on one line each, so that a change can be read in a diff."""
    lines = []
    for what, parts in tokens.items():
        inner = ",\n".join(f"    {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in parts.items())
        lines.append(f"  {json.dumps(what)}: {{\n{inner}\n  }}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main() -> None:
    for name in NAMES:
        text, path = written(token_set(name)), path_of(name)
        same = path.is_file() and path.read_text(encoding="utf-8") == text
        print(f"{'same   ' if same else 'CHANGED'} {name}")
        if not same and "--diff" not in sys.argv:
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
