"""Every knob, once: its name, its default, its limits and its help.

The command-line flags, the YAML template and the documentation are derived from these classes.
A default of None means "you decide": the plan fills it in and gives its reason.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

Dtype = Literal["float32", "bfloat16", "float16"]
Schedule = Literal["cosine", "linear", "constant"]
Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow"]
MetricName = Literal[
    "perplexity",
    "bits_per_byte",
    "bleu",
    "chrf",
    "rouge1",
    "rouge2",
    "rougeL",
    "exact_match",
    "numeric_match",
    "bertscore",
    "distinct_1",
    "distinct_2",
    "length",
    "stop_rate",
    "repetition",
]
SHORTEST = 8  # tokens: the least that model.max_length may be
MANY = 10_000_000  # more steps, examples or tokens than this are a slip of the pen, and would fill the memory with plans
FILE_NAME = r"^[^./\\\x00-\x1f][^/\\\x00-\x1f]{0,99}$"


class Section(BaseModel):
    """A frozen group of knobs that refuses unknown names."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic would take true for 1."""
        if isinstance(value, bool) and "bool" not in str(cls.model_fields[str(info.field_name)].annotation):
            raise ValueError("a truth value where none is due")
        return value


class ModelSection(Section):
    """Which model learns."""

    name: str | None = Field(None, description="A known short name (see `finetune models`), a hub id or a local folder.")
    revision: str | None = Field(None, description="Branch, tag or commit on the hub.")
    max_length: int | None = Field(
        None, ge=SHORTEST, le=MANY, description="Longest example in tokens; longer ones are cut at the end."
    )
    dtype: Dtype | None = Field(
        None, description="Number format of matrix products and frozen weights; trained weights are always float32."
    )
    quantization: Literal["nf4", "fp4", "int8"] | None = Field(
        None, description="Keep the frozen weights in 4 or 8 bits (QLoRA); the plan does so where they would not fit otherwise."
    )
    double_quantization: bool = Field(True, description="Quantize the scales of 4-bit weights too, which saves a little more.")
    trust_remote_code: bool = Field(False, description="Run code that comes with the model; needs model.revision and your trust.")
    cache_dir: str | None = Field(None, description="Where downloaded models are kept (default: the hub's own cache).")


class LoraSection(Section):
    """Which small matrices are trained beside the frozen weights."""

    r: int | None = Field(None, ge=1, le=1024, description="Rank of the update: higher learns more and costs more.")
    alpha: int | None = Field(None, ge=1, le=MANY, description="Strength of the update; the usual choice is twice r.")
    dropout: float = Field(0.0, ge=0, le=0.9, description="Dropout before the adapter.")
    target_modules: list[str] | Literal["all-linear"] | None = Field(
        None, description="Names of the layers that get an adapter, or all-linear."
    )
    variant: Literal["lora", "rslora", "dora"] = Field(
        "lora", description="lora; rslora (scaled by the root of r, for high ranks); dora (direction and length apart, slower)."
    )
    init: Literal["default", "pissa"] = Field(
        "default", description="Where the matrices start: at no change, or at the largest singular vectors (pissa)."
    )
    bias: Literal["none", "all", "lora_only"] = Field("none", description="Which biases are trained with the adapter.")
    modules_to_save: list[str] | None = Field(
        None, description="Modules trained and saved whole beside the adapter, such as embed_tokens and lm_head."
    )
    plus_ratio: float | None = Field(
        None, gt=0, le=1000, description="LoRA+: the second matrix learns this many times as fast as the first."
    )


