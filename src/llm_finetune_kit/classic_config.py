"""The configuration classes of the LLaMA framework, with its defaults; each one sets the knobs that its fields are aliases of.

None leaves the choice to the plan. A number format is left open too: float16, which the framework asks of every machine,
is what a GPU without bfloat16 gets, and a CPU has no use for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from llm_finetune_kit.errors import ConfigError


@dataclass
class _Config:
    """Fields that are spellings of knobs in one section."""

    section: ClassVar[str] = ""

    def values(self) -> dict[str, Any]:
        """What is set, by dotted names that `load_config` knows."""
        return {
            f"{self.section}.{one.name}": getattr(self, one.name) for one in fields(self) if getattr(self, one.name) is not None
        }


@dataclass
class ModelConfig(_Config):
    """Which model, and whether its frozen weights are kept in 4 bits.

    >>> ModelConfig(model_name="huggyllama/llama-13b", use_4bit=True, use_nested_quant=True).bnb_4bit_quant_type
    'nf4'
    """

    section: ClassVar[str] = "model"

    model_name: str = "huggyllama/llama-7b"
    use_4bit: bool = True
    bnb_4bit_compute_dtype: str | None = None  # "float16", "bfloat16" or "float32"
    bnb_4bit_quant_type: str = "nf4"  # or "fp4"
    use_nested_quant: bool = False
    cache_dir: str | None = None


@dataclass
class LoRAConfig(_Config):
    """The adapter: rank, strength (`lora_alpha`), dropout, and the layers that get one.

    >>> LoRAConfig(r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]).lora_dropout
    0.05
    """

    section: ClassVar[str] = "lora"

    r: int = 8
    lora_alpha: int = 16
    target_modules: list[str] | str = field(default_factory=lambda: ["q_proj", "v_proj"])  # or "all-linear"
    lora_dropout: float = 0.05
    bias: str = "none"
    task_type: str = "CAUSAL_LM"

    def values(self) -> dict[str, Any]:
        """What is set; raises ConfigError for another task than the one there is."""
        found = super().values()
        if found.pop("lora.task_type") != "CAUSAL_LM":
            problem = f"task_type is {self.task_type}; only causal language models are trained"
            raise ConfigError(3, problem, where="LoRAConfig", fix='leave it out, or write "CAUSAL_LM"')
        return found


@dataclass
class DataConfig(_Config):
    """What is learned from: `alpaca`, `daily_dialog`, `both`, a file, rows, or a loader of one's own with a method `load`.

    >>> DataConfig(dataset_name="both").max_length
    512
    """

    section: ClassVar[str] = "data"

    dataset_name: Any = "alpaca"
    max_length: int = 512  # tokens of an example
    max_samples: int | None = None
    validation_split: float | None = None
    loss_on: str = "answers"  # or "all": the labels are the input_ids


@dataclass
class TrainingConfig(_Config):
    """How it is trained: three passes in steps of 4 x 4 examples.

    >>> TrainingConfig(num_epochs=1).learning_rate
    0.0002
    """

    section: ClassVar[str] = "training"

    output_dir: str = "outputs"
    num_epochs: float = 3
    batch_size: int = 4
    gradient_accumulation_steps: int = 4
    learning_rate: float = 2e-4
    weight_decay: float = 0.01
    warmup_ratio: float = 0.03
    max_grad_norm: float = 0.3
    fp16: bool | None = None
    optim: str | None = None  # "paged_adamw_32bit" is the framework's, on a GPU
    lr_scheduler_type: str = "cosine"
    max_steps: int | None = None
    save_steps: int | None = None
    eval_steps: int | None = None
    logging_steps: int = 10
    seed: int = 42


@dataclass
class EvaluationConfig(_Config):
    """How answers are produced when the result is judged; `max_length` counts new tokens.

    >>> EvaluationConfig(num_beams=1).temperature
    0.7
    """

    section: ClassVar[str] = "evaluation.generation"

    max_length: int = 256
    num_beams: int = 4
    temperature: float = 0.7
    top_p: float = 0.9

    def values(self) -> dict[str, Any]:
        """What is set."""
        found = super().values()
        return found | {f"{self.section}.max_new_tokens": found.pop(f"{self.section}.max_length")}
