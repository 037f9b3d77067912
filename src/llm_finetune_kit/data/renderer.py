"""What the data path needs of a tokenizer and its chat template."""

from __future__ import annotations

import re
from typing import Any, Protocol

Talk = list[dict[str, Any]]  # messages: role and content; tool_calls, reasoning_content, train where the data has them


class Renderer(Protocol):
    """The part of `models.tokenizer.ChatTokenizer` that masks, gate and X-ray are made with."""

    BREAK: str
    tokenizer: Any
    backend: Any
    specials: dict[str, int]
    eos_id: int
    bos_id: int | None
    adds_bos: bool

    @property
    def special_text(self) -> re.Pattern[str]: ...
    @property
    def can(self) -> Any: ...
    @property
    def marks_answers(self) -> bool: ...
    @property
    def respelled(self) -> tuple[Any, dict[str, str], dict[int, int]]: ...

    def render(self, conversations: list[Talk], *, ask: bool = False, tools: Any = None) -> list[str]: ...
    def render_answers(self, messages: Talk, tools: Any = None) -> tuple[str, list[tuple[int, int]]]: ...
    def shaped(self, messages: Talk) -> Talk: ...
    def disguised(self, value: Any) -> Any: ...
    def respell(self, text: str) -> str: ...
    def decode(self, ids: list[int], *, keep_special: bool = False) -> str: ...
    def stop_ids(self) -> list[int]: ...
