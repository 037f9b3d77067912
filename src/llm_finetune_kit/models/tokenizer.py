"""The tokenizer with its chat template: text in the exact form the model is trained on and asked in."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from llm_finetune_kit.errors import ModelError
from llm_finetune_kit.models.template import GENERATION, Abilities, abilities, check, chosen, shaped

Message = dict[str, Any]
Tools = list[dict[str, Any]]

PRIVATE = 0xF0000  # first code point of a Unicode plane that no text uses
THOUGHTS = frozenset(("<think>", "</think>"))  # what an assistant message may say in special tokens: it is meant


class ChatTokenizer:
    """A fast tokenizer, the template that renders conversations for it, and the tokens that end an answer.

    `template` is None for the tokenizer's own (or the documented default if it has none), `default`, or the path
    of a .jinja file; `source` says which it became. Raises ConfigError or ModelError if it cannot be used.
    """

    BREAK = "\ufdd2"  # breaks up text that only looks like a special token: a noncharacter, which no text holds

    def __init__(self, tokenizer: Any, template: str | None = None) -> None:
        self.tokenizer = tokenizer
        tokenizer.chat_template, self.source = chosen(template, tokenizer.chat_template)
        self.backend = tokenizer.backend_tokenizer
        self.specials: dict[str, int] = {
            token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        self.eos_id: int = tokenizer.eos_token_id
        self.bos_id: int | None = tokenizer.bos_token_id
        self.adds_bos = self.bos_id is not None and tokenizer("a")["input_ids"][:1] == [self.bos_id]
        self.pad_id: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.eos_id
        # Whether the model is asked to think first, where its template offers that; None: as the template does by itself.
        self.thinking: bool | None = tokenizer.init_kwargs.get("enable_thinking")
        if template is not None:
            check(self.template, self.source, self._one)

    @cached_property
    def special_text(self) -> re.Pattern[str]:
        """Matches the text of any special token, the longest first."""
        return re.compile("|".join(map(re.escape, sorted(self.specials, key=len, reverse=True))) or r"(?!)")

    @cached_property
    def can(self) -> Abilities:
        """What the template renders."""
        return abilities(self._one)

    @property
    def marks_answers(self) -> bool:
        """Whether the template itself says what an answer is, with generation marks."""
        return GENERATION.search(self.template) is not None

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

    def render(
        self, conversations: list[list[Message]], *, ask: bool = False, tools: Tools | None = None, **how: Any
    ) -> list[str]:
        """Each conversation as one text; with `ask`, up to where the model begins to answer.

        The messages are rendered as they stand (see `shaped`), and `how` goes to the template. Raises ModelError
        if the template refuses one.
        """
        with _refusals():
            return list(
                self.tokenizer.apply_chat_template(conversations, tools=tools, tokenize=False, add_generation_prompt=ask, **how)
            )

    def render_answers(self, messages: list[Message], tools: Tools | None = None) -> tuple[str, list[tuple[int, int]]]:
        """A conversation as text, and the characters that the template's own generation marks hold."""
        from transformers.utils.chat_template_utils import render_jinja_template

        given = [{key: value for key, value in message.items() if value is not None} for message in messages]
        with _refusals():
            texts, spans = render_jinja_template(
                conversations=[given],
                tools=tools,
                chat_template=self.template,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        return texts[0], spans[0]

    def _one(self, messages: list[Message], tools: Tools | None) -> str:
        return self.render([messages], tools=tools)[0]

    def shaped(self, messages: list[Message]) -> list[Message]:
        """The conversation as this template takes it; the same list where nothing need change."""
        return shaped(messages, lambda: self.can)

    def disguised(self, value: Any, *, thoughts: bool = False) -> Any:
        """A text, a message or tools, with BREAK inside all that looks like a special token; itself if nothing does.

        With `thoughts`, the marks of a thought are left as they are.
        """
        if isinstance(value, str):
            found = self.special_text.search(value)
            return self.special_text.sub(lambda match: self._broken(match.group(), thoughts), value) if found else value
        if isinstance(value, dict):
            thoughts = value.get("role") == "assistant"
            made = {key: part if key == "role" else self.disguised(part, thoughts=thoughts) for key, part in value.items()}
            return value if all(made[key] is part for key, part in value.items()) else made
        if isinstance(value, list):
            parts = [self.disguised(part, thoughts=thoughts) for part in value]
            return value if all(one is other for one, other in zip(parts, value, strict=True)) else parts
        return value

    def _broken(self, text: str, thoughts: bool) -> str:
        return text if thoughts and text in THOUGHTS else text[0] + self.BREAK + text[1:]

    def respell(self, text: str) -> str:
        """A rendered text for the `respelled` tokenizer: what BREAK broke up becomes plain text again."""
        spellings = self.respelled[1]
        return self.special_text.sub(lambda match: spellings[match.group()], text).replace(self.BREAK, "")

    def prompt_ids(self, messages: list[Message], tools: Tools | None = None) -> list[int]:
        """The ids of a conversation up to where the model begins to answer, with exactly one BOS.

        Special-token text in the messages stays plain text. `tools` only for templates that render them
        (`data.spans.for_template` prepares a conversation for the others).
        """
        hidden = [self.disguised(message) for message in self.shaped(messages)]
        how = {} if self.thinking is None else {"enable_thinking": self.thinking}
        text = self.render([hidden], ask=True, tools=self.disguised(tools), **how)[0]
        if self.BREAK not in text:
            return self.with_bos(self.backend.encode(text, add_special_tokens=False).ids)
        backend, _, behind = self.respelled
        ids = backend.encode(self.respell(text), add_special_tokens=False).ids
        return self.with_bos([behind.get(index, index) for index in ids])

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
        return list(self._stops)

    @cached_property
    def _stops(self) -> list[int]:
        rendered = self._one([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], None)
        tail = rendered[rendered.rfind("b") + 1 :]
        ends = {self.eos_id} | {index for text, index in self.specials.items() if tail.strip().startswith(text)}
        return sorted(ends)

    def save(self, folder: Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and chat_template.jinja beside the weights."""
        if self.thinking is not None:
            self.tokenizer.init_kwargs["enable_thinking"] = self.thinking
        self.tokenizer.save_pretrained(folder)


@contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a template may raise anything of its own
        raise ModelError(
            11,
            f"the chat template refuses these messages: {error}",
            why="some templates want user and assistant to alternate, or know only some roles",
            fix="correct the order of the roles, or use the documented template: data.template=default",
        ) from error


def load_tokenizer(folder: Path, template: str | None = None, *, trusted: bool = False) -> ChatTokenizer:
    """The tokenizer in a model or adapter folder, with its own chat template or the asked one (see ChatTokenizer).

    Raises ModelError where it is missing or cannot be used.
    """
    try:
        tokenizer = _loader(folder).from_pretrained(folder, trust_remote_code=trusted, local_files_only=True)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and others here
        raise ModelError(
            10,
            "the tokenizer cannot be loaded",
            where=str(folder),
            why=" ".join(str(error).split())[:200],
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
    return ChatTokenizer(tokenizer, template)


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
