"""The four uses of the LLaMA framework: Alpaca, DailyDialog, both with more of everything, and evaluation.

    python examples/framework.py                 all four, small and offline
    python examples/framework.py alpaca          one of: alpaca, daily_dialog, both, evaluation
    MODEL=huggyllama/llama-7b python examples/framework.py alpaca     the real thing, on a GPU of 12 GB or more

On the small model inside the package they learn from examples/small: rows of our own in files named and shaped as Alpaca and
DailyDialog are (so the licences of those are told). With another MODEL the sets themselves are read, from the folder you are in,
its data/, or the hub.
"""

import os
import sys
from pathlib import Path

from llm_finetune_kit import (
    AlpacaDatasetLoader,
    DataConfig,
    EvaluationConfig,
    EvaluationFramework,
    GenerationSection,
    LLAMATrainer,
    LoRAConfig,
    ModelConfig,
    PerplexityEvaluator,
    QualitativeEvaluator,
    TrainingConfig,
    load_model,
)

MODEL = os.environ.get("MODEL", "demo")
SMALL = MODEL == "demo"
OUTPUTS = str(Path("outputs").resolve())

# What is smaller on the small model; without it the framework's own defaults hold.
FEW_STEPS = {"max_steps": 3, "eval_steps": 3, "logging_steps": 1, "learning_rate": 3e-3}
TRAINING = {"output_dir": OUTPUTS} | (FEW_STEPS if SMALL else {})
ANSWERS = {"max_length": 12, "num_beams": 1} if SMALL else {}


def alpaca() -> None:
    """Instructions, with the framework's defaults: 4 bits, rank 8 on queries and values."""
    trainer = LLAMATrainer(
        model_config=ModelConfig(model_name=MODEL),
        lora_config=LoRAConfig(),
        data_config=DataConfig(dataset_name="alpaca"),
        training_config=TrainingConfig(**TRAINING),
        eval_config=EvaluationConfig(**ANSWERS),
    )
    trainer.train()


def daily_dialog() -> None:
    """Conversations: every second utterance is an answer that is learned."""
    trainer = LLAMATrainer(
        model_config=ModelConfig(model_name=MODEL, use_4bit=not SMALL),
        data_config=DataConfig(dataset_name="daily_dialog", max_length=256),
        training_config=TrainingConfig(**TRAINING),
        eval_config=EvaluationConfig(**ANSWERS),
    )
    trainer.train()
    results = trainer.evaluate(test_prompts=["Is this seat free?"], test_references=["Yes, please sit down."])
    print(f"perplexity {results['perplexity']:.1f}, BLEU {results['bleu']:.3f}, answer: {results['responses'][0]}")


def both() -> None:
    """As many rows of one as of the other, a higher rank on all of attention, scales quantized too, clipped less."""
    trainer = LLAMATrainer(
        model_config=ModelConfig(
            model_name=MODEL if SMALL else "huggyllama/llama-13b", use_4bit=True, bnb_4bit_quant_type="nf4", use_nested_quant=True
        ),
        lora_config=LoRAConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj", "k_proj", "o_proj"]),
        data_config=DataConfig(dataset_name="both"),
        training_config=TrainingConfig(batch_size=2, gradient_accumulation_steps=8, max_grad_norm=1.0, **TRAINING),
        eval_config=EvaluationConfig(**ANSWERS),
    )
    trainer.train()


def evaluation() -> None:
    """A model without any training: perplexity on rows, an answer, and overlap with references."""
    from torch.utils.data import DataLoader
    from transformers import default_data_collator

    model, tokenizer, _ = load_model(MODEL)
    rows = AlpacaDatasetLoader(tokenizer, max_length=128).load()["validation"]
    batches = DataLoader(rows, batch_size=4, collate_fn=default_data_collator)
    print(f"perplexity {PerplexityEvaluator(model, tokenizer).compute_perplexity(batches):.1f}")

    qualitative = QualitativeEvaluator(model, tokenizer)
    print("answer:", qualitative.generate_response(prompt="Name the season after spring.", max_length=16, temperature=0.7))
    references, hypotheses = ["Summer comes after spring."], ["Summer comes after the spring."]
    bleu, rouge = qualitative.compute_bleu(references, hypotheses), qualitative.compute_rouge(references, hypotheses)
    print(f"BLEU {bleu:.3f}, ROUGE {rouge}")

    how = GenerationSection(max_new_tokens=16) if SMALL else None
    framework = EvaluationFramework(model, tokenizer, how)
    print(framework.evaluate(batches, ["How many legs has a spider?"], ["A spider has eight legs."]))


USES = {"alpaca": alpaca, "daily_dialog": daily_dialog, "both": both, "evaluation": evaluation}


def main(names: list[str]) -> None:
    if SMALL:
        os.chdir(Path(__file__).parent / "small")  # the sets are looked for where a program runs
    for name in names or USES:
        print(f"--- {name}", flush=True)
        USES[name]()


if __name__ == "__main__":
    main(sys.argv[1:])
