"""The model card of `final/`: what it is, how it came about, whether it helped, and how to load it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from llm_finetune_kit.catalog import DEMO, MODELS
from llm_finetune_kit.config import RunConfig
from llm_finetune_kit.events import Event
from llm_finetune_kit.report import compared, words
from llm_finetune_kit.report.figures import Pair, before_and_after, caution, evaluations, figures, legible, pairs

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
DATA_FILE = re.compile(r"\.(jsonl?|csv|tsv|txt|parquet|arrow|gz|zip)$", re.IGNORECASE)

NOT_KNOWN = "not known here: see where it comes from"

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

DEMO_SNIPPET = """\
from importlib.resources import files

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder
base = AutoModelForCausalLM.from_pretrained(files("llm_finetune_kit") / "assets" / "demo")  # inside that package
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


@dataclass(frozen=True)
class About:
    """What a card says besides the config and the events: packages by version, and the data's licence where it is known."""

    versions: dict[str, str] = field(default_factory=dict)
    data_licence: str | None = None


def model_card(config: RunConfig, base_name: str, events: list[Event], step: int, about: About = About()) -> str:
    """README.md of the final folder, with the front matter that the hub, peft and transformers read."""
    base = words.name(base_name)
    parts = [
        f"---\n{yaml.safe_dump(_front_matter(config, base_name), sort_keys=False, allow_unicode=True)}---",
        f"# {config.output.run_name or base}",
        _what(config, base),
        "## How it was trained\n\n" + _training(config, base, events, step, about.versions),
        "## Did it help?\n\n" + _evidence(config, events, step),
        _samples([pair for pair in pairs(events, step) if pair.after is not None]),
        "## How to use it\n\n" + _usage(config, base_name),
        "## Licence\n\n" + _licence(config, base_name, about.data_licence),
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


def _training(config: RunConfig, base: str, events: list[Event], step: int, versions: dict[str, str]) -> str:
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
    if versions:
        lines.append("Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    return "\n".join(f"- {line}" for line in lines)


def _method(config: RunConfig) -> str:
    if config.method == "full":
        return "full fine-tuning"
    lora = config.lora
    return f"LoRA, r = {lora.r}, alpha = {lora.alpha}, dropout = {lora.dropout:g}, on {words.value(lora.target_modules)}"


def _evidence(config: RunConfig, events: list[Event], step: int) -> str:
    known, found = before_and_after(events, step), figures(events)
    if "improvement" not in known:
        return "No rows were held out, so there is no measurement of how it does on data it has not seen."
    held_out = evaluations(events)[-1]
    counted = f"{held_out.rows:,} held-out rows ({held_out.target_tokens:,} learned tokens)"
    if found.comparison is not None:
        return _compared(found.comparison, counted) + _and(caution(found))
    rows = [
        ["Loss (nats per token)", words.loss(known["loss_before"]), words.loss(known["loss_after"])],
        ["Perplexity", words.perplexity(known["perplexity_before"]), words.perplexity(known["perplexity_after"])],
    ]
    return f"On {counted}; lower is better.\n\n" + words.markdown_table(["", "Base", "Tuned"], rows) + _and(caution(found))


def _compared(comparison: dict[str, Any], counted: str) -> str:
    """The comparison at the end of the run, with its intervals."""
    rows = comparison["rows"]
    head = [compared.HEAD[0], "n", *compared.HEAD[1:-1], "outcome"]
    counts = [str(one["rows"]) for one in comparison["metrics"]] + [str(comparison["general"]["texts"])]
    lines = [[line[0], count, *line[1:]] for line, count in zip(compared.table(comparison), counts, strict=True)]
    parts = [
        f"**{words.markdown_cell(comparison['sentence'])}**",
        words.markdown_cell(comparison["general"]["sentence"]),
        words.markdown_table(head, [[words.markdown_cell(cell) for cell in line] for line in lines]),
        f"Measured on {counted}; {rows['answered']:,} of {rows['of']:,} prompts were answered by both. "
        f"Loss, perplexity, bits per byte and repetition: lower is better. Intervals: {comparison['interval']['method']}, "
        f"seed {comparison['interval']['seed']}.",
    ]
    return "\n\n".join(parts)


def _and(text: str) -> str:
    return f"\n\n{text}" if text else ""


def _samples(found: list[Pair]) -> str:
    if not found:
        return ""
    rows = [[words.markdown_cell(text or "") for text in (pair.prompt, pair.before, pair.after)] for pair in found]
    return "## Sample answers\n\n" + words.markdown_table(["Prompt", "Base", "Tuned"], rows)


def loading_code(method: str, base_name: str) -> str:
    """Python that loads `final/` with transformers (and PEFT) alone, in that folder, and asks it something."""
    adapter = ADAPTER_SNIPPET if HUB_ID.fullmatch(base_name) else DEMO_SNIPPET if base_name == DEMO else LOCAL_ADAPTER_SNIPPET
    load = adapter if method == "lora" else FULL_SNIPPET
    return load.replace("{base}", words.name(base_name)) + USE_SNIPPET


def _usage(config: RunConfig, base_name: str) -> str:
    return (
        f"```python\n{loading_code(config.method, base_name)}\n```\n\nOr without any code:\n\n"
        '```bash\nfinetune generate --model path/to/this/folder --prompt "Your question"\n```'
    )


def base_licence(base_name: str) -> str:
    """The licence of a known base model in words, or nothing."""
    known = (model for name, model in MODELS.items() if base_name in (name, model.hub_id))
    return next((model.terms for model in known), "")


def data_licence(name: str, known: str | None) -> str:
    """The licence of a data set in words, or nothing; the sample sets are part of this package."""
    return known or ("MIT, as this package" if name.startswith("sample:") else "")


def _licence(config: RunConfig, base_name: str, licence: str | None) -> str:
    base, data = words.name(base_name), words.value(config.data.train_file)
    known = base_licence(base_name) or "not known here: see its card"
    theirs = words.markdown_cell(data_licence(data, licence)) if data_licence(data, licence) else NOT_KNOWN
    return (
        "These weights come from both, so the terms of both apply.\n\n"
        f"- Base model `{base}`: licence {known}\n- Data `{data}`: licence {theirs}"
    )
