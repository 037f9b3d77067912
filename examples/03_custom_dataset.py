"""Rows that no known format fits, by a loader of your own: python examples/03_custom_dataset.py

Anything with a method `load` will do. It may return rows in any known format (the short way, below), or tokens as a
`datasets.DatasetDict` with `train` and `validation` (the other way), which are then trained as they are.
"""

from typing import Any

from datasets import Dataset, DatasetDict

from llm_finetune_kit import QuickTrainer, load_model

CAPITALS = """
Austria: Vienna; Belgium: Brussels; Denmark: Copenhagen; Egypt: Cairo; Finland: Helsinki; France: Paris; Ghana: Accra
Greece: Athens; Hungary: Budapest; Iceland: Reykjavik; Ireland: Dublin; Italy: Rome; Japan: Tokyo; Kenya: Nairobi
Norway: Oslo; Peru: Lima; Poland: Warsaw; Portugal: Lisbon; Spain: Madrid; Sweden: Stockholm; Turkey: Ankara; Cuba: Havana
"""


def pairs() -> list[list[str]]:
    """Country and capital out of a form that only this file has."""
    return [entry.strip().split(": ") for line in CAPITALS.strip().splitlines() for entry in line.split(";")]


class CapitalRows:
    """The short way: give rows, and the template, the masks, the split and the checks are done for you."""

    def load(self) -> list[dict[str, str]]:
        return [{"prompt": f"What is the capital of {land}?", "response": f"It is {town}."} for land, town in pairs()]


class CustomDatasetLoader:
    """The other way: give tokens. Labels of -100 are not learned; the rest is your responsibility."""

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length

    def load(self) -> DatasetDict:
        rows = Dataset.from_list([{"land": land, "town": town} for land, town in pairs()])
        parts = rows.train_test_split(test_size=4, seed=0)
        processed = parts.map(self._process_example, remove_columns=["land", "town"])
        return DatasetDict({"train": processed["train"], "validation": processed["test"]})

    def _process_example(self, row: dict[str, str]) -> dict[str, list[int]]:
        question = {"role": "user", "content": f"What is the capital of {row['land']}?"}
        answer = {"role": "assistant", "content": f"It is {row['town']}."}
        asked = self.tokenizer.apply_chat_template([question], add_generation_prompt=True, return_dict=False)
        whole = self.tokenizer.apply_chat_template([question, answer], return_dict=False)[: self.max_length]
        return {"input_ids": whole, "labels": [-100] * len(asked) + whole[len(asked) :]}


def main() -> None:
    settings = {"max_steps": 6, "batch_size": 8, "gradient_accumulation_steps": 1, "learning_rate": 3e-3}
    rows = QuickTrainer("demo", CapitalRows(), run_name="capital-rows", **settings)
    rows.train()
    print(rows.ask("What is the capital of France?", max_new_tokens=16))

    _, tokenizer, _ = load_model("demo")
    tokens = QuickTrainer("demo", CustomDatasetLoader(tokenizer, 64), run_name="capital-tokens", compare=False, **settings)
    tokens.train()
    print(tokens.ask("What is the capital of France?", max_new_tokens=16))


if __name__ == "__main__":
    main()
