"""The pages' templates: escaped, in a sandbox, and with no value left out unseen."""

from __future__ import annotations

from jinja2 import PackageLoader, StrictUndefined
from jinja2.sandbox import SandboxedEnvironment


def templates(folder: str) -> SandboxedEnvironment:
    """What renders the templates in a folder of the package; a name without a value is an error."""
    return SandboxedEnvironment(
        loader=PackageLoader("llm_finetune_kit", folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
