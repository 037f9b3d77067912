"""Metrics of your own, as a function or as a class: python examples/04_custom_metric.py

Each gets all answers and all reference answers, and returns one number. They stand beside the metrics of the package.
"""

import re
from collections.abc import Sequence

from llm_finetune_kit import compare_models, evaluate_model, load_dataset

PROMPTS = 4


def asks_back(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of answers that end with the question of the house style."""
    return sum(text.rstrip().endswith("Is there anything else I can help you with?") for text in predictions) / len(predictions)


class CustomEvaluator:
    """Share of the numbered steps of the reference that the answer has, too."""

    def compute_metric(self, predictions: Sequence[str], references: Sequence[str]) -> float:
        scores = []
        for prediction, reference in zip(predictions, references, strict=True):
            wanted = len(re.findall(r"^\d+\. ", reference, re.M))
            given = len(re.findall(r"^\d+\. ", prediction, re.M))
            scores.append(min(given, wanted) / wanted if wanted else 1.0)
        return sum(scores) / len(scores)


def main(tuned: str = "outputs/quickstart") -> None:
    rows = load_dataset("sample:chat")[:PROMPTS]
    prompts, references = [row["prompt"] for row in rows], [row["response"] for row in rows]

    # One model: answers and metrics.
    found = evaluate_model("demo", prompts=prompts, references=references, metrics=["rougeL", asks_back, CustomEvaluator()])
    for name, value in found["metrics"].items():
        print(f"{name:<20} {value:.3f}")

    # Base against tuned, with intervals. Run 01_quickstart.py first: it makes the tuned model. Its run held out four rows only:
    # too few to show anything about answers that are right or wrong, however clear it looks.
    compared = compare_models(tuned, metrics=["rougeL", asks_back, CustomEvaluator()], rows=PROMPTS)
    print(compared["sentence"])
    for one in compared["metrics"]:
        shown = one["outcome"] if one["outcome"] in ("better", "worse") else "no difference shown"
        print(f"{one['label']:<20} {one['base']:.3f} to {one['tuned']:.3f}  {shown}")


if __name__ == "__main__":
    main()
