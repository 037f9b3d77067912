"""R1's functions of evaluation, and the evaluators of R3 and R4: the documents' lines run as they stand."""

from __future__ import annotations

from typing import Any

import pytest
import sacrebleu
import torch

from llm_finetune_kit import (
    EvaluationFramework,
    PerplexityEvaluator,
    QualitativeEvaluator,
    benchmark_speed,
    calculate_perplexity,
    evaluate_model,
    load_model,
)
from llm_finetune_kit.config import GenerationSection
from llm_finetune_kit.errors import KitError
from test_metrics import CustomEvaluator

TEXTS = ["The cat sat on the mat and looked at the rain.", "Bread is made of flour, water and salt."]
FEW = GenerationSection(max_new_tokens=6)

# Section 6.3 of the framework's specification, word for word.
SECTION_6_3 = """
# Perplexity
evaluator = PerplexityEvaluator(model, tokenizer)
ppl = evaluator.compute_perplexity(dataloader)

# Generation
qualitative = QualitativeEvaluator(model, tokenizer)
response = qualitative.generate_response(
    prompt=text,
    max_length=256,
    temperature=0.7
)

# BLEU/ROUGE
bleu = qualitative.compute_bleu(references, hypotheses)
rouge = qualitative.compute_rouge(references, hypotheses)
"""


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    model, tokenizer, _ = load_model("demo", dtype="float32")
    return model, tokenizer


def batches(tokenizer: Any, side: str, size: int) -> list[dict[str, torch.Tensor]]:
    """Padded batches as a DataLoader gives them, labels as the specification has them: the ids themselves."""
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    found = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        width = max(map(len, part)) + 3
        pads = [[0] * (width - len(row)) for row in part]
        ids = [pad + row if side == "left" else row + pad for pad, row in zip(pads, part, strict=True)]
        mask = [pad + [1] * len(row) if side == "left" else [1] * len(row) + pad for pad, row in zip(pads, part, strict=True)]
        found.append({"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask), "labels": torch.tensor(ids)})
    return found


def test_the_evaluation_api_of_the_specification_runs_as_it_stands(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    names: dict[str, Any] = {
        "PerplexityEvaluator": PerplexityEvaluator,
        "QualitativeEvaluator": QualitativeEvaluator,
        "model": model,
        "tokenizer": tokenizer,
        "dataloader": batches(tokenizer, "right", 2),
        "text": "How do I reset my password?",
        "references": ["the cat is on the mat", "a dog ran home"],
        "hypotheses": ["the cat sat on the mat", "a dog ran away"],
    }
    exec(SECTION_6_3.replace("max_length=256", "max_length=6"), names)  # the same lines, made short
    assert names["ppl"] > 1 and names["response"]
    assert names["bleu"] == pytest.approx(sacrebleu.corpus_bleu(names["hypotheses"], [names["references"]]).score / 100)
    assert names["rouge"].keys() == {"rouge1", "rouge2", "rougeL"} and 0.5 < names["rouge"]["rouge1"] < 1


def test_perplexity_counts_tokens_alike_whatever_the_batches(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    evaluator = PerplexityEvaluator(model, tokenizer)
    found = [evaluator.compute_perplexity(batches(tokenizer, side, size)) for side in ("left", "right") for size in (1, 2)]
    assert found == pytest.approx([found[0]] * 4, rel=1e-6)
    losses, count = 0.0, 0
    for text in TEXTS:  # transformers' own loss, weighted by tokens
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            losses += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert found[0] == pytest.approx(float(torch.tensor(losses / count).exp()), rel=1e-5)


def test_labels_say_what_counts(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    (batch,) = batches(tokenizer, "right", 2)
    masked = batch | {"labels": batch["labels"].clone()}
    masked["labels"][:, :5] = -100
    evaluator = PerplexityEvaluator(model, tokenizer)
    assert evaluator.compute_perplexity([masked]) != pytest.approx(evaluator.compute_perplexity([batch]), rel=1e-3)


def test_the_framework_is_both_evaluators_and_ones_own(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    framework = EvaluationFramework(model, tokenizer, how=FEW, metrics=[CustomEvaluator()])
    found = framework.evaluate(batches(tokenizer, "right", 2), ["Hello?", "Where is it?"], ["Hi!", "Here."])
    assert set(found) == {"perplexity", "responses", "bleu", "rouge", "CustomEvaluator"}
    assert len(found["responses"]) == 2 and found["CustomEvaluator"] == 0.0
    assert framework.evaluate() == {}


def test_evaluate_model_answers_prompts_and_measures_data(loaded: tuple[Any, Any]) -> None:
    found = evaluate_model(*loaded, ["Hello?", "Where is my order?"], how=FEW)
    assert [one["prompt"] for one in found["responses"]] == ["Hello?", "Where is my order?"]
    assert set(found["metrics"]) == {"length", "stop_rate", "repetition", "distinct_2"}
    asked = {"references": ["Hi!", "In the Orders page."], "data": "sample:chat", "metrics": ["bleu", CustomEvaluator()]}
    found = evaluate_model("demo", prompts=["Hello?", "Where is my order?"], how=FEW, **asked)
    assert set(found["metrics"]) == {"bleu", "CustomEvaluator"} and "sacreBLEU" in found["signatures"]["bleu"]
    assert found["perplexity"] > 1 and found["rows"] == 20
    with pytest.raises(KitError, match="2 prompts and 1 references"):
        evaluate_model(*loaded, ["a", "b"], references=["c"])


def test_calculate_perplexity_takes_texts_rows_and_names(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    found = calculate_perplexity(model, tokenizer, TEXTS)
    assert found > 1 and found.rows == 2 and found.bits_per_byte > 0
    assert float(found) == pytest.approx(float(torch.tensor(found.loss).exp()), rel=1e-6)
    by_name = calculate_perplexity("demo", data="sample:chat")
    assert by_name.rows == 20
    with pytest.raises(KitError, match="no data to measure on"):
        calculate_perplexity(model, tokenizer)
    with pytest.raises(KitError, match="without its tokenizer"):
        calculate_perplexity(model, data=TEXTS)


def test_benchmark_speed_tells_reading_from_writing(loaded: tuple[Any, Any]) -> None:
    found = benchmark_speed(*loaded, prompt_tokens=64, new_tokens=6, batch_size=2, repeats=1)
    assert found["prefill_tokens_per_second"] == pytest.approx(2 * 64 / found["seconds_to_first_token"])
    assert found["decode_tokens_per_second"] == pytest.approx(2 / found["seconds_per_token"])
    assert found["prefill_tokens_per_second"] > found["decode_tokens_per_second"], "tokens of a prompt are read together"
    assert (found["device"], found["dtype"]) == ("cpu", "float32")
    with pytest.raises(KitError, match="repeats is 0"):
        benchmark_speed(*loaded, repeats=0)


def test_the_general_framework_defaults_are_those_of_the_specification(loaded: tuple[Any, Any]) -> None:
    how = EvaluationFramework(*loaded).how
    assert (how.max_new_tokens, how.num_beams, how.temperature, how.top_p) == (256, 4, 0.7, 0.9)
