"""From a plan to the objects that train: model, objective, optimizer and schedule."""

from __future__ import annotations

import random
from typing import Any

import torch

from llm_finetune_kit.material import Material
from llm_finetune_kit.models.adapters import add_lora
from llm_finetune_kit.models.loading import DTYPES, load_base, train_all
from llm_finetune_kit.training.loop import Schedule
from llm_finetune_kit.training.optimizer import learning_rates, make_optimizer
from llm_finetune_kit.training.step import Objective


def assemble(material: Material, loaded: Any) -> tuple[Any, Any, Any]:
    """The objective, the optimizer and the schedule that a plan describes."""
    plan, config, training = material.plan, material.plan.config, material.plan.config.training
    torch.manual_seed(training.seed)
    random.seed(training.seed)
    dtype = str(config.model.dtype)
    base = (
        loaded
        if loaded is not None
        else load_base(material.located, dtype if config.method == "lora" else "float32", plan.device)
    )
    if config.method == "lora":
        lora = config.lora
        targets = list(lora.target_modules or [])
        model = add_lora(
            base,
            r=int(lora.r or 16),
            alpha=int(lora.alpha or 32),
            dropout=lora.dropout,
            targets=targets,
            base_name=material.located.loadable,
            seed=training.seed,
        )
    else:
        model = train_all(base)
    if training.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = make_optimizer(model.parameters(), training.weight_decay)
    rates = learning_rates(training.schedule, plan.steps, float(training.learning_rate or 0), plan.warmup_steps)
    schedule = Schedule(
        rates=rates,
        examples_per_step=plan.examples_per_step,
        tokens_per_pass=int(training.tokens_per_pass or 2048),
        packing=training.packing,
        max_grad_norm=training.max_grad_norm,
        eval_steps=int(training.eval_steps or plan.steps),
        save_steps=int(training.save_steps or plan.steps),
        patience=training.early_stopping_patience if material.held_out is not None else None,
        seed=training.seed,
    )
    return Objective(model, DTYPES[dtype]), optimizer, schedule
