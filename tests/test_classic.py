"""The loaders of the LLaMA framework, a loader of one's own, and rows that are tokenized already."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_finetune_kit import AlpacaDatasetLoader, DailyDialogDatasetLoader, QuickTrainer, get_dataset_stats, load_dataset
from llm_finetune_kit.errors import DataError
from llm_finetune_kit.models.locate import demo_folder
from llm_finetune_kit.models.tokenizer import load_tokenizer

ALPACA = [{"instruction": f"Say the word number {i}.", "input": "", "output": f"The word is w{i}."} for i in range(40)]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(demo_folder()).tokenizer


def test_the_alpaca_loader_gives_padded_rows_with_masked_labels(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "alpaca_data.json").write_text(json.dumps(ALPACA))
    monkeypatch.chdir(tmp_path)
    found = AlpacaDatasetLoader(tokenizer, max_length=64).load()
    assert set(found) == {"train", "validation"} and len(found["train"]) + len(found["validation"]) == 40
    row = found["train"][0]
    ids, seen, labels = (np.array(row[name]) for name in ("input_ids", "attention_mask", "labels"))
    assert ids.shape == seen.shape == labels.shape == (64,)
    assert (labels[seen == 0] == -100).all() and ((labels == ids) | (labels == -100)).all()
    assert "The word is w" in tokenizer.decode(ids[labels != -100]) and "Say" not in tokenizer.decode(ids[labels != -100])


def test_the_dialogue_loader_learns_every_second_utterance(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [f"How are you , {i} ? __eou__ Fine , {i} . __eou__ And now ? __eou__ Now I go . __eou__" for i in range(30)]
    (tmp_path / "dialogues_text.txt").write_text("\n".join(lines) + "\n")
    monkeypatch.chdir(tmp_path)
    row = DailyDialogDatasetLoader(tokenizer, max_length=128).load()["train"][0]
    learned = tokenizer.decode(np.array(row["input_ids"])[np.array(row["labels"]) != -100])
    assert "Fine" in learned and "Now I go" in learned and "How are you" not in learned


class OwnLoader:
    """The pattern of the framework's section on custom datasets: a tokenizer and a length in, a DatasetDict out."""

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length

    def load(self) -> Any:
        from datasets import Dataset, DatasetDict

        rows = [{"text": f"### Instruction:\nName {i}.\n\n### Response:\nIt is n{i}.<|end|>"} for i in range(24)]
        processed = DatasetDict({"train": Dataset.from_list(rows[:20]), "validation": Dataset.from_list(rows[20:])})
        return processed.map(self._process_example, remove_columns=["text"])

    def _process_example(self, row: dict[str, str]) -> Any:
        found = self.tokenizer(row["text"], max_length=self.max_length, padding="max_length", truncation=True)
        return {**found, "labels": [i if m else -100 for i, m in zip(found["input_ids"], found["attention_mask"], strict=True)]}


def test_a_loader_of_ones_own_trains(tmp_path: Path, tokenizer: Any) -> None:
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    loader = OwnLoader(tokenizer, 64)
    trainer = QuickTrainer("demo", loader, max_steps=2, output_dir=str(tmp_path), listen=lambda event: None)
    assert len(trainer.config.data.train_file or []) == 20 and len(trainer.config.data.eval_file or []) == 4
    result = trainer.train()
    report = json.loads((result.folder.path / "data_report.json").read_text())
    assert report["train"]["format"] == "tokens" and report["masks"]["held_out_examples"] == 4


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"input_ids": [5, 6, 7], "labels": [6, 7, 8]}, "do not shift"),
        ({"input_ids": [5, 6], "labels": [5]}, "equally long"),
        ({"input_ids": ["a"]}, "ids of one text"),
        ({"input_ids": [-5, 3]}, "leave the row out"),
    ],
)
def test_tokens_that_cannot_be_are_refused_with_their_row(row: dict[str, Any], words: str) -> None:
    from llm_finetune_kit.config import DataSection
    from llm_finetune_kit.data import prepare

    with pytest.raises(DataError) as caught:
        prepare.read([{"input_ids": [5, 6, 7]}, row], DataSection())
    assert "rows[1]" in caught.value.where and words in caught.value.fix


def test_data_of_every_python_kind_is_loaded(tmp_path: Path) -> None:
    import pandas
    from datasets import Dataset

    wanted = [dict(row) for row in ALPACA]
    for data in (ALPACA, tuple(ALPACA), iter(ALPACA), pandas.DataFrame(ALPACA), Dataset.from_list(ALPACA)):
        assert load_dataset(data) == wanted


def test_stats_are_the_quality_report() -> None:
    stats = get_dataset_stats([*ALPACA, ALPACA[0]], model="demo")
    assert stats["rows"] == 41 and {"exact_duplicates"} <= {one["kind"] for one in stats["findings"]}
    assert stats["lengths"]["tokens"]["max"] > stats["lengths"]["tokens"]["min"] > 0
