"""The whole pipeline, from rows to an evaluated model on the disk; also as a script: python tests/test_integration.py."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # as a script it needs no installed package

from llm_finetune_kit import SimpleTrainer, calculate_perplexity, evaluate_model, load_dataset, load_model, prepare_dataset
from llm_finetune_kit.events import Event, Stepped

WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
EXAMPLES = [{"prompt": f"Say {word}.", "response": f"The word is {word}, as you said."} for word in WORDS] * 3


def test_load_train_save_evaluate(tmp_path: Path) -> None:
    """30 examples (10 patterns, 3 times each), 10 steps: the loss falls, and the saved model is the trained one."""
    model, tokenizer, facts = load_model("demo")
    assert facts.parameters == 4_492_032
    dataset = load_dataset(EXAMPLES)
    prepared = prepare_dataset(dataset, tokenizer)
    assert len(dataset) == len(prepared) == 30
    told: list[Event] = []
    trainer = SimpleTrainer(
        model,
        tokenizer,
        prepared,
        max_steps=10,
        batch_size=8,
        gradient_accumulation_steps=1,
        learning_rate=3e-3,
        early_stopping_patience=10,
        compare=False,
        output_dir=str(tmp_path),
        listen=told.append,
    )
    trainer.train()
    losses = [event.loss for event in told if isinstance(event, Stepped)]
    assert len(losses) == 10 and losses[-1] < 0.5 * losses[0]
    saved = trainer.save(tmp_path / "saved")
    assert (saved / "adapter_model.safetensors").is_file()
    before, after = (calculate_perplexity(name, data=EXAMPLES) for name in ("demo", str(saved)))
    assert after < 0.5 * before
    answer = evaluate_model(trainer.model, tokenizer, ["Say four."])["responses"][0]["response"]
    assert answer.startswith("The word is")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        test_load_train_save_evaluate(Path(folder))
    print("the whole pipeline works: loaded, prepared, trained, saved, evaluated")
