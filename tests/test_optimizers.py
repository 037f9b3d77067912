"""Optimizers of every kind, recomputed activations, and float16's loss scale."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_finetune_kit.data.batches import make_passes
from llm_finetune_kit.errors import MachineError, TrainingError
from llm_finetune_kit.models.freezing import blocks, freeze
from llm_finetune_kit.models.loading import DTYPES, load_base, train_all
from llm_finetune_kit.models.locate import Located
from llm_finetune_kit.plan.contradictions import OPTIMIZERS, optimizers_on
from llm_finetune_kit.training import scaling
from llm_finetune_kit.training.checkpoint import Progress, restore, take
from llm_finetune_kit.training.loop import Schedule, fit
from llm_finetune_kit.training.optimizer import make_optimizer, restore_state, state_tensors
from llm_finetune_kit.training.recompute import recompute_blocks
from llm_finetune_kit.training.scaling import LossScale
from llm_finetune_kit.training.step import Objective, accumulate
from test_adapters import adapted, base_of, shake
from test_step import TARGETS, WAYS, apart, gradient, in_passes, rows, tiny

HERE = optimizers_on("cpu")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def weights(seed: int = 0) -> list[tuple[str, torch.nn.Parameter]]:
    """One matrix large enough for 8-bit state, one that is not, and a vector."""
    torch.manual_seed(seed)
    shapes = {"large": (96, 64), "small": (8, 8), "vector": (64,)}
    return [(name, torch.nn.Parameter(torch.randn(shape))) for name, shape in shapes.items()]


def walk(optimizer: Any, named: list[tuple[str, torch.nn.Parameter]], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for _, parameter in named:
            parameter.grad = torch.randn(parameter.shape, generator=generator) + 0.5 * parameter.detach()
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * group["rate_factor"]
        optimizer.step()


# --- kinds -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", HERE)
def test_every_kind_is_adamw(kind: str) -> None:
    """Against AdamW written out; 8 bits differ a little in the large matrix and in nothing else."""
    named = weights()
    references = [part.detach().double() for _, part in named]
    moments = [[torch.zeros_like(part), torch.zeros_like(part)] for part in references]
    walk(make_optimizer(named, 0.1, kind=kind), named, range(20))
    for step in range(20):
        generator = torch.Generator().manual_seed(step)
        for part, (first, second), (_, parameter) in zip(references, moments, named, strict=True):
            slope = torch.randn(part.shape, generator=generator).double() + 0.5 * part
            part *= 1 - 1e-2 * (0.1 if parameter.ndim > 1 else 0.0)
            first.mul_(0.9).add_(0.1 * slope)
            second.mul_(0.999).add_(0.001 * slope.square())
            ahead = first / (1 - 0.9 ** (step + 1)) / ((second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
            part -= 1e-2 * ahead
    for (name, parameter), part, (_, start) in zip(named, references, weights(), strict=True):
        moved = (part - start.detach()).norm()
        error = float((parameter.detach() - part).norm() / moved)
        assert error < (0.03 if kind == "adamw_8bit" and name == "large" else 1e-5), name


def test_eight_bits_take_a_quarter_of_the_state() -> None:
    sizes = {}
    for kind in HERE:
        named = [("large", torch.nn.Parameter(torch.randn(512, 512)))]
        optimizer = make_optimizer(named, 0.0, kind=kind)
        walk(optimizer, named, range(1))
        sizes[kind] = sum(part.numel() * part.element_size() for part in state_tensors(optimizer, named).values())
    assert sizes["adamw"] == pytest.approx(8 * 512 * 512, rel=1e-3)
    assert sizes["adamw_8bit"] == pytest.approx(2 * 512 * 512, rel=0.03)


@pytest.mark.parametrize("kind", HERE)
def test_a_resumed_optimizer_goes_on_bit_for_bit(kind: str) -> None:
    named = weights()
    optimizer = make_optimizer(named, 0.1, kind=kind)
    walk(optimizer, named, range(5))
    kept = state_tensors(optimizer, named)
    halfway = [parameter.detach().clone() for _, parameter in named]
    walk(optimizer, named, range(5, 12))
    assert not any(name.startswith("qmap") for name in kept)

    other = weights(seed=1)
    again = make_optimizer(other, 0.1, kind=kind)
    walk(again, other, range(1))  # a state that is already there is replaced
    with torch.no_grad():
        for (_, parameter), values in zip(other, halfway, strict=True):
            parameter.copy_(values)
    restore_state(again, other, kept)
    walk(again, other, range(5, 12))
    for (name, parameter), (_, expected) in zip(other, named, strict=True):
        assert torch.equal(parameter, expected), name
    first, second = state_tensors(optimizer, named), state_tensors(again, other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("kind", HERE)
def test_a_weight_that_had_no_gradient_has_no_state(kind: str) -> None:
    named = weights()
    optimizer = make_optimizer(named, 0.0, kind=kind)
    for _, parameter in named[:2]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    kept = state_tensors(optimizer, named)
    assert {key.rpartition("/")[2] for key in kept} == {"large", "small"}
    restore_state(optimizer, named, kept)
    assert state_tensors(optimizer, named).keys() == kept.keys()


@pytest.mark.parametrize("kind", HERE)
def test_every_kind_learns(kind: str) -> None:
    model = train_all(tiny("llama"))
    objective, passes = Objective(model, torch.float32), WAYS["all eight in one pass"](rows())
    optimizer = make_optimizer(model.named_parameters(), 0.0, kind=kind)
    losses = []
    for _ in range(30):
        losses.append(float(accumulate(objective, passes)))
        for group in optimizer.param_groups:
            group["lr"] = 1e-2
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("kind", [kind for kind in OPTIMIZERS if kind not in HERE])
def test_a_kind_that_cannot_run_here_is_refused(kind: str) -> None:
    with pytest.raises(MachineError, match="does not run on cpu") as refused:
        make_optimizer(weights(), 0.0, kind=kind)
    assert "adamw_8bit" in refused.value.fix


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MachineError, match="needs the package bitsandbytes") as refused:
        make_optimizer(weights(), 0.0, kind="adamw_8bit")
    assert "pip install 'llm-finetune-kit[quantization]'" in refused.value.fix
    assert isinstance(make_optimizer(weights(), 0.0), torch.optim.AdamW)


@pytest.mark.parametrize("family", TARGETS)
def test_lora_plus_moves_b_faster(family: str) -> None:
    """Adam's first step moves every weight by its rate, so the rates can be read off."""
    model = shake(adapted(base_of(family), "all biases"))
    in_passes(Objective(model, torch.float32), WAYS["all eight in one pass"](rows()))
    before = {name: part.detach().clone() for name, part in model.named_parameters()}
    optimizer = make_optimizer(model.named_parameters(), 0.0, plus_ratio=16.0)
    for group in optimizer.param_groups:
        group["lr"] = 1e-4 * group["rate_factor"]
    optimizer.step()
    for name, part in model.named_parameters():
        if part.requires_grad:
            moved = float((part.detach() - before[name]).abs().max())
            assert moved == pytest.approx(16e-4 if ".lora_B." in name else 1e-4, rel=1e-2), name


