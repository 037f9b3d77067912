"""The class names of the LLaMA framework: thin shapes over the one engine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from llm_finetune_kit.classic_config import DataConfig, EvaluationConfig, LoRAConfig, ModelConfig, TrainingConfig
from llm_finetune_kit.config import DataSection, GenerationSection
from llm_finetune_kit.events import Listen
from llm_finetune_kit.settings import load_config
from llm_finetune_kit.trainers import Trainer, as_knobs

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
    """Instruction, input and output: `alpaca_data.json` here or in data/, else the hub's copy (CC BY-NC 4.0).

    >>> _, tokenizer, _ = load_model("demo")
    >>> rows = [{"instruction": f"Say {n}.", "input": "", "output": f"It is {n}."} for n in range(20)]
    >>> AlpacaDatasetLoader(tokenizer, max_length=64, data=rows).load()["train"].column_names
    ['input_ids', 'attention_mask', 'labels']
    """

    data = "alpaca"


class DailyDialogDatasetLoader(DatasetLoader):
    """Conversations: `dialogues_text.txt` or a folder daily_dialog here, else the hub's copy (CC BY-NC-SA 4.0).

    >>> _, tokenizer, _ = load_model("demo")
    >>> rows = [{"dialog": [f"Hello, {n}.", "How are you?"]} for n in range(20)]
    >>> sorted(DailyDialogDatasetLoader(tokenizer, max_length=64, data=rows).load())
    ['train', 'validation']
    """

    data = "daily_dialog"


class LLAMATrainer(Trainer):
    """The framework's trainer: its five configurations make one run of the engine.

    >>> trainer = LLAMATrainer(ModelConfig("demo"), data_config=DataConfig("sample:chat"))
    >>> trainer.config.model.name, trainer.config.lora.r
    ('demo', 8)
    """

    def __init__(
        self,
        model_config: ModelConfig | None = None,
        lora_config: LoRAConfig | None = None,
        data_config: DataConfig | None = None,
        training_config: TrainingConfig | None = None,
        eval_config: EvaluationConfig | None = None,
        *,
        listen: Listen | None = None,
    ) -> None:
        data = data_config or DataConfig()
        parts = (
            model_config or ModelConfig(),
            lora_config or LoRAConfig(),
            data,
            training_config or TrainingConfig(),
            eval_config or EvaluationConfig(),
        )
        values = {name: value for part in parts for name, value in part.values().items()}
        values.pop("data.dataset_name")
        super().__init__(load_config(values=values | as_knobs(data.dataset_name))[0], listen)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the tuned model, once it is trained."""
        return self._trained("tokenizer").chat.tokenizer

    def evaluate(self, test_prompts: Sequence[str] | None = None, test_references: Sequence[str] | None = None) -> dict[str, Any]:
        """The tuned model's `perplexity` on the held-out rows of its run; its `responses` to prompts, and `bleu` and
        `rouge` of them against references (see `EvaluationFramework`).
        """
        from llm_finetune_kit.beginning import material_of
        from llm_finetune_kit.evaluation.perplexity import figures

        result = self._trained("evaluate")
        held_out = material_of(result.folder).held_out
        found = {} if held_out is None else figures(result.objective, held_out, result.chat)
        how = self.config.evaluation.generation
        return found | EvaluationFramework(result.model, self.tokenizer, how).evaluate(None, test_prompts, test_references)


