"""Rows that a loader of the user's own has tokenized already: input_ids, and perhaps attention_mask and labels."""

from __future__ import annotations

from typing import Any

import numpy as np

from llm_finetune_kit.data.masks import Tokens
from llm_finetune_kit.data.sources import Source
from llm_finetune_kit.errors import DataError

IGNORED = -100  # the label of a token that is not learned, as transformers has it


def is_ready(source: Source) -> bool:
    return "input_ids" in source.rows[0]


def ready_tokens(source: Source) -> Tokens:
    """The tokens of all rows; padding (attention_mask 0) is taken away. Without labels every token is learned.

    Raises DataError for ids that are none and for labels that are not the row's own ids.
    """
    ids, masks = [], []
    for index, row in enumerate(source.rows):
        own, labels = _row(row, source.place(index))
        ids.append(own)
        masks.append(labels != IGNORED)
    starts = np.concatenate([[0], np.cumsum([len(own) for own in ids])]).astype(np.int64)
    return Tokens(np.concatenate(ids), np.concatenate(masks), starts, np.arange(len(ids), dtype=np.int32))


def _row(row: dict[str, Any], where: str) -> tuple[np.ndarray, np.ndarray]:
    """Ids int32 [length] and labels int64 [length] of one row, without padding."""
    ids = _integers(row["input_ids"], f"{where}, field input_ids")
    labels = ids if row.get("labels") is None else _integers(row["labels"], f"{where}, field labels")
    seen = (
        np.ones(len(ids))
        if row.get("attention_mask") is None
        else _integers(row["attention_mask"], f"{where}, field attention_mask")
    )
    if not len(ids) == len(labels) == len(seen):
        problem = f"has {len(ids)} input_ids, {len(labels)} labels and {len(seen)} mask values"
        raise DataError(140, problem, where=where, fix="make the lists equally long")
    ids, labels = ids[seen != 0], labels[seen != 0]
    if not len(ids) or ids.min() < 0:
        raise DataError(141, "holds no token, or a negative id", where=f"{where}, field input_ids", fix="leave the row out")
    wrong = np.flatnonzero((labels != IGNORED) & (labels != ids))
    if len(wrong):
        problem = f"is {labels[wrong[0]]} at position {wrong[0]}, where the token is {ids[wrong[0]]}"
        why = "a label is the token itself or -100; the trainer looks one token ahead by itself"
        raise DataError(142, problem, where=f"{where}, field labels", why=why, fix="do not shift the labels")
    return ids.astype(np.int32), labels


def _integers(values: Any, where: str) -> np.ndarray:
    if type(values) is list and values and all(type(value) is int for value in values):
        return np.array(values, dtype=np.int64)
    raise DataError(5, "is not a list of whole numbers", where=where, fix="give the ids of one text as a list")