class DataSection(Section):
    """What the model learns from."""

    train_file: str | list[dict[str, Any]] | None = Field(
        None,
        description="A file, folder or hub dataset, sample:NAME, alpaca, daily_dialog, both; or rows.",
    )
    eval_file: str | list[dict[str, Any]] | None = Field(None, description="Held-out rows, named in the same ways.")
    mix: dict[str, float] | None = Field(
        None, description="Several sets instead of train_file, each with its share of the examples: {a.jsonl: 2, b.jsonl: 1}."
    )
    format: str | None = Field(None, description="Shape of the rows; detected from the columns when not given.")
    columns: dict[str, str] | None = Field(
        None, description="Which column of the file is meant: {prompt: frage, response: antwort}."
    )
    threads: Literal["best", "all"] = Field(
        "best", description="Of message trees (OASST): the best ranked thread of each tree, or all threads."
    )
    template: str | None = Field(
        None, description="Chat template: default, or a .jinja file (default: the tokenizer's own, else default)."
    )
    streaming: bool | None = Field(
        None, description="Read rows from the disk as they are needed, for files larger than memory (JSON lines, Parquet)."
    )
    max_samples: int | None = Field(None, ge=1, description="Use at most this many training rows, chosen by the seed.")
    validation_split: float | None = Field(
        None, ge=0, lt=1, description="Share of the training rows held out when there is no eval_file; 0 for none."
    )
    loss_on: Literal["answers", "all"] = Field("answers", description="Which tokens are learned: answers, or all.")
    system_prompt: str | None = Field(None, description="System message for conversations that have none.")
    on_bad_rows: Literal["stop", "drop"] = Field(
        "stop", description="What to do about rows that cannot be used: stop with an error, or drop and report them."
    )

    @field_validator("mix")
    @classmethod
    def _shares_are_positive(cls, mix: dict[str, float] | None) -> dict[str, float] | None:
        if mix is not None and (not mix or not all(0 < share < float("inf") for share in mix.values())):
            raise ValueError("each set needs a share above 0")
        return mix


class TrainingSection(Section):
    """How it learns. batch_size x gradient_accumulation_steps examples make one optimizer step."""

    batch_size: int = Field(4, ge=1, le=MANY, description="Examples per batch.")
    gradient_accumulation_steps: int = Field(4, ge=1, le=MANY, description="Batches per optimizer step.")
    learning_rate: float | None = Field(None, gt=0, le=1, description="Peak learning rate.")
    num_epochs: float = Field(3.0, gt=0, le=100_000, description="Passes over the training rows; max_steps wins over it.")
    max_steps: int | None = Field(None, ge=1, le=MANY, description="Optimizer steps.")
    warmup_steps: int | None = Field(None, ge=0, le=MANY, description="Steps over which the learning rate rises to its peak.")
    warmup_ratio: float = Field(0.03, ge=0, le=1, description="The same as a share of all steps.")
    schedule: Schedule = Field("cosine", description="How the learning rate falls after its peak.")
    weight_decay: float = Field(0.01, ge=0, le=1, description="AdamW weight decay of matrices; vectors have none.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are scaled down to at most this norm.")
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] | None = Field(
        None, description="AdamW; with its state in 8 bits; or paged out of GPU memory when that runs short."
    )
    freeze_layers: int = Field(
        0, ge=0, le=1000, description="Full fine-tuning: the embeddings and this many first blocks stay as they are."
    )
    gradient_checkpointing: bool | None = Field(None, description="Recompute activations to save memory.")
    checkpoint_every: int | None = Field(
        None, ge=1, le=1000, description="With gradient_checkpointing: recompute every n-th block only; 1 is all of them."
    )
    threads: int | None = Field(None, ge=1, le=1024, description="CPU threads of matrix products.")
    packing: bool = Field(True, description="Put several examples into one pass, kept apart from each other.")
    share_prompts: bool = Field(
        True, description="Compute once what prompts of a pass begin with alike; the gradient is the same."
    )
    compile: bool | None = Field(
        None, description="Have torch write kernels for the blocks: fewer launches, for a minute or more at the start."
    )
    liger: bool | None = Field(
        None, description="Liger's kernels for norms and rotary positions on a GPU (liger-kernel); the same to rounding."
    )
    tokens_per_pass: int | None = Field(
        None, ge=16, le=1 << 30, description="Tokens computed at once; changes memory and speed, never the result."
    )
    save_steps: int | None = Field(None, ge=1, description="Optimizer steps between checkpoints.")
    eval_steps: int | None = Field(None, ge=1, description="Optimizer steps between evaluations.")
    logging_steps: int = Field(1, ge=1, description="Optimizer steps between lines of the log.")
    trackers: Tracker | list[Tracker] | None = Field(
        None, description="Experiment trackers that record the run too: one of them or a list."
    )
    save_total_limit: int = Field(3, ge=1, description="Checkpoints kept, the best one always among them.")
    profile: bool = Field(
        False, description="Watch a few steps: a table of where their time goes, and a trace (profile_trace.json.gz)."
    )
    on_disk_full: Literal["pause", "stop"] | None = Field(
        None,
        description="When a checkpoint cannot be written: wait with the state in memory (default at a terminal), or stop.",
    )
    early_stopping_patience: int | None = Field(
        None, ge=1, description="Stop after this many evaluations without improvement, and keep the best."
    )
    seed: int = Field(42, ge=0, lt=2**32, description="Fixes the data order, the split and the new weights.")


