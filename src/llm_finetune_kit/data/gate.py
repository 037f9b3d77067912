"""The gate: cut to the length limit, then refuse what would train the wrong thing, or nothing."""

from __future__ import annotations

import numpy as np

from llm_finetune_kit.config import DataSection
from llm_finetune_kit.data.masks import MaskFacts, Renderer, Tokens, inspect
from llm_finetune_kit.errors import DataError

MOST_CUT = 0.5  # share of learned tokens that may be lost to max_length before training is refused


def gate(
    tokens: Tokens, chat: Renderer, settings: DataSection, name: str, max_length: int
) -> tuple[Tokens, MaskFacts, list[str]]:
    """Cut to `max_length`, then refuse what would train the wrong thing.

    Returns the tokens to train on, facts about their masks, and warnings. Raises DataError if nothing is
    learned, an answer's end is not learned, BOS stands twice, or too much of the answers is cut.
    """
    whole = inspect(tokens, chat)
    cut, cut_rows, cut_targets = tokens.cut(max_length)
    facts = inspect(cut, chat)
    warnings = []
    if facts.double_bos:
        raise DataError(
            32, f"{facts.double_bos} examples begin with two BOS tokens", where=name, fix="remove the BOS text from the rows"
        )
    if whole.open_ended and settings.loss_on == "answers":
        raise DataError(
            33,
            f"the end of {whole.open_ended} of {whole.examples} answers is not learned, so the model would never stop",
            where=name,
            fix="use a chat template that closes each answer with the end-of-turn token",
        )
    if cut_targets > MOST_CUT * whole.target_tokens:
        raise DataError(
            34,
            f"{cut_targets / whole.target_tokens:.0%} of what is to be learned lies beyond max_length {max_length}",
            where=name,
            fix=f"raise model.max_length (the longest example has {int(tokens.lengths.max()):,} tokens)",
        )
    if cut_rows:
        warnings.append(
            f"{cut_rows} of {whole.examples} examples are cut at {max_length} tokens; {cut_targets:,} learned tokens are lost"
        )
    if len(facts.nothing_learned):
        cut, facts = _without_untrainable(cut, facts, chat, settings, name, max_length, warnings)
    return cut, facts, warnings


def _without_untrainable(
    tokens: Tokens, facts: MaskFacts, chat: Renderer, settings: DataSection, name: str, max_length: int, warnings: list[str]
) -> tuple[Tokens, MaskFacts]:
    bad = facts.nothing_learned
    rows = ", ".join(str(tokens.rows[index] + 1) for index in bad[:5]) + (" …" if len(bad) > 5 else "")
    every = len(bad) == facts.examples
    if every or settings.on_bad_rows == "stop":
        raise DataError(
            35,
            f"{len(bad)} of {facts.examples} examples have no token to learn (rows {rows})",
            where=name,
            why=f"their prompts alone reach max_length {max_length}, so the answers are cut off entirely",
            fix=f"raise model.max_length above {max_length}"
            + ("" if every else ", or train without them: data.on_bad_rows=drop"),
        )
    warnings.append(f"{len(bad)} examples without a token to learn are left out (rows {rows})")
    kept = tokens.select(np.setdiff1d(np.arange(len(tokens)), bad))
    return kept, inspect(kept, chat)
