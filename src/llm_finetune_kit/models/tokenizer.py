"""The tokenizer with its chat template: text in the exact form the model is trained on and asked in."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from llm_finetune_kit.catalog import DEFAULT_TEMPLATE
from llm_finetune_kit.errors import ModelError

Message = dict[str, Any]

PRIVATE = 0xF0000  # first code point of a Unicode plane that no text uses


class ChatTokenizer:
    """A fast tokenizer, the template that renders conversations for it, and the tokens that end an answer.

    `source` says where the template came from: `tokenizer` (its own) or `default` (the documented one).
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.source = "tokenizer" if tokenizer.chat_template else "default"
        if not tokenizer.chat_template:
            tokenizer.chat_template = DEFAULT_TEMPLATE
        self.backend = tokenizer.backend_tokenizer
        self.specials: dict[str, int] = {
            token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        self.eos_id: int = tokenizer.eos_token_id
        self.bos_id: int | None = tokenizer.bos_token_id
        self.adds_bos = self.bos_id is not None and tokenizer("a")["input_ids"][:1] == [self.bos_id]
        self.pad_id: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.eos_id

    @cached_property
    def respelled(self) -> tuple[Any, dict[str, str], dict[int, int]]:
        """The tokenizer with private characters, as many, for the text of each special token; those spellings;
        and the ids behind its ids. Where a message holds the text of special tokens, the template's own are
        spelled so: the text then stays text, and the tokenizer sees all else as it stands.
        """
        tree = json.loads(self.backend.to_str())
        added, tree["added_tokens"] = tree["added_tokens"], []
        backend = type(self.backend).from_str(json.dumps(tree))
        spellings = {text: chr(PRIVATE + number) * len(text) for number, text in enumerate(self.specials)}
        behind = {}
        for token in added:
            index = token.pop("id")
            token["content"] = spellings.get(token["content"], token["content"])
            backend.add_tokens([AddedToken(**token)])
            behind[backend.token_to_id(token["content"])] = index
        return backend, spellings, behind

    @property
    def template(self) -> str:
        return str(self.tokenizer.chat_template)

    def fingerprint(self) -> str:
        """SHA-256 over all that decides which ids a conversation becomes."""
        parts = (self.backend.to_str(), self.template, str(self.adds_bos), str(self.bos_id), str(self.eos_id))
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def render(self, conversations: list[list[Message]], *, ask: bool = False) -> list[str]:
        """Each conversation as one text; with `ask`, up to where the model begins to answer.

        Raises ModelError if the template refuses a conversation.
        """
        try:
            return list(self.tokenizer.apply_chat_template(conversations, tokenize=False, add_generation_prompt=ask))
        except Exception as error:  # a template may raise anything of its own
            raise ModelError(
                11,
                f"the chat template refuses these messages: {error}",
                why="some templates know no system role, or want user and assistant to alternate",
                fix="remove the system prompt, or correct the order of the roles",
            ) from error

    def prompt_ids(self, messages: list[Message]) -> list[int]:
        """The ids of a conversation up to where the model begins to answer, with exactly one BOS."""
        ids = self.backend.encode(self.render([messages], ask=True)[0], add_special_tokens=False).ids
        return self.with_bos(ids)

    def with_bos(self, ids: list[int]) -> list[int]:
        """The ids with a BOS in front where the tokenizer would put one and the template did not."""
        return [self.bos_id, *ids] if self.adds_bos and ids[:1] != [self.bos_id] else ids  # type: ignore[list-item]

    def decode(self, ids: list[int], *, keep_special: bool = False) -> str:
        """Text of the ids; without special tokens unless asked."""
        if not keep_special:  # by id: some tokenizers leave special tokens in when asked to skip them
            hidden = set(self.specials.values())
            ids = [index for index in ids if index not in hidden]
        return str(self.tokenizer.decode(ids))

    def stop_ids(self) -> list[int]:
        """The tokens that end an answer: the end of text, and the template's end of turn if it has its own."""
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        rendered = self.render([probe])[0]
        tail = rendered[rendered.rfind("b") + 1 :]
        ends = {self.eos_id} | {index for text, index in self.specials.items() if tail.strip().startswith(text)}
        return sorted(ends)

    def save(self, folder: Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and chat_template.jinja beside the weights."""
        self.tokenizer.save_pretrained(folder)


def load_tokenizer(folder: Path) -> ChatTokenizer:
    """The tokenizer in a model or adapter folder. Raises ModelError where it is missing or cannot be used."""
    try:
        tokenizer = _loader(folder).from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and others here
        raise ModelError(
            10,
            "the tokenizer cannot be loaded",
            where=str(folder),
            why=str(error).strip().splitlines()[0][:200],
            fix="the folder needs tokenizer.json and tokenizer_config.json from the model's hub page",
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            10, "the tokenizer has no tokenizer.json", where=str(folder), fix="save it once with transformers' fast tokenizer"
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(
            12, "the tokenizer has no end-of-text token", where=str(folder), fix="set eos_token in tokenizer_config.json"
        )
    return ChatTokenizer(tokenizer)


def _loader(folder: Path) -> Any:
    """transformers' class for the tokenizer: the general one where it is asked for, since that one needs no torch."""
    try:
        asked = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("tokenizer_class")
    except (OSError, ValueError, AttributeError):
        asked = None
    if asked in ("PreTrainedTokenizerFast", "TokenizersBackend"):
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer
