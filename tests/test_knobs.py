"""Every knob of model, method and training has an effect that can be seen in what is about to be trained."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict
from functools import cache
from typing import Any

import pytest
import torch

from llm_finetune_kit.config import RunConfig, knobs
from llm_finetune_kit.events import Planned, Sampled, Stage, Stepped
from llm_finetune_kit.material import prepare_run
from llm_finetune_kit.models.freezing import blocks
from llm_finetune_kit.terminal import Terminal
from llm_finetune_kit.training.assembly import assemble

# Another value for each knob, and the settings that it needs beside it to mean anything.
CHANGES: dict[str, tuple[Any, dict[str, Any]]] = {
    "model.max_length": (100, {}),
    "model.dtype": ("float32", {"model.dtype": "bfloat16"}),
    "model.quantization": ("int8", {"model.quantization": "nf4"}),
    "model.double_quantization": (False, {"model.quantization": "nf4"}),
    "method": ("full", {}),
    "lora.r": (4, {"lora.alpha": 8}),
    "lora.alpha": (64, {}),
    "lora.dropout": (0.5, {}),
    "lora.target_modules": (["q_proj"], {}),
    "lora.variant": ("rslora", {}),
    "lora.init": ("pissa", {}),
    "lora.modules_to_save": (["embed_tokens", "lm_head"], {}),
    "lora.plus_ratio": (16.0, {}),
    "training.batch_size": (2, {}),
    "training.gradient_accumulation_steps": (2, {}),
    "training.learning_rate": (1e-5, {}),
    "training.num_epochs": (7.0, {}),
    "training.max_steps": (2, {}),
    "training.warmup_steps": (2, {}),
    "training.warmup_ratio": (1.0, {}),
    "training.schedule": ("constant", {}),
    "training.weight_decay": (0.5, {}),
    "training.max_grad_norm": (0.3, {}),
    "training.optimizer": ("adamw_8bit", {}),
    "training.freeze_layers": (2, {"method": "full"}),
    "training.gradient_checkpointing": (True, {}),
    "training.checkpoint_every": (2, {"training.gradient_checkpointing": True}),
    "training.threads": (2, {"training.threads": 1}),
    "training.packing": (False, {}),
    "training.share_prompts": (False, {}),
    "training.tokens_per_pass": (64, {}),
    "training.save_steps": (7, {}),
    "training.eval_steps": (7, {}),
    "training.save_total_limit": (1, {"training.save_steps": 1}),
    "training.early_stopping_patience": (9, {}),
    "training.seed": (7, {}),
}
ELSEWHERE = {
    "model.name",  # all of it
    "model.revision",  # test_hub.py
    "model.cache_dir",  # test_hub.py
    "model.trust_remote_code",  # test_loading.py
    "lora.bias",  # test_adapters.py, on a model with biases
    "training.compile",  # test_gpu.py
    "training.liger",  # test_liger.py
    "training.logging_steps",  # below
    "training.on_disk_full",  # test_survival.py
    "training.profile",  # test_profile.py
    "training.trackers",  # test_tracking.py
}


@pytest.fixture(autouse=True)
def _threads_stay() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def asked(values: dict[str, Any]) -> RunConfig:
    return RunConfig().with_values({"model.name": "demo", "data.train_file": "sample:chat"} | values)


def seen(values: dict[str, Any]) -> dict[str, Any]:
    """What the engine is about to work with, the config and the plan's words left out."""
    material = prepare_run(asked(values))
    objective, optimizer, schedule = assemble(material, None)
    plan, model = material.plan.to_dict(), objective.model
    settings = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    weights = model.named_parameters()
    return {
        "plan": {name: plan[name] for name in ("steps", "warmup_steps", "memory", "disk", "trained_parameters")},
        "data": hashlib.sha256(material.train.ids.tobytes()).hexdigest(),
        "schedule": asdict(schedule),
        "optimizer": (type(optimizer).__name__, settings),
        "weights": [(name, part.dtype, part.shape, part.requires_grad, float(part.float().sum())) for name, part in weights],
        "modules": [(type(one).__name__, getattr(one, "p", None), getattr(one, "scaling", None)) for one in model.modules()],
        "recomputed": ["forward" in vars(one) for one in blocks(model)],
        "dtype": objective.dtype,
        "threads": torch.get_num_threads(),
    }


@cache
def plainly() -> dict[str, Any]:
    return seen({})


@pytest.mark.parametrize("knob", CHANGES)
def test_a_knob_changes_what_is_trained(knob: str) -> None:
    value, beside = CHANGES[knob]
    before, after = seen(beside) if beside else plainly(), seen(beside | {knob: value})
    assert [name for name in before if before[name] != after[name]], f"{knob} changes nothing"


def test_no_knob_of_these_sections_is_forgotten() -> None:
    here = {path for path in knobs() if path.partition(".")[0] in ("model", "method", "lora", "training")}
    assert set(CHANGES) | ELSEWHERE == here


def test_lines_of_the_log_come_every_so_many_steps(capsys: pytest.CaptureFixture[str]) -> None:
    lines = []
    for every in (1, 3):
        plan = prepare_run(asked({"training.logging_steps": every})).plan.to_dict()
        terminal = Terminal()
        terminal(Planned(plan | {"machine": "here"}))
        capsys.readouterr()
        for step in range(1, 10):
            terminal(Stepped(step, 10, 1.0, 2.0, 1e-4, 0.5, 100, 60, 0.1))
        lines.append(capsys.readouterr().err.count("loss"))
    assert lines == [9, 3]


def test_answers_during_training_take_a_line_of_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal()
    for stage, step in (("answer", 0), ("train", 5), ("answer", 10)):
        terminal(Stage(stage))
        for prompt in ("Who?", "Where?"):
            terminal(Sampled(step, prompt, "It was\n" + "the same cat again, " * 20))
    lines = [line for line in capsys.readouterr().err.split("\n") if "cat" in line]
    assert len(lines) == 1 and lines[0].startswith("step 5 answers: It was the same cat") and len(lines[0]) < 110
