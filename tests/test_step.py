"""The step: what is computed never depends on how, and transformers' Trainer walks the same path."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments, default_data_collator

from llm_finetune_kit.data.batches import Pass, make_passes, step_examples
from llm_finetune_kit.data.masks import Tokens
from llm_finetune_kit.errors import ModelError
from llm_finetune_kit.events import Event, Stepped
from llm_finetune_kit.models.adapters import add_lora
from llm_finetune_kit.models.attention import NAME, register
from llm_finetune_kit.models.loading import load_base, train_all
from llm_finetune_kit.models.locate import Located
from llm_finetune_kit.training import step
from llm_finetune_kit.training.checkpoint import Progress, restore_weights, weights_writer
from llm_finetune_kit.training.loop import Schedule, fit
from llm_finetune_kit.training.optimizer import learning_rates, make_optimizer
from llm_finetune_kit.training.recompute import recompute_blocks
from llm_finetune_kit.training.step import HeadLoss, Objective, accumulate, mean_loss

IGNORED = -100  # the label that torch's cross entropy skips
VOCABULARY = 128
LENGTHS = (3, 40, 11, 2, 75, 5, 23, 17)  # very uneven, so that a mean of means would be wrong
PROMPTS = (1, 24, 2, 1, 68, 1, 7, 12)  # tokens of each row that are not learned

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
ALTERNATING = ["sliding_attention", "full_attention"]
GEMMA = SMALL | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6, "layer_types": ALTERNATING}
# Windows are shorter than the longest row, so that a forgotten window shows.
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, **NO_DROPOUT},
    "llama": SMALL,
    "mistral": SMALL | {"sliding_window": 7},
    "phi3": SMALL | {"sliding_window": 9},
    "qwen2": SMALL,
    "qwen3": SMALL | {"head_dim": 8},
    "gemma": SMALL | {"head_dim": 8},
    "gemma2": GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3_text": GEMMA,
}
SCALED_HEADS: dict[str, dict[str, Any]] = {
    "granite": SMALL | {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5},
    "cohere": SMALL | {"logit_scale": 0.25},
}
# Their attention takes no `documents`, or is not transformers' exchangeable one at all.
OWN_WAYS: dict[str, dict[str, Any]] = {
    "stablelm": SMALL,
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
}


pytestmark = pytest.mark.usefixtures("one_thread")


@functools.cache
def _built(family: str) -> Any:
    settings = (FAMILIES | SCALED_HEADS | OWN_WAYS)[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings), attn_implementation="eager").float()
    with torch.no_grad():
        for parameter in model.parameters():  # larger than at birth: attention, norms and biases then matter
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def tiny(family: str) -> Any:
    """A fresh copy of a random model of the family, in float32, with the attention that `load_base` gives it."""
    register()
    model = copy.deepcopy(_built(family))
    model.set_attn_implementation(NAME)
    return model


def loaded(family: str, folder: Path, dtype: str = "float32") -> Any:
    """The same model as a run gets it: from its files, with all that `load_base` does to it."""
    _built(family).save_pretrained(folder)
    return load_base(Located(family, folder), dtype)


def rows(lengths: tuple[int, ...] = LENGTHS, prompts: tuple[int, ...] = PROMPTS, seed: int = 0) -> Tokens:
    """Random rows; of each the tokens after its prompt are learned."""
    random = np.random.default_rng(seed)
    ids = np.concatenate([random.integers(3, VOCABULARY, length) for length in lengths]).astype(np.int32)
    trained = np.concatenate([np.arange(length) >= prompt for length, prompt in zip(lengths, prompts, strict=True)])
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Tokens(ids, trained, starts, np.arange(len(lengths), dtype=np.int32))


def padded(tokens: Tokens, order: Any = None) -> dict[str, torch.Tensor]:
    """The same rows as every other trainer has them: padded on the right, with -100 where nothing is learned."""
    order = range(len(tokens)) if order is None else order
    width = int(tokens.lengths.max())
    batch = {
        "input_ids": torch.zeros(len(order), width, dtype=torch.long),
        "attention_mask": torch.zeros(len(order), width, dtype=torch.long),
        "labels": torch.full((len(order), width), IGNORED),
    }
    for place, index in enumerate(order):
        ids, trained = (torch.from_numpy(part.copy()) for part in tokens.example(int(index)))
        batch["input_ids"][place, : len(ids)] = ids
        batch["attention_mask"][place, : len(ids)] = 1
        batch["labels"][place, : len(ids)] = torch.where(trained, ids, IGNORED)
    return batch


def plain_loss(model: Any, tokens: Tokens) -> torch.Tensor:
    """The textbook: one padded batch through the model as transformers runs it, cross entropy over all logits."""
    batch = padded(tokens)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    flat = logits[:, :-1].flatten(0, 1).float()
    return cross_entropy(flat, batch["labels"][:, 1:].flatten(), ignore_index=IGNORED)


def gradient(model: Any) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.requires_grad])


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def textbook(family: str, tokens: Tokens) -> tuple[float, torch.Tensor]:
    """Loss and gradient by transformers' own attention (eager), all logits and autograd."""
    model = copy.deepcopy(_built(family))
    loss = plain_loss(model.train(), tokens)
    loss.backward()
    return loss.item(), gradient(model)