# --- recomputed activations --------------------------------------------------------------------------------


def variant(family: str, way: str, folder: Path) -> Any:
    """A model to train: full, partly frozen, with an adapter (and dropout), or with one on 4 bits."""
    if way == "qlora":
        pytest.importorskip("bitsandbytes")
        tiny(family).save_pretrained(folder)
        return shake(adapted(load_base(Located(family, folder), "float32", quantization="nf4"), "lora"))
    if way in ("full", "frozen"):
        model = train_all(tiny(family))
        freeze(model, 1 if way == "frozen" else 0)
        return model
    return shake(adapted(base_of(family), "dora" if way == "dora" else "lora", dropout=0.3 if way == "dropout" else 0.0))


@pytest.mark.parametrize("way", ["full", "frozen", "lora", "dropout", "dora", "qlora"])
@pytest.mark.parametrize("family", TARGETS)
def test_recomputing_changes_no_gradient(family: str, way: str, tmp_path: Path) -> None:
    model = variant(family, way, tmp_path)
    objective, passes, results = Objective(model, torch.float32), make_passes(rows(), range(8), 90), []
    for every in (0, 1, 2, 0):
        recompute_blocks(model, every)
        torch.manual_seed(9)
        loss, _ = in_passes(objective, passes)
        grads = {name: part.grad.clone() for name, part in model.named_parameters() if part.grad is not None}
        results.append((loss, grads))
    for loss, grads in results[1:]:
        assert loss == results[0][0]
        assert grads.keys() == results[0][1].keys()
        for name, grad in grads.items():
            assert torch.equal(grad, results[0][1][name]), name


