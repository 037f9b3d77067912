"""Every error code with its meaning: what `finetune explain CODE` and the page on troubleshooting are made from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from llm_finetune_kit import errors
from llm_finetune_kit.plain_yaml import read_yaml

TABLE = "errors.yaml"
KINDS = {kind.kind: kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.KitError)}


@dataclass(frozen=True)
class ErrorCode:
    """One error that can be met: its code, what it means, how it comes about and what to do."""

    code: str
    means: str
    cause: str
    fix: str

    @property
    def exit_code(self) -> int:
        """What a command that ends with this error returns; see `errors.py`."""
        kind, _, number = self.code.partition("-")
        return 128 + int(number) if kind == errors.Interrupted.kind else KINDS[kind].exit_code


@cache
def error_codes() -> dict[str, ErrorCode]:
    """All error codes in the order of their kinds and numbers."""
    text = files("llm_finetune_kit").joinpath("assets", TABLE).read_text(encoding="utf-8")
    return {code: ErrorCode(code, **words) for code, words in read_yaml(text, TABLE)[0].items()}