def in_passes(objective: Objective, passes: list[Pass]) -> tuple[float, torch.Tensor]:
    objective.model.zero_grad()
    objective.model.train()
    loss = float(accumulate(objective, passes))
    return loss, gradient(objective.model)


# How the same eight examples may be computed.
WAYS: dict[str, Callable[[Tokens], list[Pass]]] = {
    "all eight in one pass": lambda tokens: make_passes(tokens, range(8), 10**6),
    "packed into a few": lambda tokens: make_passes(tokens, range(8), 90),
    "one document a pass": lambda tokens: make_passes(tokens, range(8), 16, packing=False),
    "eight steps of one": lambda tokens: [made for index in range(8) for made in make_passes(tokens, [index], 64)],
    "in another order": lambda tokens: make_passes(tokens, [5, 2, 7, 0, 1, 6, 4, 3], 10**6),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_passes_are_mechanics_and_never_change_the_gradient(family: str, tmp_path: Path) -> None:
    tokens = rows()
    loss, reference = textbook(family, tokens)
    objective = Objective(loaded(family, tmp_path), torch.float32)
    assert objective.plain_head
    assert objective.packs
    for way, arranged in WAYS.items():
        ours, grad = in_passes(objective, arranged(tokens))
        assert ours == pytest.approx(loss, rel=1e-6), way
        assert apart(grad, reference) < 1e-5, way


def alike() -> Tokens:
    """The same rows, of which four begin with the same 20 tokens, two of these with 35, and two others with 9 of them."""
    tokens = rows((60, 41, 33, 75, 22, 30, 12, 17), (40, 24, 30, 68, 21, 20, 9, 7))
    starts = tokens.starts
    for source, target, count in ((0, 1, 20), (0, 2, 20), (0, 3, 35), (1, 4, 20), (0, 6, 9), (5, 7, 7)):
        tokens.ids[starts[target] : starts[target] + count] = tokens.ids[starts[source] : starts[source] + count]
    return tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_beginnings_that_prompts_share_are_computed_once_with_the_same_gradient(family: str, tmp_path: Path) -> None:
    tokens = alike()
    loss, reference = textbook(family, tokens)
    objective = Objective(loaded(family, tmp_path), torch.float32)
    assert objective.shares
    for budget in (10**6, 120, 64):
        passes = make_passes(tokens, range(8), budget, sharing=8)
        assert sum(work.shared for work in passes) >= 20
        ours, grad = in_passes(objective, passes)
        assert ours == pytest.approx(loss, rel=1e-6)
        assert apart(grad, reference) < 1e-5
        assert mean_loss(objective, passes)[0] == pytest.approx(loss, rel=1e-6)


def test_beginnings_are_shared_under_lora_in_bfloat16_and_with_recomputing() -> None:
    tokens = alike()
    grads = []
    for sharing, every in ((None, 0), (8, 0), (8, 1)):
        model = add_lora(
            tiny("llama").bfloat16(), r=4, alpha=8, dropout=0.0, targets=["q_proj", "down_proj"], base_name="x", seed=1
        )
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    weight.normal_(std=0.1)
        torch.manual_seed(0)
        recompute_blocks(model, every)
        grads.append(in_passes(Objective(model, torch.bfloat16), make_passes(tokens, range(8), 10**6, sharing=sharing))[1])
    assert apart(grads[1], grads[0]) < 2e-2
    assert torch.equal(grads[1], grads[2])


@pytest.mark.parametrize("drops", ["the model's", "the adapter's"])
def test_nothing_is_shared_where_dropout_is_at_work(drops: str) -> None:
    model = tiny("gpt2")
    if drops == "the model's":
        model.transformer.drop.p = 0.1
    else:
        model = add_lora(model, r=2, alpha=2, dropout=0.1, targets=["c_attn"], base_name="x", seed=0)
    objective = Objective(model, torch.float32)
    assert objective.packs
    assert not objective.shares


@pytest.mark.parametrize("family", SCALED_HEADS)
def test_a_head_that_is_more_than_a_linear_layer_is_computed_by_its_model(family: str, tmp_path: Path) -> None:
    tokens = rows()
    loss, reference = textbook(family, tokens)
    objective = Objective(loaded(family, tmp_path), torch.float32)
    assert not objective.plain_head
    for way, arranged in WAYS.items():
        ours, grad = in_passes(objective, arranged(tokens))
        assert ours == pytest.approx(loss, rel=1e-6), way
        assert apart(grad, reference) < 1e-5, way


@pytest.mark.parametrize("family", OWN_WAYS)
def test_a_model_that_would_mix_packed_documents_computes_each_alone(family: str, tmp_path: Path) -> None:
    tokens = rows()
    loss, reference = textbook(family, tokens)
    objective = Objective(loaded(family, tmp_path), torch.float32)
    assert not objective.packs
    assert not objective.shares
    for way, arranged in WAYS.items():
        ours, grad = in_passes(objective, arranged(tokens))
        assert ours == pytest.approx(loss, rel=1e-6), way
        assert apart(grad, reference) < 1e-5, way


def test_attention_with_sinks_is_refused_rather_than_computed_without_them() -> None:
    register()
    settings = SMALL | {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 6}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_oss", **settings), attn_implementation=NAME)
    with pytest.raises(ModelError, match="sinks"):
        Objective(model, torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_computes_the_same_outside_training(family: str) -> None:
    """Padded batches, no mask at all, and generation with a cache, under our attention and under transformers'."""
    ours, theirs = tiny(family).eval(), copy.deepcopy(_built(family)).eval()
    batch = padded(rows())
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        logits = [
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[real] for model in (ours, theirs)
        ]
        unmasked = [model(input_ids=batch["input_ids"]).logits for model in (ours, theirs)]
        asked = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        prompt = batch["input_ids"][4:5, :30]
        answers = [model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **asked) for model in (ours, theirs)]
    assert apart(*logits) < 1e-5
    assert apart(*unmasked) < 1e-5
    assert torch.equal(*answers)


# --- the head ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize(("rows_at_once", "rows_in_float32"), [(1, 1), (4, 3), (1000, 2), (1000, 1000)])
def test_head_loss_is_cross_entropy(
    dtype: torch.dtype,
    bias: bool,
    softcap: float | None,
    rows_at_once: int,
    rows_in_float32: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(step.HEAD_WORKSPACE, "cpu", dtype.itemsize * 50 * rows_at_once)
    monkeypatch.setitem(step.HEAD_SLICE, "cpu", 4 * 50 * rows_in_float32)
    torch.manual_seed(1)
    hidden, weight, shift = (torch.randn(*shape, dtype=dtype) for shape in ((11, 16), (50, 16), (50,)))
    labels, scale = torch.randint(50, (11,)), 0.25
    ours = [part.clone().requires_grad_() for part in (hidden, weight, shift)]
    theirs = [part.double().clone().requires_grad_() for part in (hidden, weight, shift)]

    loss = HeadLoss.apply(ours[0], ours[1], ours[2] if bias else None, labels, softcap, dtype, scale)
    (3 * loss).backward()
    logits = theirs[0] @ theirs[1].T + (theirs[2] if bias else 0)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    expected = scale * cross_entropy(logits, labels, reduction="sum")
    (3 * expected).backward()

    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    for mine, reference in zip(ours[: 2 + bias], theirs[: 2 + bias], strict=True):
        assert mine.grad is not None and reference.grad is not None
        assert mine.grad.dtype == dtype
        assert apart(mine.grad, reference.grad) < 1e-6
    assert bias or ours[2].grad is None


def test_head_loss_learns_only_what_is_to_be_learned() -> None:
    torch.manual_seed(1)
    hidden, weight, labels = torch.randn(5, 8), torch.randn(20, 8), torch.randint(20, (5,))
    for learns in (0, 1):
        parts = [hidden.clone(), weight.clone()]
        parts[learns].requires_grad_()
        HeadLoss.apply(*parts, None, labels, None, torch.float32, 1.0).backward()
        assert parts[learns].grad is not None
        assert parts[1 - learns].grad is None


def test_held_out_loss_is_the_loss_that_training_sees() -> None:
    tokens, objective = rows(), Objective(tiny("llama"), torch.float32)
    loss, targets = mean_loss(objective, make_passes(tokens, range(8), 90))
    assert targets == tokens.targets.sum()
    assert loss == pytest.approx(float(plain_loss(tiny("llama"), tokens)), rel=1e-6)


# --- against Trainer ---------------------------------------------------------------------------------------

STEPS, EXAMPLES = 5, 8


def by_trainer(model: Any, tokens: Tokens, folder: Path, order: np.ndarray) -> list[dict[str, float]]:
    model.set_attn_implementation("sdpa")
    batch = padded(tokens, order)
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=EXAMPLES // 2,
        max_steps=STEPS,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        weight_decay=0.01,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        train_sampling_strategy="sequential",
        adam_beta2=0.999,
        disable_tqdm=True,
    )
    data = [{name: values[place] for name, values in batch.items()} for place in range(len(order))]
    trainer = Trainer(model, arguments, train_dataset=data, data_collator=default_data_collator)
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


def by_us(model: Any, tokens: Tokens, *, rates: list[float] | None = None, budget: int = 120) -> list[Stepped]:
    rates = rates or [1e-3] * STEPS
    schedule = Schedule(
        rates=rates,
        examples_per_step=EXAMPLES,
        tokens_per_pass=budget,
        packing=True,
        max_grad_norm=1.0,
        eval_steps=10**6,
        save_steps=10**6,
        patience=None,
        seed=3,
    )
    heard: list[Event] = []
    objective = Objective(model, torch.float32)
    optimizer = make_optimizer(model.parameters(), 0.01)
    assert fit(objective, optimizer, tokens, None, schedule, Progress(), lambda now: None, heard.append) == "all steps done"
    return [event for event in heard if isinstance(event, Stepped)]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_our_loop_walks_the_path_of_trainer(family: str, tmp_path: Path) -> None:
    random = np.random.default_rng(5)
    lengths = tuple(int(length) for length in random.integers(2, 60, 24))
    tokens = rows(lengths, tuple(int(random.integers(1, length)) for length in lengths))
    order = np.concatenate([step_examples(24, EXAMPLES, 3, number) for number in range(STEPS)])
    ours, theirs = tiny(family), tiny(family)
    reference = by_trainer(theirs, tokens, tmp_path, order)
    heard = by_us(ours, tokens)

    assert [event.loss for event in heard] == pytest.approx([line["loss"] for line in reference], rel=1e-4)
    assert [event.gradient_norm for event in heard] == pytest.approx([line["grad_norm"] for line in reference], rel=1e-4)
    assert max(event.gradient_norm for event in heard) > 1  # so clipping is compared too
    moved = [
        torch.cat([(now - then).flatten() for now, then in zip(model.parameters(), tiny(family).parameters(), strict=True)])
        for model in (ours, theirs)
    ]
    assert apart(*moved) < 1e-2  # Adam turns rounding of near-zero gradients into whole steps
    assert heard[0].target_tokens == tokens.targets[order[:EXAMPLES]].sum()


def test_matrices_decay_and_vectors_do_not() -> None:
    matrix, vector = (torch.nn.Parameter(torch.ones(shape)) for shape in ((3, 3), (3,)))
    optimizer = make_optimizer([matrix, vector], weight_decay=0.5)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    matrix.grad, vector.grad = torch.zeros_like(matrix), torch.zeros_like(vector)
    optimizer.step()
    assert torch.allclose(matrix, torch.full((3, 3), 1 - 0.1 * 0.5))
    assert torch.equal(vector, torch.ones(3))


@pytest.mark.parametrize(("schedule", "middle", "last"), [("cosine", 0.5, 0.01), ("linear", 0.5, 0.05), ("constant", 1.0, 1.0)])
def test_the_learning_rate_rises_to_its_peak_and_falls_by_the_schedule(schedule: str, middle: float, last: float) -> None:
    rates = learning_rates(schedule, 50, 2.0, 10)
    assert len(rates) == 50
    assert rates[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
    assert max(rates) == rates[9] == rates[10] == 2.0
    assert rates[30] == pytest.approx(2.0 * middle)
    assert 0 < rates[-1] <= 2.0 * last
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rates(schedule, 1, 2.0, 0) == [2.0]
    assert learning_rates(schedule, 3, 3.0, 3) == pytest.approx([1.0, 2.0, 3.0])


# --- precision and memory ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_bfloat16_stays_within_a_percent(family: str) -> None:
    tokens = rows()
    loss, reference = textbook(family, tokens)
    for model in (tiny(family), tiny(family).bfloat16()):  # trained weights stay float32; frozen ones do not
        ours, grad = in_passes(Objective(model, torch.bfloat16), make_passes(tokens, range(8), 90))
        assert ours == pytest.approx(loss, rel=1e-2)
        assert apart(grad, reference) < 5e-2


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3_text"])
def test_recomputing_activations_changes_no_gradient(family: str) -> None:
    tokens, model = rows(), tiny(family)
    passes, computed = make_passes(tokens, range(8), 90), []
    objective = Objective(model, torch.float32)
    next(module for module in model.modules() if "MLP" in type(module).__name__).register_forward_pre_hook(
        lambda *_: computed.append(1)
    )
    loss, reference = in_passes(objective, passes)
    assert len(computed) == len(passes)
    recompute_blocks(model, 1)
    again, grad = in_passes(objective, passes)
    assert len(computed) == 3 * len(passes)  # now each is computed twice
    assert again == loss
    assert torch.equal(grad, reference)


def test_recomputing_works_under_lora_with_dropout() -> None:
    tokens, grads = rows(), []
    for recompute in (False, True):
        model = with_lora(tiny("llama"), dropout=0.3)
        if recompute:
            recompute_blocks(model, 1)
        objective = Objective(model, torch.float32)
        torch.manual_seed(9)
        grads.append(in_passes(objective, make_passes(tokens, range(8), 90))[1])
    assert float(grads[0].norm()) > 0
    assert torch.equal(*grads)


# --- LoRA --------------------------------------------------------------------------------------------------

TARGETS = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],  # not nn.Linear, and with biases
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "qwen2": ["q_proj", "v_proj", "down_proj"],  # some layers with biases, some layers left alone
}


