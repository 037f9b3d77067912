"""One model on a GPU: predicted against measured memory, tokens a second of ours and of Trainer + PEFT, and waits of a step."""

from __future__ import annotations

import gc
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening, Trainer, TrainerCallback, TrainingArguments

from gpu_checks import by_peft
from gpu_parts import RANK, RATE, SEED, Document, Place, build, documents, ours, read_config, targets, tokens_of, train, wait
from llm_finetune_kit.data.batches import step_examples
from llm_finetune_kit.events import Event, Stepped, Warned
from llm_finetune_kit.models.facts import facts_of_model
from llm_finetune_kit.plan.memory import CONTEXT, Work, moments
from llm_finetune_kit.plan.speed import attention_flops, flops

WIDE, NARROW = 80, 16  # documents of a step: some 8,000 tokens, and the package's own default
BUDGET = 8192  # tokens of a pass
WARM, TIMED = 3, 10  # steps, and those of a large model
LARGE_WARM, LARGE_TIMED = 2, 6
Keep = Callable[[str, Any], None]


@dataclass(frozen=True)
class Case:
    """A model to be measured: its config's file, its weights in 4 bits or not, and whether launches may hold it up."""

    config: str
    packed: bool = False
    small: bool = False

    def steps(self, place: Place) -> tuple[int, int]:
        """Of a measurement: those that warm up, and those that are timed."""
        if place.dry:
            return 1, 2
        return (WARM, TIMED) if self.small else (LARGE_WARM, LARGE_TIMED)


CASES = {
    "GPT-2 124M LoRA": Case("gpt2.config.json", small=True),
    "TinyLlama LoRA": Case("tinyllama-1.1b-chat-v1.0.config.json", small=True),
    "Llama-3.1-8B LoRA": Case("llama-3.1-8b.config.json"),
    "Llama-3.1-8B QLoRA": Case("llama-3.1-8b.config.json", packed=True),
}


def measure(place: Place, case: Case, keep: Keep) -> None:
    """Everything about one model; each part is kept when it is known, and none needs the one before."""
    config = read_config(place, case.config)
    wide, narrow = (6, 4) if place.dry else (WIDE, NARROW)
    found = documents(place, wide * sum(case.steps(place)), config.vocab_size)
    known = (place, config, case, found)
    parts: dict[str, Callable[[], Any]] = {
        "matmul_tflops": lambda: matmul_tflops(place),
        "ours": lambda: our_speed(*known, wide),
        "waits": lambda: waits(*known, narrow),
        "Trainer, flattened": lambda: trainer_speed(*known, wide, "flattened"),
    }
    if case.small:
        parts |= {
            "ours, small steps": lambda: our_speed(*known, narrow),
            "Trainer, padded": lambda: trainer_speed(*known, wide, "padded"),
            "Trainer, small steps": lambda: trainer_speed(*known, narrow, "flattened"),
        }
    if config.model_type != "gpt2" and not case.packed:
        parts["ours, Liger's kernels"] = lambda: our_speed(*known, wide, fused=True)
    if case.small and not place.dry:  # on a CPU that is a minute of C++
        parts["ours, small steps, compiled"] = lambda: our_speed(*known, narrow, compiled=True)
    for name, part in parts.items():
        keep(name, attempt(part))


