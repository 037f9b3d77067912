"""The model card of `final/`: what it is, how it came about, whether it helped, and how to load it."""

from __future__ import annotations

import re
from typing import Any

import yaml

from llm_finetune_kit.catalog import MODELS
from llm_finetune_kit.config import RunConfig
from llm_finetune_kit.events import Event
from llm_finetune_kit.report import words
from llm_finetune_kit.report.figures import Pair, before_and_after, caution, evaluations, figures, legible, pairs

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
DATA_FILE = re.compile(r"\.(jsonl?|csv|tsv|txt|parquet|arrow|gz|zip)$", re.IGNORECASE)

ADAPTER_SNIPPET = """\
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

folder = "."  # this folder; the base model {base} is fetched beside it
model = AutoPeftModelForCausalLM.from_pretrained(folder)"""

LOCAL_ADAPTER_SNIPPET = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder
base = AutoModelForCausalLM.from_pretrained("path/to/{base}")  # the base was a local folder
model = PeftModel.from_pretrained(base, folder)"""

FULL_SNIPPET = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder
model = AutoModelForCausalLM.from_pretrained(folder)"""

USE_SNIPPET = """
tokenizer = AutoTokenizer.from_pretrained(folder)
question = [{"role": "user", "content": "Your question"}]
inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**inputs, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))"""


def model_card(config: RunConfig, base_name: str, events: list[Event], step: int) -> str:
    """README.md of the final folder, with the front matter that the hub, peft and transformers read."""
    base = words.name(base_name)
    parts = [
        f"---\n{yaml.safe_dump(_front_matter(config, base_name), sort_keys=False, allow_unicode=True)}---",
        f"# {config.output.run_name or base}",
        _what(config, base),
        "## How it was trained\n\n" + _training(config, base, events, step),
        "## Did it help?\n\n" + _evidence(config, events, step),
        _samples([pair for pair in pairs(events, step) if pair.after is not None]),
        "## How to use it\n\n" + _usage(config, base_name),
        "## Licence\n\n" + _licence(base_name),
    ]
    return legible("\n\n".join(part for part in parts if part)) + "\n"


def _front_matter(config: RunConfig, base_name: str) -> dict[str, Any]:
    adapter = config.method == "lora"
    tree: dict[str, Any] = {}
    tags = ["llm-finetune-kit", *(["lora"] if adapter else [])]
    if HUB_ID.fullmatch(base_name):
        tree["base_model"] = base_name
        tags.insert(0, f"base_model:{'adapter' if adapter else 'finetune'}:{base_name}")
    data = config.data.train_file
    if isinstance(data, str) and HUB_ID.fullmatch(data) and not DATA_FILE.search(data):
        tree["datasets"] = [data]
    return tree | {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": tags,
    }


def _what(config: RunConfig, base: str) -> str:
    if config.method == "lora":
        return f"A LoRA adapter for **{base}**: small matrices added to its frozen weights. It needs the base model."
    return f"**{base}**, with all of its weights fine-tuned. It stands on its own."


def _training(config: RunConfig, base: str, events: list[Event], step: int) -> str:
    found, training = figures(events), config.training
    data = config.data.train_file
    learned = "the answers" if config.data.loss_on == "answers" else "all text"
    lines = [
        f"Base model: `{base}`" + (f", revision `{config.model.revision}`" if config.model.revision else ""),
        f"Data: `{words.value(data)}`, learning {learned}",
        f"Method: {_method(config)}",
        f"Steps: {found.last_step}, of {training.batch_size * training.gradient_accumulation_steps} examples each; "
        f"these are the weights of step {step}",
        f"Learning rate: {words.value(training.learning_rate)}, {training.schedule} schedule, AdamW",
        f"Seed: {training.seed}",
        f"Number format: {config.model.dtype or 'float32'}; trained weights in float32",
        f"Time: {words.duration(found.seconds)} for {found.tokens:,} tokens",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _method(config: RunConfig) -> str:
    if config.method == "full":
        return "full fine-tuning"
    lora = config.lora
    return f"LoRA, r = {lora.r}, alpha = {lora.alpha}, dropout = {lora.dropout:g}, on {words.value(lora.target_modules)}"


def _evidence(config: RunConfig, events: list[Event], step: int) -> str:
    compared = before_and_after(events, step)
    if "improvement" not in compared:
        return "No rows were held out, so there is no measurement of how it does on data it has not seen."
    rows = [
        ["Loss (nats per token)", words.loss(compared["loss_before"]), words.loss(compared["loss_after"])],
        ["Perplexity", words.perplexity(compared["perplexity_before"]), words.perplexity(compared["perplexity_after"])],
    ]
    held_out = evaluations(events)[-1]
    text = f"On {held_out.rows:,} held-out rows ({held_out.target_tokens:,} learned tokens); lower is better.\n\n"
    return text + words.markdown_table(["", "Base", "Tuned"], rows) + _and(caution(figures(events)))


def _and(text: str) -> str:
    return f"\n\n{text}" if text else ""


def _samples(found: list[Pair]) -> str:
    if not found:
        return ""
    rows = [[words.markdown_cell(text or "") for text in (pair.prompt, pair.before, pair.after)] for pair in found]
    return "## Sample answers\n\n" + words.markdown_table(["Prompt", "Base", "Tuned"], rows)


def _usage(config: RunConfig, base_name: str) -> str:
    adapter = ADAPTER_SNIPPET if HUB_ID.fullmatch(base_name) else LOCAL_ADAPTER_SNIPPET
    load = adapter if config.method == "lora" else FULL_SNIPPET
    code = load.replace("{base}", words.name(base_name)) + USE_SNIPPET
    return (
        f"```python\n{code}\n```\n\nOr without any code:\n\n"
        '```bash\nfinetune generate --model path/to/this/folder --prompt "Your question"\n```'
    )


def _licence(base_name: str) -> str:
    known = next((model.terms for model in MODELS.values() if model.hub_id and model.hub_id == base_name), "")
    return "The base model's licence" + (f" ({known})" if known else "") + " and the data's licence apply."