def with_lora(model: Any, *, dropout: float = 0.0, targets: list[str] | None = None) -> Any:
    """With an adapter whose second matrices are not 0, as they are at birth."""
    targets = targets or TARGETS[model.config.model_type]
    model = add_lora(model, r=4, alpha=8, dropout=dropout, targets=targets, base_name="base", seed=1)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def by_peft(model: Any) -> Any:
    """The same adapter in PEFT's own layers."""
    targets = TARGETS[model.config.model_type]
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=targets, fan_in_fan_out=model.config.model_type == "gpt2")
    return get_peft_model(model, settings)


@pytest.mark.parametrize("family", TARGETS)
def test_lora_is_what_peft_computes(family: str) -> None:
    tokens, ours, theirs = rows(), with_lora(tiny(family)), by_peft(copy.deepcopy(_built(family)))
    theirs.load_state_dict(ours.state_dict())
    loss = plain_loss(theirs.train(), tokens)
    loss.backward()
    objective = Objective(ours, torch.float32)
    for way, arranged in WAYS.items():
        found, grad = in_passes(objective, arranged(tokens))
        assert found == pytest.approx(loss.item(), rel=1e-6), way
        assert apart(grad, gradient(theirs)) < 1e-5, way
    half = with_lora(tiny(family).bfloat16())
    found, grad = in_passes(Objective(half, torch.bfloat16), make_passes(tokens, range(8), 90))
    assert found == pytest.approx(loss.item(), rel=1e-2)
    assert apart(grad, gradient(theirs)) < 5e-2


