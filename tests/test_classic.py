"""The loaders of the LLaMA framework, a loader of one's own, and rows that are tokenized already."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_finetune_kit import (
    AlpacaDatasetLoader,
    DailyDialogDatasetLoader,
    DataConfig,
    EvaluationConfig,
    LLAMATrainer,
    LoRAConfig,
    ModelConfig,
    QuickTrainer,
    TrainingConfig,
    get_dataset_stats,
    load_dataset,
)
from llm_finetune_kit.errors import ConfigError, DataError
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


@pytest.fixture(scope="module")
def framework(tmp_path_factory: pytest.TempPathFactory) -> LLAMATrainer:
    """The call that the framework's documents show, on the embedded model."""
    data = DataConfig(dataset_name=ALPACA, max_length=128)
    out = str(tmp_path_factory.mktemp("framework"))
    trainer = LLAMATrainer(
        model_config=ModelConfig(model_name="demo", use_4bit=True, use_nested_quant=True),
        lora_config=LoRAConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj", "k_proj", "o_proj"]),
        data_config=data,
        training_config=TrainingConfig(output_dir=out, max_steps=2, logging_steps=1),
        eval_config=EvaluationConfig(max_length=8, num_beams=2),
        listen=lambda event: None,
    )
    trainer.train()
    return trainer


def test_the_frameworks_configurations_set_the_knobs_that_they_name(framework: LLAMATrainer) -> None:
    config = framework.config
    assert config.model.quantization == "nf4" and config.model.double_quantization and config.model.max_length == 128
    assert config.lora.r == 16 and config.lora.alpha == 32 and config.lora.dropout == 0.05
    assert config.lora.target_modules == ["q_proj", "v_proj", "k_proj", "o_proj"]
    assert (config.training.max_grad_norm, config.training.warmup_ratio, config.training.learning_rate) == (0.3, 0.03, 2e-4)
    how = config.evaluation.generation
    assert (how.max_new_tokens, how.num_beams, how.temperature, how.top_p) == (8, 2, 0.7, 0.9)
    assert json.loads((framework.result.folder.path / "resolved.json").read_text())["config"]["model"]["quantization"] == "nf4"


def test_the_frameworks_trainer_evaluates_what_it_trained(framework: LLAMATrainer) -> None:
    found = framework.evaluate(test_prompts=["Say the word number 3."], test_references=["The word is w3."])
    held_out = json.loads((framework.result.folder.path / "data_report.json").read_text())["masks"]["held_out_examples"]
    assert found["perplexity"] > 1 and found["rows"] == held_out and len(found["responses"]) == 1
    assert 0 <= found["bleu"] <= 1 and set(found["rouge"]) == {"rouge1", "rouge2", "rougeL"}
    assert framework.loss_history[0][0] == 1 and len(framework.loss_history) == 2
    assert framework.evaluate() == {key: found[key] for key in framework.evaluate()}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LLAMATrainer(ModelConfig("demo")).evaluate(), "nothing is trained yet"),
        (lambda: LLAMATrainer(lora_config=LoRAConfig(task_type="SEQ_CLS")), "only causal language models"),
        (lambda: LLAMATrainer(ModelConfig("demo", bnb_4bit_quant_type="nf5")), "model.quantization is 'nf5'"),
    ],
)
def test_what_the_framework_cannot_do_is_told(make: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()


def test_4_bits_that_are_off_are_off() -> None:
    trainer = LLAMATrainer(ModelConfig("demo", use_4bit=False), data_config=DataConfig("sample:chat"))
    assert trainer.config.model.quantization is None
    assert QuickTrainer("demo", "sample:chat", use_4bit=True, bnb_4bit_quant_type="fp4").config.model.quantization == "fp4"