class GenerationSection(Section):
    """How answers are produced.

    >>> GenerationSection(max_new_tokens=128, temperature=0.7, top_p=0.9).num_beams
    1
    """

    max_new_tokens: int = Field(64, ge=1, le=MANY, description="Longest answer in tokens.")
    num_beams: int = Field(1, ge=1, le=256, description="Beam search width; 1 is greedy or sampled.")
    temperature: float = Field(0.0, ge=0, le=10, description="Randomness; 0 always takes the likeliest token.")
    top_p: float = Field(1.0, gt=0, le=1, description="Sample from the likeliest tokens that add up to this share.")
    top_k: int | None = Field(None, ge=1, le=MANY, description="Sample from this many likeliest tokens.")
    repetition_penalty: float = Field(1.0, gt=0, le=10, description="Above 1, what was said already becomes less likely.")


class EvaluationSection(Section):
    """How the result is judged."""

    prompts: list[str] | None = Field(None, description="Prompts answered before, during and after training.")
    sample_steps: int | None = Field(
        None,
        ge=1,
        description="Optimizer steps between sample answers during training; at evaluations, where that costs little, when not "
        "given. A number above the run's steps leaves them out.",
    )
    compare: bool = Field(True, description="At the end, compare base and tuned on held-out rows, with intervals.")
    metrics: list[MetricName] | None = Field(None, description="What is compared (default: what suits the held-out answers).")
    rows: int | None = Field(
        None,
        ge=1,
        le=MANY,
        description="Held-out prompts that base and tuned answer; when not given, what a usual machine does in seconds.",
    )
    generation: GenerationSection = GenerationSection()


class OutputSection(Section):
    """Where it goes."""

    output_dir: str = Field("outputs", description="Folder that holds all runs.")
    run_name: str | None = Field(None, pattern=FILE_NAME, description="Name of this run's folder.")


class RunConfig(Section):
    """Everything a run is asked to do.

    >>> RunConfig().with_values({"model.name": "demo", "lora.r": 8}).asked()
    {'model': {'name': 'demo'}, 'lora': {'r': 8}}
    """

    model: ModelSection = ModelSection()
    method: Literal["lora", "full"] = Field("lora", description="Train small added matrices (lora) or all weights (full).")
    lora: LoraSection = LoraSection()
    data: DataSection = DataSection()
    training: TrainingSection = TrainingSection()
    evaluation: EvaluationSection = EvaluationSection()
    output: OutputSection = OutputSection()

    def asked(self) -> dict[str, Any]:
        """Only what differs from the defaults: what a person would write in YAML."""
        return self.model_dump(exclude_defaults=True)

    def with_values(self, values: dict[str, Any]) -> RunConfig:
        """A copy with some knobs set, each named by its dotted path: `{"lora.r": 8}`."""
        tree = self.model_dump()
        for path, value in values.items():
            *sections, name = path.split(".")
            branch = tree
            for section in sections:
                branch = branch[section]
            branch[name] = value
        return RunConfig.model_validate(tree)