@pytest.mark.parametrize("family", TARGETS)
def test_only_every_nth_block_is_computed_again(family: str) -> None:
    model = train_all(tiny(family))
    objective, passes, seen = Objective(model, torch.float32), WAYS["all eight in one pass"](rows()), []
    for place, block in enumerate(blocks(model)):
        norm = next(module for module in block.modules() if "norm" in type(module).__name__.lower())
        norm.register_forward_pre_hook(lambda *_, place=place: seen.append(place))
    for every, expected in ((0, [0, 1]), (1, [0, 0, 1, 1]), (2, [0, 0, 1])):
        recompute_blocks(model, every)
        seen.clear()
        in_passes(objective, passes)
        assert sorted(seen) == expected
    recompute_blocks(model, 1)
    seen.clear()
    model.eval()
    with torch.no_grad():
        objective.summed(passes[0])
    assert sorted(seen) == [0, 1]


def kept_bytes(objective: Objective, passes: Any) -> int:
    """Bytes that autograd holds between forward and backward, each storage once, weights aside."""
    own = {part.untyped_storage().data_ptr() for part in objective.model.parameters()}
    held: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    objective.model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = objective.summed(passes[0])
    kept = sum(tensor.untyped_storage().nbytes() for tensor in held.values())
    loss.backward()
    return kept


@pytest.mark.parametrize("way", ["full", "lora", "qlora"])
def test_recomputing_keeps_less(way: str, tmp_path: Path) -> None:
    model = variant("llama", way, tmp_path)
    objective, passes, kept = Objective(model, torch.float32), WAYS["all eight in one pass"](rows()), {}
    for every in (0, 1, 2):
        recompute_blocks(model, every)
        kept[every] = kept_bytes(objective, passes)
    assert kept[1] < 0.4 * kept[0]
    assert kept[1] < kept[2] < 0.75 * kept[0]


# --- float16 -----------------------------------------------------------------------------------------------


def test_a_scaled_loss_keeps_small_gradients() -> None:
    """With losses so small that float16 would round their gradients to nothing, as deep models have them."""
    passes, objective = WAYS["packed into a few"](rows()), Objective(shake(adapted(base_of("llama"), "lora")), torch.float32)
    loss, reference = in_passes(objective, passes)
    half = Objective(shake(adapted(base_of("llama").half(), "lora")), torch.float16)
    tiny_step, found = 2.0**-20, {}
    for scale in (1.0, 2.0**20):
        half.model.zero_grad()
        assert float(accumulate(half, passes, tiny_step * scale)) == pytest.approx(loss, rel=1e-2)
        LossScale(tiny_step * scale).unscale(half.model.parameters())
        found[scale] = apart(gradient(half.model), reference)
    assert found[2.0**20] < 0.02 < 10 * 0.02 < found[1.0]


def test_an_overflow_is_seen_and_moves_nothing() -> None:
    passes, scale = WAYS["packed into a few"](rows()), LossScale(2.0**30)
    model = shake(adapted(base_of("llama").half(), "lora"))
    objective, tries = Objective(model.train(), torch.float16), 0
    optimizer = make_optimizer(model.named_parameters(), 0.0)
    trained = [part for part in model.parameters() if part.requires_grad]
    before = [part.detach().clone() for part in trained]
    while True:  # as the loop does it
        tries += 1
        loss = float(accumulate(objective, passes, scale.scale))
        scale.unscale(trained)
        norm = float(torch.nn.utils.clip_grad_norm_(trained, 1.0))
        if math.isfinite(norm):
            break
        assert math.isfinite(loss)
        scale.shrink()
        optimizer.zero_grad(set_to_none=True)
    assert tries > 1
    assert scale.scale == 2.0**30 / 2 ** (tries - 1)
    assert state_tensors(optimizer, model.named_parameters()) == {}
    assert all(torch.equal(part, kept) for part, kept in zip(trained, before, strict=True))
    reference = Objective(shake(adapted(base_of("llama"), "lora")), torch.float32)
    _, expected = in_passes(reference, passes)
    torch.nn.utils.clip_grad_norm_(reference.model.parameters(), 1.0)
    assert apart(gradient(model), gradient(reference.model)) < 0.02
    assert expected.isfinite().all()


