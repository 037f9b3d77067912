"""From a plan to the objects that train: model, objective, optimizer and schedule."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from llm_finetune_kit.data.prefixes import worth_sharing
from llm_finetune_kit.hardware import release_memory
from llm_finetune_kit.material import Material
from llm_finetune_kit.models.adapters import add_lora
from llm_finetune_kit.models.freezing import freeze
from llm_finetune_kit.models.loading import DTYPES, load_base, train_all
from llm_finetune_kit.plan.contradictions import without_liger
from llm_finetune_kit.training.compiled import compile_blocks
from llm_finetune_kit.training.fused import fuse
from llm_finetune_kit.training.loop import Schedule
from llm_finetune_kit.training.optimizer import learning_rates, make_optimizer
from llm_finetune_kit.training.recompute import recompute_blocks
from llm_finetune_kit.training.step import Objective


def assemble(material: Material, loaded: Any) -> tuple[Any, Any, Any]:
    """The objective, the optimizer and the schedule that a plan describes."""
    plan, config, training = material.plan, material.plan.config, material.plan.config.training
    torch.manual_seed(training.seed)
    random.seed(training.seed)
    np.random.seed(training.seed)
    dtype = str(config.model.dtype)
    if training.threads is not None and plan.device == "cpu":
        torch.set_num_threads(training.threads)
    base = loaded if loaded is not None else _base(material, dtype)
    model = _adapted(base, material) if config.method == "lora" else train_all(base)
    if config.method == "full":
        freeze(model, training.freeze_layers)
    objective = Objective(model, DTYPES[dtype])
    if training.compile and config.model.quantization is None:
        objective.not_compiled = compile_blocks(objective)
    if training.liger and without_liger(training, config.model.quantization, plan.device) is None:
        objective.not_fused = fuse(objective)
    if training.gradient_checkpointing:
        recompute_blocks(model, training.checkpoint_every or 1)
    kind = training.optimizer or "adamw"
    optimizer = make_optimizer(model.named_parameters(), training.weight_decay, kind=kind, plus_ratio=config.lora.plus_ratio)
    rates = learning_rates(training.schedule, plan.steps, float(training.learning_rate or 0), plan.warmup_steps)
    schedule = Schedule(
        rates=rates,
        examples_per_step=plan.examples_per_step,
        tokens_per_pass=int(training.tokens_per_pass or 2048),
        packing=training.packing,
        sharing=worth_sharing(material.model.block_parameters) if training.share_prompts and objective.shares else None,
        max_grad_norm=training.max_grad_norm,
        eval_steps=int(training.eval_steps or plan.steps),
        save_steps=int(training.save_steps or plan.steps),
        sample_steps=int(config.evaluation.sample_steps or plan.steps),
        patience=training.early_stopping_patience if material.held_out is not None else None,
        seed=training.seed,
        scaled=dtype == "float16",
    )
    return objective, optimizer, schedule


def _base(material: Material, dtype: str) -> Any:
    config, device = material.plan.config, material.plan.device
    if config.method == "full":
        return load_base(material.located, "float32", device)
    quantization, double = config.model.quantization, config.model.double_quantization
    base = load_base(material.located, dtype, device, quantization=quantization, double_quantization=double)
    if quantization is not None and device == "cpu":
        release_memory()  # what packing left behind
    return base


def _adapted(base: Any, material: Material) -> Any:
    config = material.plan.config
    lora = config.lora
    return add_lora(
        base,
        r=int(lora.r or 16),
        alpha=int(lora.alpha or 32),
        dropout=lora.dropout,
        targets=list(lora.target_modules or []),
        base_name=material.located.loadable,
        seed=config.training.seed,
        variant=lora.variant,
        init=lora.init,
        bias=lora.bias,
        modules_to_save=lora.modules_to_save,
        vocabulary=len(material.chat.tokenizer),
    )
