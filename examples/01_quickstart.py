"""From nothing to a tuned model and the proof that it helped: python examples/01_quickstart.py

Runs on the small model inside the package. For a real one set MODEL to "gpt2", "tinyllama" or any hub id.
"""

from llm_finetune_kit import QuickTrainer, estimate_training_time, generate

MODEL, DATA, STEPS = "demo", "sample:chat", 8
QUESTION = "How can I reset my password?"


def main() -> None:
    # 1. What will it take? Nothing is loaded or downloaded for this.
    estimate = estimate_training_time(MODEL, DATA, max_steps=STEPS)
    print(f"{estimate['steps']} steps, about {estimate['time']['total']:.0f} s and {estimate['peak_memory'] / 1e9:.1f} GB\n")

    # 2. The model as it is.
    print("before:", generate(MODEL, QUESTION), "\n")

    # 3. Train. What you leave out is decided by the plan, which gives its reasons.
    #    The high learning rate suits this tiny model; leave it out for larger ones.
    trainer = QuickTrainer(
        MODEL, DATA, max_steps=STEPS, batch_size=8, gradient_accumulation_steps=1, learning_rate=3e-3, run_name="quickstart"
    )
    result = trainer.train()

    # 4. Did it help? Base and tuned were compared on rows that were held out.
    print("after:", trainer.ask(QUESTION), "\n")
    print(result.comparison["sentence"])
    print("report:", result.folder.path / "report.html")


if __name__ == "__main__":
    main()
