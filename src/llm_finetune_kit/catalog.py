"""Tables of facts: models known by a short name, sample datasets and the default chat format."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KnownModel:
    """A model that has a short name. `parameters` is the number of weights, tied ones counted once."""

    hub_id: str
    parameters: int
    license: str
    gated: bool = False
    note: str = ""


DEMO = "demo"  # lives in the package: needs no network

# Parameters and licences as their model cards and config files state them.
MODELS: dict[str, KnownModel] = {
    DEMO: KnownModel("", 4_492_032, "CC BY-SA 4.0", note="small model inside the package, for a first try"),
    "smollm2-135m": KnownModel("HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008, "Apache-2.0"),
    "smollm2-360m": KnownModel("HuggingFaceTB/SmolLM2-360M-Instruct", 361_821_120, "Apache-2.0"),
    "gpt2": KnownModel("openai-community/gpt2", 124_439_808, "MIT"),
    "gpt2-medium": KnownModel("openai-community/gpt2-medium", 354_823_168, "MIT"),
    "tinyllama": KnownModel("TinyLlama/TinyLlama-1.1B-Chat-v1.0", 1_100_048_384, "Apache-2.0"),
    "llama-3.2-1b": KnownModel("meta-llama/Llama-3.2-1B-Instruct", 1_235_814_400, "Llama 3.2", gated=True),
    "llama-3.2-3b": KnownModel("meta-llama/Llama-3.2-3B-Instruct", 3_212_749_824, "Llama 3.2", gated=True),
    "qwen2.5-0.5b": KnownModel("Qwen/Qwen2.5-0.5B-Instruct", 494_032_768, "Apache-2.0"),
    "qwen3-0.6b": KnownModel("Qwen/Qwen3-0.6B", 596_049_920, "Apache-2.0"),
    "gemma-2-2b": KnownModel("google/gemma-2-2b-it", 2_614_341_888, "Gemma", gated=True),
    "phi-3-mini": KnownModel("microsoft/Phi-3-mini-4k-instruct", 3_821_079_552, "MIT"),
    "llama-7b": KnownModel("huggyllama/llama-7b", 6_738_415_616, "LLaMA (research only)"),
    "llama-13b": KnownModel("huggyllama/llama-13b", 13_015_864_320, "LLaMA (research only)"),
    "mistral-7b": KnownModel("mistralai/Mistral-7B-Instruct-v0.3", 7_248_023_552, "Apache-2.0", gated=True),
    "llama-3.1-8b": KnownModel("meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248, "Llama 3.1", gated=True),
}

# Other spellings that users of such tools type.
SHORT_NAMES: dict[str, str] = {
    "tinyllama-1.1b": "tinyllama",
    "llama3-8b": "llama-3.1-8b",
    "llama3.1-8b": "llama-3.1-8b",
    "mistral": "mistral-7b",
    "phi3-mini": "phi-3-mini",
    "phi-3": "phi-3-mini",
    "gpt2-small": "gpt2",
}

# Used where a tokenizer brings no chat template. It needs no new special tokens: the section headings are
# those of the Alpaca format and every answer ends with the model's own end-of-text token. Alpaca and Dolly
# rows bring their instruction and input apart, all others only their content.
DEFAULT_TEMPLATE = """\
{{- bos_token if bos_token else '' -}}
{%- for message in messages -%}
{%- if message.role == 'system' -%}
{{ '### System:\\n' + message.content + '\\n\\n' }}
{%- elif message.role == 'user' -%}
{%- if message.input -%}
{{ '### Instruction:\\n' + message.instruction + '\\n\\n### Input:\\n' + message.input + '\\n\\n' }}
{%- else -%}
{{ '### Instruction:\\n' + message.content + '\\n\\n' }}
{%- endif -%}
{%- else -%}
{{ '### Response:\\n' + message.content + eos_token }}
{%- if not loop.last -%}
{{ '\\n\\n' }}
{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '### Response:\\n' }}
{%- endif -%}
"""