@pytest.mark.parametrize("family", TARGETS)
def test_an_adapter_that_is_switched_off_leaves_the_base(family: str) -> None:
    model = with_lora(tiny(family)).eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        base, tuned = _built(family).eval()(input_ids=ids).logits, model(input_ids=ids).logits
        with model.disable_adapter():
            off = model(input_ids=ids).logits
        merged = model.merge_and_unload()(input_ids=ids).logits
    assert apart(tuned, base) > 1e-2
    assert apart(off, base) < 1e-6
    assert apart(merged, tuned) < 1e-5


# --- training trains ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("frozen", [torch.float32, torch.bfloat16])
def test_under_lora_every_adapter_matrix_moves_and_no_base_weight_does(family: str, frozen: torch.dtype) -> None:
    model = with_lora(tiny(family).to(frozen))
    if frozen is torch.bfloat16:
        assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
        assert {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad} == {torch.bfloat16}
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    schedule = Schedule([1e-3] * 3, 8, 120, True, 1.0, 10**6, 10**6, None, 3)
    objective = Objective(model, frozen)
    fit(objective, make_optimizer(model.parameters(), 0.0), rows(), None, schedule, Progress(), lambda _: None, lambda _: None)
    for name, parameter in model.named_parameters():
        assert ("lora_" in name) != torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_full_training_moves_every_weight_and_keeps_ties(family: str, tied: bool) -> None:
    model = tied_model(family) if tied else tiny(family)
    model = train_all(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    by_us(model, rows(), rates=[1e-3] * 2)
    assert [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])] == []
    if tied:
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def tied_model(family: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **FAMILIES[family], tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=NAME)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    return model.float()


def test_training_learns_rows_by_heart() -> None:
    heard = by_us(tiny("llama"), rows(), rates=[1e-2] * 40)
    assert heard[-1].loss < 0.1 * heard[0].loss


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_weights_come_back_bit_for_bit(family: str, tied: bool, tmp_path: Path) -> None:
    model = tied_model(family) if tied else tiny(family)
    weights_writer(model)(tmp_path)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    restore_weights(other, tmp_path)
    for (name, kept), back in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(kept, back), name


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    weights_writer(tiny("llama"))(tmp_path)
    with pytest.raises(ModelError, match="does not fit"):
        restore_weights(tiny("gpt2"), tmp_path)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    weights_writer(with_lora(tiny("llama")))(adapter)
    with pytest.raises(ModelError, match="does not fit"):
        restore_weights(with_lora(tiny("gpt2")), adapter)
