"""Raw texts that are longer than the model can read, in windows it can."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from llm_finetune_kit.data import similar
from llm_finetune_kit.data.masks import Tokens
from llm_finetune_kit.data.prepare import Encoded
from llm_finetune_kit.data.renderer import Renderer


def windowed(data: Encoded, length: int, chat: Renderer) -> Encoded:
    """Every example of more than `length` tokens as several, of about the same size; the others as they are.

    A window keeps its row. Only for raw texts, of which every token is learned: a conversation needs its beginning.
    """
    counts = -(-data.tokens.lengths // length)
    if (counts <= 1).all():
        return data
    starts = [
        np.linspace(first, last, count + 1).round().astype(np.int64)[:-1]
        for first, last, count in zip(data.tokens.starts[:-1], data.tokens.starts[1:], counts, strict=True)
    ]
    edges = np.concatenate([*starts, data.tokens.starts[-1:]])
    tokens = Tokens(data.tokens.ids, data.tokens.trained, edges, np.repeat(data.tokens.rows, counts))
    sketches = np.repeat(data.sketches, counts, axis=0)
    parts = np.flatnonzero(np.repeat(counts, counts) > 1)
    sketches[parts] = similar.sketch([chat.decode(tokens.example(int(part))[0].tolist()) for part in parts])
    told = f"{int((counts > 1).sum()):,} texts of more than {length:,} tokens are learned in {len(parts):,} windows"
    notes = [*data.report["notes"], told]
    return replace(data, tokens=tokens, sketches=sketches, report=data.report | {"notes": notes, "examples": len(tokens)})