class PerplexityEvaluator:
    """Perplexity of a loaded model on batches of tokens.

    >>> model, tokenizer, _ = load_model("demo")
    >>> batches = [tokenizer(["The cat sat on the mat."], return_tensors="pt")]
    >>> PerplexityEvaluator(model, tokenizer).compute_perplexity(batches) > 1
    True
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer

    def compute_perplexity(self, dataloader: Iterable[Any]) -> float:
        """exp of the mean loss over all target tokens of all batches, each token alike.

        A batch holds `input_ids` [rows, length], and perhaps `attention_mask` and `labels` (-100: not counted).
        """
        from llm_finetune_kit.data import prepare
        from llm_finetune_kit.evaluation.perplexity import figures
        from llm_finetune_kit.opening import opened

        rows = [row for batch in dataloader for row in _rows(batch)]
        ready, own = prepare.read(rows, DataSection()).ready, opened(self.model, self.tokenizer)
        return figures(own.objective, ready, own.chat)["perplexity"]  # type: ignore[arg-type]


class QualitativeEvaluator:
    """Answers of a loaded model, and how much of reference answers is in them.

    >>> model, tokenizer, _ = load_model("demo")
    >>> QualitativeEvaluator(model, tokenizer).compute_bleu(["the cat sat on the mat"], ["the cat sat on the mat"])
    1.0
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer

    def generate_response(
        self,
        prompt: str,
        max_length: int = 256,
        temperature: float = 0.7,
        top_p: float = 0.9,
        num_beams: int = 4,
        seed: int = 0,
    ) -> str:
        """The answer to a prompt, asked in the tokenizer's template; `max_length` counts new tokens."""
        how = GenerationSection(max_new_tokens=max_length, temperature=temperature, top_p=top_p, num_beams=num_beams)
        return self.generate_responses([prompt], how, seed)[0]

    def generate_responses(self, prompts: Sequence[str], how: GenerationSection, seed: int = 0) -> list[str]:
        """The answers to many prompts, computed together."""
        from llm_finetune_kit.api_evaluate import evaluate_model

        found = evaluate_model(self.model, self.tokenizer, prompts, how=how, seed=seed, metrics=[])
        return [one["response"] for one in found["responses"]]

    def compute_bleu(self, references: Sequence[str], hypotheses: Sequence[str]) -> float:
        """sacreBLEU's corpus BLEU, 0 to 1."""
        from llm_finetune_kit.evaluation.overlap import bleu_rows, bleu_total

        return float(bleu_total(bleu_rows(list(hypotheses), list(references)).sum(0)))

    def compute_rouge(self, references: Sequence[str], hypotheses: Sequence[str]) -> dict[str, float]:
        """Mean F1 of rouge1, rouge2 and rougeL by rouge-score, 0 to 1."""
        from llm_finetune_kit.evaluation.overlap import ROUGE, rouge_rows

        means = rouge_rows(list(hypotheses), list(references)).mean(0)
        return dict(zip(ROUGE, means.tolist(), strict=True))


class EvaluationFramework:
    """Both evaluators behind one call; `metrics` may hold evaluators of one's own with a method `compute_metric`.

    >>> model, tokenizer, _ = load_model("demo")
    >>> how = GenerationSection(max_new_tokens=4)
    >>> found = EvaluationFramework(model, tokenizer, how).evaluate(test_prompts=["Say hello."], test_references=["Hello."])
    >>> sorted(found)
    ['bleu', 'responses', 'rouge']
    """

    def __init__(self, model: Any, tokenizer: Any, how: GenerationSection | None = None, metrics: Sequence[Any] = ()) -> None:
        self.perplexity = PerplexityEvaluator(model, tokenizer)
        self.qualitative = QualitativeEvaluator(model, tokenizer)
        self.how = how or GenerationSection(max_new_tokens=256, num_beams=4, temperature=0.7, top_p=0.9)
        self.metrics = metrics

    def evaluate(
        self,
        dataloader: Iterable[Any] | None = None,
        test_prompts: Sequence[str] | None = None,
        test_references: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        """`perplexity` on the batches; `responses` to the prompts; `bleu`, `rouge` and own metrics against references."""
        found: dict[str, Any] = {}
        if dataloader is not None:
            found["perplexity"] = self.perplexity.compute_perplexity(dataloader)
        if test_prompts:
            found["responses"] = said = self.qualitative.generate_responses(test_prompts, self.how)
            if test_references:
                found["bleu"] = self.qualitative.compute_bleu(test_references, said)
                found["rouge"] = self.qualitative.compute_rouge(test_references, said)
                own = {type(one).__name__: one.compute_metric(said, list(test_references)) for one in self.metrics}
                found |= {name: float(value) for name, value in own.items()}
        return found


def _rows(batch: Any) -> Iterable[dict[str, Any]]:
    """The rows of a batch as lists of whole numbers."""
    names = [name for name in ("input_ids", "attention_mask", "labels") if name in batch]
    columns = [part.tolist() if hasattr(part, "tolist") else part for part in (batch[name] for name in names)]
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
