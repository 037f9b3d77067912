"""The table of error codes: all that the source raises is in it, and nothing that is not."""

from __future__ import annotations

import ast
from pathlib import Path

from llm_finetune_kit import errors, interrupts
from llm_finetune_kit.error_codes import KINDS, error_codes

SOURCE = Path(__file__).resolve().parents[1] / "src" / "llm_finetune_kit"
NAMED = {kind.__name__: kind.kind for kind in KINDS.values()} | {"Fault": "DATA", "Flaw": "DATA"}
POSITION = {"parsed": 2}  # data.formats.rows.parsed(text, place, NUMBER, problem)


def numbers(node: ast.expr) -> list[int]:
    """The numbers that an argument may be: itself, or either side of a condition."""
    if isinstance(node, ast.IfExp):
        return numbers(node.body) + numbers(node.orelse)
    return [node.value] if isinstance(node, ast.Constant) and type(node.value) is int else []


def raised() -> dict[str, list[str]]:
    """Every code that the source makes, with the places where it does."""
    found: dict[str, list[str]] = {}
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                continue
            name, position = node.func.id, POSITION.get(node.func.id, 0)
            kind = "DATA" if name in POSITION else NAMED.get(name)
            if kind and len(node.args) > position:
                for number in numbers(node.args[position]):
                    found.setdefault(f"{kind}-{number:03d}", []).append(f"{path.relative_to(SOURCE)}:{node.lineno}")
    return found


def test_every_error_that_is_raised_is_explained_and_no_other() -> None:
    signals = {f"{errors.Interrupted.kind}-{number:03d}" for number in interrupts.NUMBERS}
    places = raised()
    assert len(places) > 140
    missing = {code: where for code, where in places.items() if code not in error_codes()}
    assert not missing, f"write what these mean into assets/errors.yaml: {missing}"
    assert set(error_codes()) - set(places) == signals | {"BUG-001"}


def test_every_explanation_is_whole_and_short() -> None:
    for one in error_codes().values():
        for text in (one.means, one.cause, one.fix):
            assert text == " ".join(text.split()) and 10 <= len(text) <= 160, (one.code, text)
        assert one.means.endswith(".") and one.cause.endswith(".") and one.exit_code in (2, 3, 4, 5, 6, 7, 70, 129, 130, 143)