def test_the_scale_grows_and_has_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "GROWS_AFTER", 3)
    scale = LossScale(4.0)
    for expected in (4.0, 4.0, 8.0, 8.0, 8.0, 16.0):
        scale.grow()
        assert scale.scale == expected
    scale.grow()
    scale.shrink()
    assert scale == LossScale(8.0, 0)
    scale.scale = scaling.HIGHEST
    for _ in range(3):
        scale.grow()
    assert scale.scale == scaling.HIGHEST
    scale.scale = 1.0
    with pytest.raises(TrainingError, match="overflow float16"):
        scale.shrink()


# --- all of it together ------------------------------------------------------------------------------------

RUNS = {
    "dora": ("float32", None, "dora", "adamw"),
    "pissa in 8 bits": ("float32", None, "pissa", "adamw_8bit"),
    "embeddings": ("bfloat16", None, "embeddings", "adamw"),
    "biases": ("bfloat16", None, "all biases", "adamw"),
    "float16": ("float16", None, "lora", "adamw"),
    "nf4": ("bfloat16", "nf4", "rslora", "adamw_8bit"),
    "int8": ("bfloat16", "int8", "pissa", "adamw"),
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_resumed_run_ends_bit_for_bit_where_the_other_did(family: str, name: str, tmp_path: Path) -> None:
    """Six steps, against three, a checkpoint, and three more in a new process's objects; dropout draws go on, too."""
    dtype, bits, kind, optimizer_kind = RUNS[name]
    if bits:
        pytest.importorskip("bitsandbytes")
    tiny(family).save_pretrained(tmp_path / "base")
    heard: list[Any] = []

    def run(steps: int, start: Path | None) -> tuple[Any, Any, Progress]:
        base = load_base(Located(family, tmp_path / "base"), dtype, quantization=bits)
        model = adapted(base, kind, dropout=0.2)
        recompute_blocks(model, 2)
        optimizer = make_optimizer(model.named_parameters(), 0.01, kind=optimizer_kind, plus_ratio=4.0)
        progress = Progress(loss_scale=LossScale(2.0**30) if dtype == "float16" else None)
        torch.manual_seed(6)
        if start is not None:
            progress = restore(model, optimizer, start)
        schedule = Schedule([1e-2] * steps, 4, 90, True, 1.0, 10**6, 10**6, None, 3)
        objective = Objective(model, DTYPES[dtype])
        fit(objective, optimizer, rows(), None, schedule, progress, lambda _: None, heard.append)
        return model, optimizer, progress

    whole, _, end = run(6, None)
    half, optimizer, progress = run(3, None)
    (tmp_path / "checkpoint").mkdir()
    take(half, optimizer, progress).write(tmp_path / "checkpoint")
    again, _, other_end = run(6, tmp_path / "checkpoint")
    assert end.step == other_end.step == 6
    assert end.loss_scale == other_end.loss_scale
    assert (end.loss_scale is not None) == (dtype == "float16") and (end.loss_scale is None or end.loss_scale.scale < 2.0**30)
    assert [event.loss for event in heard[:6]] == [event.loss for event in heard[6:]]
    parts = dict(again.named_parameters())
    for label, part in whole.named_parameters():
        assert torch.equal(part, parts[label]), label
    first = dict(adapted(load_base(Located(family, tmp_path / "base"), dtype, quantization=bits), kind).named_parameters())
    assert all(torch.equal(part, first[label]) != part.requires_grad for label, part in whole.named_parameters())