def attempt(work: Callable[[], Any]) -> Any:
    """What `work` gives, or what went wrong; the device's memory is free again."""
    try:
        return work()
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"[:500]}
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def matmul_tflops(place: Place) -> float:
    """bfloat16's rate of large products, in TFLOP/s: the best of some."""
    side = 256 if place.dry else 8192
    a, b = (torch.randn(side, side, device=place.device, dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(30):
        wait(place.device)
        began = time.perf_counter()
        a @ b
        wait(place.device)
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best / 1e12


def our_speed(
    place: Place, config: Any, case: Case, found: list[Document], per_step: int, *, compiled: bool = False, fused: bool = False
) -> dict[str, Any]:
    """The engine's own loop: times of steps as it tells them, and memory against the plan's."""
    began = time.perf_counter()
    objective = ours(config, place.device, torch.bfloat16, packed=case.packed, compiled=compiled, fused=fused)
    made = time.perf_counter() - began
    warm, timed = case.steps(place)
    steps: list[Stepped] = []
    stamps: list[float] = []
    told: list[str] = []

    def listen(event: Event) -> None:
        if isinstance(event, Stepped):
            steps.append(event)
            stamps.append(time.perf_counter())
        elif isinstance(event, Warned):
            told.append(event.message)

    if place.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    tokens = tokens_of(found)
    train(objective, tokens, per_step, warm + timed, BUDGET, listen)
    wait(place.device)
    seconds = time.perf_counter() - stamps[warm - 1]
    counted = sum(step.tokens for step in steps[warm:])
    work = planned(objective, config, case, tokens, per_step)
    with torch.device("meta"):
        facts = facts_of_model(AutoModelForCausalLM.from_config(config), "random")
    result = {
        "tokens_per_second": counted / seconds,
        "first_loss": steps[0].loss,
        "tokens_per_step": counted / timed,
        "build_seconds": made,
        "model_tflops": model_flops(facts, work, steps[warm:], float(tokens.lengths.mean())) / seconds / 1e12,
        "not_compiled": objective.not_compiled,
        "not_fused": objective.not_fused,
        "warnings": told,
    }
    return result | memory(place, facts, work)


def planned(objective: Any, config: Any, case: Case, tokens: Any, per_step: int) -> Work:
    """The work as the plan would describe it."""
    trained = sum(part.numel() for part in objective.model.parameters() if part.requires_grad)
    largest = max(
        int(tokens.lengths[step_examples(len(tokens), per_step, SEED, step)].sum()) for step in range(len(tokens) // per_step)
    )
    return Work(
        "lora",
        "bfloat16",
        tokens=min(BUDGET, largest),
        longest=int(tokens.lengths.max()),
        device=objective.device.type,
        r=RANK,
        targets=tuple(targets(config)),
        trained=trained,
        quantization="nf4" if case.packed else None,
        passes=-(-largest // BUDGET),
    )


def model_flops(facts: Any, work: Work, steps: list[Stepped], length: float) -> float:
    """Of the steps over documents of `length` tokens, without anything computed twice."""
    return sum(
        flops(facts, work, step.tokens, step.target_tokens) + attention_flops(facts, work, step.tokens, length) for step in steps
    )


def memory(place: Place, facts: Any, work: Work) -> dict[str, Any]:
    """The plan's peak, without the context that torch does not count, against what torch allocated and reserved."""
    if place.device.type != "cuda":
        return {}
    parts = max(moments(facts, work).values(), key=lambda found: sum(found.values()))
    said, was = sum(parts.values()) - CONTEXT, torch.cuda.max_memory_allocated()
    reserved = torch.cuda.max_memory_reserved()
    shown = {name: size for name, size in parts.items() if size}
    return {
        "memory_predicted": said,
        "memory_allocated": was,
        "memory_reserved": reserved,
        "memory_error": said / was - 1,
        "parts": shown,
    }


def waits(place: Place, config: Any, case: Case, found: list[Document], per_step: int) -> dict[str, Any]:
    """How often a step of ours makes Python wait for the GPU, and where."""
    objective = ours(config, place.device, torch.bfloat16, packed=case.packed)
    tokens = tokens_of(found)
    train(objective, tokens, per_step, 1, BUDGET, lambda event: None)
    if place.device.type != "cuda":
        return {"skipped": "only CUDA counts them"}
    steps = 3
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            train(objective, tokens, per_step, steps, BUDGET, lambda event: None)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = Counter(f"{Path(one.filename).name}:{one.lineno}" for one in heard if "synchroniz" in str(one.message))
    return {"per_step": sum(places.values()) / steps, "places": dict(places.most_common(10))}


class Clock(TrainerCallback):
    """When steps end, the device waited for at the first timed one alone, and the loss of the first step."""

    def __init__(self, trainer: Trainer, device: torch.device, warm: int) -> None:
        self.device, self.warm, self.done = device, warm, 0
        self.began, self.first = 0.0, 0.0
        training_step = trainer.training_step

        def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
            loss: torch.Tensor = training_step(*args, **kwargs)
            if self.done == 0:
                self.first += float(loss)
            return loss

        trainer.training_step = watched

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.done += 1
        if self.done == self.warm:
            wait(self.device)
            self.began = time.perf_counter()


def trainer_speed(place: Place, config: Any, case: Case, found: list[Document], per_step: int, way: str) -> dict[str, Any]:
    """HF Trainer + PEFT, bfloat16 weights, no recompute, on the same documents; in smaller batches where memory runs out."""
    for share in (1, 2, 4, 8):
        if per_step % share == 0:
            try:
                return trainer_run(place, config, case, found, per_step, share, way)
            except torch.OutOfMemoryError:
                pass  # what holds the memory is let go past this block
            gc.collect()
            torch.cuda.empty_cache()
    return {"failed": "out of memory"}


def trainer_run(
    place: Place, config: Any, case: Case, found: list[Document], per_step: int, share: int, way: str
) -> dict[str, Any]:
    warm, timed = case.steps(place)
    attention = flash() if way == "flattened" and place.device.type == "cuda" else "sdpa"
    model = by_peft(build(config, place.device, torch.bfloat16, packed=case.packed, attention=attention))
    turn = [found[index] for step in range(warm + timed) for index in step_examples(len(found), per_step, SEED, step)]
    rows = [{"input_ids": one[0], "labels": [token if used else -100 for token, used in zip(*one, strict=True)]} for one in turn]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=warm + timed, per_device_train_batch_size=per_step // share, gradient_accumulation_steps=share,
            learning_rate=RATE, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0, bf16=True,
            train_sampling_strategy="sequential", use_cpu=place.device.type == "cpu", save_strategy="no", report_to="none",
            disable_tqdm=True, dataloader_num_workers=0, remove_unused_columns=False,
        )  # fmt: skip
        collate = DataCollatorWithFlattening(return_flash_attn_kwargs=attention != "sdpa") if way == "flattened" else padded
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate)
        clock = Clock(trainer, place.device, warm)
        trainer.add_callback(clock)
        if place.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
        wait(place.device)
        seconds = time.perf_counter() - clock.began
    counted = sum(len(ids) for ids, _ in turn[warm * per_step :])
    result = {
        "tokens_per_second": counted / seconds,
        "first_loss": clock.first,
        "attention": attention,
        "batches_per_step": share,
    }
    return result | ({"memory_allocated": torch.cuda.max_memory_allocated()} if place.device.type == "cuda" else {})


def padded(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """A batch as wide as its longest row."""
    width = max(len(row["input_ids"]) for row in rows)
    ids = [row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows]
    labels = [row["labels"] + [-100] * (width - len(row["labels"])) for row in rows]
    mask = [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows]
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "attention_mask": torch.tensor(mask)}


def flash() -> str:
    """The attention that Trainer packs best with, where its package is installed."""
    from transformers.utils import is_flash_attn_2_available

    return "flash_attention_2" if is_flash_attn_2_available() else "sdpa"