def knobs(section: type[Section] = RunConfig, prefix: str = "") -> dict[str, Any]:
    """Every knob by its dotted path, with its pydantic field (annotation, default, description, limits)."""
    found: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            found |= knobs(kind, f"{prefix}{name}.")
        else:
            found[prefix + name] = field
    return found


# Spellings of other tools and of older documents, and the knob that each one means here. A name without
# a section is accepted at the top level; the canonical name is told to the user.
ALIASES: dict[str, str] = {
    "model_name": "model.name",
    "model_name_or_path": "model.name",
    "base_model": "model.name",
    "model.model_name": "model.name",
    "model.model_name_or_path": "model.name",
    "max_length": "model.max_length",
    "max_seq_length": "model.max_length",
    "cutoff_len": "model.max_length",
    "sequence_len": "model.max_length",
    "model.max_seq_length": "model.max_length",
    "data.max_length": "model.max_length",
    "training.max_length": "model.max_length",
    "cache_dir": "model.cache_dir",
    "torch_dtype": "model.dtype",
    "use_4bit": "model.quantization",
    "model.use_4bit": "model.quantization",
    "load_in_4bit": "model.quantization",
    "model.load_in_4bit": "model.quantization",
    "load_in_8bit": "model.quantization",
    "model.load_in_8bit": "model.quantization",
    "quantization_bit": "model.quantization",
    "model.bnb_4bit_quant_type": "model.quantization",
    "bnb_4bit_quant_type": "model.quantization",
    "model.bnb_4bit_compute_dtype": "model.dtype",
    "bnb_4bit_compute_dtype": "model.dtype",
    "fp16": "model.dtype",
    "training.fp16": "model.dtype",
    "bf16": "model.dtype",
    "training.bf16": "model.dtype",
    "use_nested_quant": "model.double_quantization",
    "model.use_nested_quant": "model.double_quantization",
    "bnb_4bit_use_double_quant": "model.double_quantization",
    "trust_remote_code": "model.trust_remote_code",
    "optim": "training.optimizer",
    "training.optim": "training.optimizer",
    "optimizer": "training.optimizer",
    "use_rslora": "lora.variant",
    "use_dora": "lora.variant",
    "loraplus_lr_ratio": "lora.plus_ratio",
    "modules_to_save": "lora.modules_to_save",
    "model.torch_dtype": "model.dtype",
    "finetuning_type": "method",
    "adapter": "method",
    "lora_r": "lora.r",
    "lora_rank": "lora.r",
    "lora.rank": "lora.r",
    "lora.lora_r": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora.lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora.lora_dropout": "lora.dropout",
    "lora_target": "lora.target_modules",
    "lora_target_modules": "lora.target_modules",
    "target_modules": "lora.target_modules",
    "dataset": "data.train_file",
    "dataset_name": "data.train_file",
    "train_file": "data.train_file",
    "data.dataset_name": "data.train_file",
    "data.train": "data.train_file",
    "eval_dataset": "data.eval_file",
    "eval_file": "data.eval_file",
    "data.dataset_format": "data.format",
    "dataset_format": "data.format",
    "streaming": "data.streaming",
    "val_size": "data.validation_split",
    "val_set_size": "data.validation_split",
    "per_device_train_batch_size": "training.batch_size",
    "training.per_device_train_batch_size": "training.batch_size",
    "micro_batch_size": "training.batch_size",
    "batch_size": "training.batch_size",
    "gradient_accumulation_steps": "training.gradient_accumulation_steps",
    "training.gradient_accumulation": "training.gradient_accumulation_steps",
    "num_train_epochs": "training.num_epochs",
    "num_epochs": "training.num_epochs",
    "epochs": "training.num_epochs",
    "training.num_train_epochs": "training.num_epochs",
    "training.epochs": "training.num_epochs",
    "max_steps": "training.max_steps",
    "iters": "training.max_steps",
    "learning_rate": "training.learning_rate",
    "lr": "training.learning_rate",
    "training.lr": "training.learning_rate",
    "lr_scheduler_type": "training.schedule",
    "lr_scheduler": "training.schedule",
    "training.lr_scheduler_type": "training.schedule",
    "warmup_steps": "training.warmup_steps",
    "warmup_ratio": "training.warmup_ratio",
    "weight_decay": "training.weight_decay",
    "max_grad_norm": "training.max_grad_norm",
    "gradient_checkpointing": "training.gradient_checkpointing",
    "packing": "training.packing",
    "sample_packing": "training.packing",
    "use_liger_kernel": "training.liger",
    "training.use_liger_kernel": "training.liger",
    "enable_liger_kernel": "training.liger",
    "save_steps": "training.save_steps",
    "eval_steps": "training.eval_steps",
    "logging_steps": "training.logging_steps",
    "report_to": "training.trackers",
    "training.report_to": "training.trackers",
    "save_total_limit": "training.save_total_limit",
    "early_stopping_patience": "training.early_stopping_patience",
    "seed": "training.seed",
    "output_dir": "output.output_dir",
    "training.output_dir": "output.output_dir",
    "run_name": "output.run_name",
}

