"""Every step by itself, with a look at what it gives: python examples/02_step_by_step.py"""

from pathlib import Path

from llm_finetune_kit import (
    SimpleTrainer,
    calculate_perplexity,
    evaluate_model,
    get_dataset_stats,
    load_dataset,
    load_model,
    prepare_dataset,
)

ROWS = Path(__file__).parents[1] / "data" / "train.json"
HELD_OUT = Path(__file__).parents[1] / "data" / "eval.json"


def main() -> None:
    # 1. A model and its tokenizer, in the number format that this machine is fast in.
    model, tokenizer, facts = load_model("demo")
    print(f"{facts.name}: {facts.parameters:,} weights in {facts.dtype}")

    # 2. Rows. The format is detected; faults are told with their line.
    dataset = load_dataset(str(ROWS))
    print(dataset)

    # 3. Are they any good? Duplicates, cut answers, rows that stand in the held-out file…
    stats = get_dataset_stats(dataset, eval_dataset=str(HELD_OUT))
    print(f"{stats['rows']} rows, findings: {[found['kind'] for found in stats['findings']] or 'none'}")

    # 4. Tokens and masks: only the answers are learned.
    prepared = prepare_dataset(dataset, tokenizer)
    print(f"{len(prepared)} examples, {int(prepared.tokens.targets.sum()):,} of {len(prepared.tokens.ids):,} tokens are learned")

    # 5. Train, and keep a copy of the adapter.
    before = calculate_perplexity(model, tokenizer, str(HELD_OUT))
    trainer = SimpleTrainer(
        model, tokenizer, prepared, max_steps=6, batch_size=8, gradient_accumulation_steps=1, learning_rate=2e-3
    )
    trainer.train()
    print("saved in", trainer.save())

    # 6. Measure it on rows that had no part in any of this.
    after = calculate_perplexity(trainer.model, tokenizer, str(HELD_OUT))
    print(f"perplexity of {after.rows} held-out answers: {before:.1f} before, {after:.1f} after")
    answers = evaluate_model(trainer.model, tokenizer, ["Explain what a database index does"])
    print(answers["responses"][0]["response"])


if __name__ == "__main__":
    main()
