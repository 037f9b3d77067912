"""Tables of facts: models known by a short name, with the sizes that decide what they need, and the default chat format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

DEMO = "demo"  # lives in the package: needs no network


@dataclass(frozen=True)
class Guidance:
    """GPU memory for fine-tuning with adapters, in GB, and whether it takes quantization to get there."""

    minimum_gb: int
    recommended_gb: int
    quantization: Literal["optional", "required"]


# By size: up to so many weights. A rule of thumb; the plan reckons from the model's real sizes.
GUIDANCE: tuple[tuple[float, Guidance], ...] = (
    (1e9, Guidance(4, 8, "optional")),
    (5e9, Guidance(8, 16, "optional")),
    (7.8e9, Guidance(12, 24, "required")),
    (10e9, Guidance(16, 24, "required")),
    (float("inf"), Guidance(16, 40, "required")),
)


@dataclass(frozen=True)
class KnownModel:
    """A model that has a short name. `parameters` is the number of weights, tied ones counted once."""

    hub_id: str
    parameters: int
    license: str
    template: str  # family of its chat template; `default` where its tokenizer brings none
    gated: bool = False
    lora_r: int = 16
    commercial: bool = True  # False where the licence forbids commercial use
    note: str = ""

    @property
    def terms(self) -> str:
        """The licence in words."""
        return self.license if self.commercial else f"{self.license}, not for commercial use"

    @property
    def memory(self) -> Guidance:
        return next(guidance for most, guidance in GUIDANCE if self.parameters <= most)


COPY = "a third party's copy, whose card names no licence of its own; Meta released LLaMA for research only"

# Parameters and licences as the model cards state them (the licences as other projects quote those cards, in November 2026),
# sizes as their config files do.
MODELS: dict[str, KnownModel] = {
    DEMO: KnownModel("", 4_492_032, "CC BY-SA 4.0", "default", note="small model inside the package, for a first try"),
    "smollm2-135m": KnownModel("HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008, "Apache-2.0", "chatml"),
    "smollm2-360m": KnownModel("HuggingFaceTB/SmolLM2-360M-Instruct", 361_821_120, "Apache-2.0", "chatml"),
    "smollm2-1.7b": KnownModel("HuggingFaceTB/SmolLM2-1.7B-Instruct", 1_711_376_384, "Apache-2.0", "chatml"),
    "gpt2": KnownModel("openai-community/gpt2", 124_439_808, "MIT", "default"),
    "gpt2-medium": KnownModel("openai-community/gpt2-medium", 354_823_168, "MIT", "default"),
    "tinyllama": KnownModel("TinyLlama/TinyLlama-1.1B-Chat-v1.0", 1_100_048_384, "Apache-2.0", "zephyr"),
    "llama-3.2-1b": KnownModel("meta-llama/Llama-3.2-1B-Instruct", 1_235_814_400, "Llama 3.2", "llama-3", gated=True),
    "llama-3.2-3b": KnownModel("meta-llama/Llama-3.2-3B-Instruct", 3_212_749_824, "Llama 3.2", "llama-3", gated=True),
    "llama-3.1-8b": KnownModel("meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248, "Llama 3.1", "llama-3", gated=True),
    "llama-7b": KnownModel("huggyllama/llama-7b", 6_738_415_616, "LLaMA", "default", lora_r=8, commercial=False, note=COPY),
    "llama-13b": KnownModel("huggyllama/llama-13b", 13_015_864_320, "LLaMA", "default", lora_r=8, commercial=False, note=COPY),
    "llama-2-7b": KnownModel("meta-llama/Llama-2-7b-chat-hf", 6_738_415_616, "Llama 2", "llama-2", gated=True, lora_r=8),
    "llama-2-13b": KnownModel("meta-llama/Llama-2-13b-chat-hf", 13_015_864_320, "Llama 2", "llama-2", gated=True, lora_r=8),
    "codellama-7b": KnownModel("codellama/CodeLlama-7b-Instruct-hf", 6_738_546_688, "Llama 2", "llama-2", lora_r=8),
    "mistral-7b": KnownModel("mistralai/Mistral-7B-Instruct-v0.3", 7_248_023_552, "Apache-2.0", "mistral", gated=True),
    "phi-3-mini": KnownModel("microsoft/Phi-3-mini-4k-instruct", 3_821_079_552, "MIT", "phi-3"),
    "phi-3.5-mini": KnownModel("microsoft/Phi-3.5-mini-instruct", 3_821_079_552, "MIT", "phi-3"),
    "qwen2.5-0.5b": KnownModel("Qwen/Qwen2.5-0.5B-Instruct", 494_032_768, "Apache-2.0", "chatml"),
    "qwen2.5-1.5b": KnownModel("Qwen/Qwen2.5-1.5B-Instruct", 1_543_714_304, "Apache-2.0", "chatml"),
    "qwen2.5-3b": KnownModel("Qwen/Qwen2.5-3B-Instruct", 3_085_938_688, "Qwen Research", "chatml", commercial=False),
    "qwen2.5-7b": KnownModel("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512, "Apache-2.0", "chatml"),
    "qwen3-0.6b": KnownModel("Qwen/Qwen3-0.6B", 596_049_920, "Apache-2.0", "chatml"),
    "qwen3-1.7b": KnownModel("Qwen/Qwen3-1.7B", 1_720_574_976, "Apache-2.0", "chatml"),
    "qwen3-4b": KnownModel("Qwen/Qwen3-4B", 4_022_468_096, "Apache-2.0", "chatml"),
    "qwen3-8b": KnownModel("Qwen/Qwen3-8B", 8_190_735_360, "Apache-2.0", "chatml"),
    "gemma-2-2b": KnownModel("google/gemma-2-2b-it", 2_614_341_888, "Gemma", "gemma", gated=True),
    "gemma-2-9b": KnownModel("google/gemma-2-9b-it", 9_241_705_984, "Gemma", "gemma", gated=True),
    "gemma-3-270m": KnownModel("google/gemma-3-270m-it", 268_098_176, "Gemma", "gemma", gated=True),
    "gemma-3-1b": KnownModel("google/gemma-3-1b-it", 999_885_952, "Gemma", "gemma", gated=True),
    "olmo-2-1b": KnownModel("allenai/OLMo-2-0425-1B-Instruct", 1_484_916_736, "Apache-2.0", "tulu"),
    "olmo-2-7b": KnownModel("allenai/OLMo-2-1124-7B-Instruct", 7_298_617_344, "Apache-2.0", "tulu"),
}

# Other spellings that users of such tools type.
SHORT_NAMES: dict[str, str] = {
    "tinyllama-1.1b": "tinyllama",
    "llama3-8b": "llama-3.1-8b",
    "llama3.1-8b": "llama-3.1-8b",
    "llama2-7b": "llama-2-7b",
    "llama2-13b": "llama-2-13b",
    "llama-1-7b": "llama-7b",
    "llama-1-13b": "llama-13b",
    "code-llama-7b": "codellama-7b",
    "mistral": "mistral-7b",
    "phi3-mini": "phi-3-mini",
    "phi-3": "phi-3-mini",
    "phi3.5-mini": "phi-3.5-mini",
    "phi-3.5": "phi-3.5-mini",
    "gpt2-small": "gpt2",
    "olmo2-1b": "olmo-2-1b",
    "olmo2-7b": "olmo-2-7b",
}


def _shape(
    kind: str,
    layers: int,
    width: int,
    inner: int,
    heads: tuple[int, int],  # of queries, of keys and values
    vocabulary: int,
    positions: int,
    *,
    head_dim: int | None = None,
    tied: bool = False,
    dtype: str = "bfloat16",
) -> dict[str, Any]:
    """What config.json says, by its own names."""
    return {
        "model_type": kind,
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": head_dim or width // heads[0],
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
        "tie_word_embeddings": tied,
        "dtype": dtype,
    }


def _gpt2(layers: int, width: int, heads: int) -> dict[str, Any]:
    sizes = {"n_layer": layers, "n_embd": width, "n_head": heads, "n_positions": 1024, "vocab_size": 50257}
    return {"model_type": "gpt2", "dtype": "float32", **sizes}


def _llama(layers: int, width: int, inner: int, heads: int, positions: int = 4096) -> dict[str, Any]:
    """Llama 1 and 2: keys and values have as many heads as queries."""
    return _shape("llama", layers, width, inner, (heads, heads), 32000, positions, dtype="float16")


# Their sizes, as their config files state them: what they need can be told before anything is fetched.
SHAPES: dict[str, dict[str, Any]] = {
    DEMO: _shape("llama", 5, 256, 640, (8, 4), 4096, 512, tied=True),
    "smollm2-135m": _shape("llama", 30, 576, 1536, (9, 3), 49152, 8192, tied=True),
    "smollm2-360m": _shape("llama", 32, 960, 2560, (15, 5), 49152, 8192, tied=True),
    "smollm2-1.7b": _shape("llama", 24, 2048, 8192, (32, 32), 49152, 8192, tied=True),
    "gpt2": _gpt2(12, 768, 12),
    "gpt2-medium": _gpt2(24, 1024, 16),
    "tinyllama": _shape("llama", 22, 2048, 5632, (32, 4), 32000, 2048),
    "llama-3.2-1b": _shape("llama", 16, 2048, 8192, (32, 8), 128256, 131072, tied=True),
    "llama-3.2-3b": _shape("llama", 28, 3072, 8192, (24, 8), 128256, 131072, tied=True),
    "llama-3.1-8b": _shape("llama", 32, 4096, 14336, (32, 8), 128256, 131072),
    "llama-7b": _llama(32, 4096, 11008, 32, 2048),
    "llama-13b": _llama(40, 5120, 13824, 40, 2048),
    "llama-2-7b": _llama(32, 4096, 11008, 32),
    "llama-2-13b": _llama(40, 5120, 13824, 40),
    "codellama-7b": _shape("llama", 32, 4096, 11008, (32, 32), 32016, 16384),
    "mistral-7b": _shape("mistral", 32, 4096, 14336, (32, 8), 32768, 32768),
    "phi-3-mini": _shape("phi3", 32, 3072, 8192, (32, 32), 32064, 4096),
    "phi-3.5-mini": _shape("phi3", 32, 3072, 8192, (32, 32), 32064, 131072),
    "qwen2.5-0.5b": _shape("qwen2", 24, 896, 4864, (14, 2), 151936, 32768, tied=True),
    "qwen2.5-1.5b": _shape("qwen2", 28, 1536, 8960, (12, 2), 151936, 32768, tied=True),
    "qwen2.5-3b": _shape("qwen2", 36, 2048, 11008, (16, 2), 151936, 32768, tied=True),
    "qwen2.5-7b": _shape("qwen2", 28, 3584, 18944, (28, 4), 152064, 32768),
    "qwen3-0.6b": _shape("qwen3", 28, 1024, 3072, (16, 8), 151936, 40960, head_dim=128, tied=True),
    "qwen3-1.7b": _shape("qwen3", 28, 2048, 6144, (16, 8), 151936, 40960, head_dim=128, tied=True),
    "qwen3-4b": _shape("qwen3", 36, 2560, 9728, (32, 8), 151936, 40960, head_dim=128, tied=True),
    "qwen3-8b": _shape("qwen3", 36, 4096, 12288, (32, 8), 151936, 40960, head_dim=128),
    "gemma-2-2b": _shape("gemma2", 26, 2304, 9216, (8, 4), 256000, 8192, head_dim=256, tied=True),
    "gemma-2-9b": _shape("gemma2", 42, 3584, 14336, (16, 8), 256000, 8192, head_dim=256, tied=True),
    "gemma-3-270m": _shape("gemma3_text", 18, 640, 2048, (4, 1), 262144, 32768, head_dim=256, tied=True),
    "gemma-3-1b": _shape("gemma3_text", 26, 1152, 6912, (4, 1), 262144, 32768, head_dim=256, tied=True),
    "olmo-2-1b": _shape("olmo2", 16, 2048, 8192, (16, 16), 100352, 4096),
    "olmo-2-7b": _shape("olmo2", 32, 4096, 11008, (32, 32), 100352, 4096),
}


def short_name(name: str) -> str | None:
    """The short name that a name stands for: itself, another spelling or a hub id, in capital letters or not."""
    lower = name.lower()
    short = SHORT_NAMES.get(lower, lower)
    if short in MODELS:
        return short
    return next((short for short, model in MODELS.items() if model.hub_id and model.hub_id.lower() == lower), None)


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