# Values that other tools write differently under those names, and what they mean here.
VALUES: dict[str, dict[Any, Any]] = {
    "use_4bit": {True: "nf4", False: None},
    "load_in_4bit": {True: "nf4", False: None},
    "load_in_8bit": {True: "int8", False: None},
    "quantization_bit": {4: "nf4", 8: "int8"},
    "fp16": {True: "float16", False: None},
    "bf16": {True: "bfloat16", False: None},
    "use_rslora": {True: "rslora", False: "lora"},
    "use_dora": {True: "dora", False: "lora"},
    "report_to": {"none": None},
    "optim": {
        "adamw_torch": "adamw",
        "adamw_torch_fused": "adamw",
        "adamw_bnb_8bit": "adamw_8bit",
        "paged_adamw_32bit": "paged_adamw",
    },
}

FOUR_BITS = "bnb_4bit_quant_type"  # which 4 bits, where another spelling says whether there are any


def combined(said: list[tuple[str, Any]]) -> list[Any]:
    """What spellings of one knob with their values add up to: one value, or several where they contradict each other.

    A switch that is off gives way to what another one says, and the kind of 4 bits counts only where 4 bits are on.
    """
    kinds = [value for name, value in said if name == FOUR_BITS]
    if kinds.count(kinds[-1] if kinds else None) < len(kinds):
        return kinds
    others = [(name, value) for name, value in said if name != FOUR_BITS]
    loud = [(name, value) for name, value in others if not (name in VALUES and value == VALUES[name].get(False, ...))]
    found: list[Any] = []
    for name, value in loud:
        meant = kinds[-1] if kinds and name in VALUES and value == "nf4" else value
        found += [] if meant in found else [meant]
    off = any(name in VALUES and VALUES[name].get(True) == "nf4" for name, _ in others)
    if not found:
        found = kinds[-1:] if kinds and not off else [others[0][1]]
    return found


def demo_values() -> dict[str, Any]:
    """What `finetune demo` asks for: the embedded model learns the style of the sample chat in under a minute."""
    return {
        "model.name": "demo",
        "data.train_file": "sample:chat",
        "training.max_steps": 24,
        "training.learning_rate": 3e-3,
        "training.batch_size": 8,
        "training.gradient_accumulation_steps": 1,
        "evaluation.generation.max_new_tokens": 110,
        "output.run_name": "demo",
    }
