"""The class names of the LLaMA framework: thin shapes over the one engine."""

from __future__ import annotations

from typing import Any

import numpy as np

from llm_finetune_kit.config import DataSection

IGNORED = -100  # a label that transformers' loss passes over


class DatasetLoader:
    """Rows of one data set as padded tensors for a trainer of one's own.

    `load()` gives a `datasets.DatasetDict` with `train` and `validation`, whose rows hold `input_ids`,
    `attention_mask` and `labels`, each a list of `max_length` integers. Labels are -100 except on what is
    learned: the answers, or with `loss_on="all"` every token. Raises DataError for what cannot be trained.
    """

    data = ""

    def __init__(
        self, tokenizer: Any, max_length: int = 512, *, data: Any = None, loss_on: str = "answers", seed: int = 42
    ) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.source = self.data if data is None else data
        self.settings = DataSection.model_validate({"loss_on": loss_on})
        self.seed = seed

    def load(self) -> Any:
        """Read, tokenize, cut, split (near copies stay on one side) and pad."""
        from datasets import Dataset, DatasetDict

        from llm_finetune_kit.data import prepare
        from llm_finetune_kit.data.split import split
        from llm_finetune_kit.models.tokenizer import ChatTokenizer

        chat = ChatTokenizer(self.tokenizer)
        read = prepare.read(self.source, self.settings, self.seed)
        encoded = prepare.tokenize(read, self.settings, chat, chat.fingerprint(), self.seed)
        sides = split(encoded, self.settings, self.seed)
        parts = {"train": sides.train, "validation": sides.held_out}
        return DatasetDict({
            name: Dataset.from_dict(self._padded(tokens, chat.pad_id)) for name, tokens in parts.items() if tokens is not None
        })  # fmt: skip

    def _padded(self, tokens: Any, pad_id: int) -> dict[str, np.ndarray]:
        """Arrays of shape [examples, max_length], int64."""
        shape = (len(tokens), self.max_length)
        ids, seen, labels = np.full(shape, pad_id), np.zeros(shape, dtype=np.int64), np.full(shape, IGNORED)
        cut = tokens.cut(self.max_length)[0]
        for index in range(len(cut)):
            own, trained = cut.example(index)
            ids[index, : len(own)], seen[index, : len(own)] = own, 1
            labels[index, : len(own)] = np.where(trained, own, IGNORED)
        return {"input_ids": ids, "attention_mask": seen, "labels": labels}


class AlpacaDatasetLoader(DatasetLoader):
    """Instruction, input and output: `alpaca_data.json` here or in data/, else the hub's copy (CC BY-NC 4.0)."""

    data = "alpaca"


class DailyDialogDatasetLoader(DatasetLoader):
    """Conversations: `dialogues_text.txt` or a folder daily_dialog here, else the hub's copy (CC BY-NC-SA 4.0)."""

    data = "daily_dialog"
