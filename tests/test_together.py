"""Layers that are computed together: the same as one by one, with less kept, and nothing that stays behind."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llm_finetune_kit.models import products, together
from llm_finetune_kit.models.adapters import add_lora, without_adapter
from llm_finetune_kit.models.attention import NAME
from llm_finetune_kit.models.loading import load_base
from llm_finetune_kit.models.locate import Located
from llm_finetune_kit.models.lora import Fused
from llm_finetune_kit.models.products import LoraProducts, MlpProduct, Part, mlp_product
from llm_finetune_kit.training.recompute import recompute_blocks
from llm_finetune_kit.training.step import Objective, mean_loss
from test_step import SMALL, WAYS, apart, gradient, in_passes, rows, tiny

pytestmark = pytest.mark.usefixtures("one_thread")

ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "granite", "cohere"]
TARGETS = {
    "all": ATTENTION + MLP,
    "attention": ATTENTION,
    "MLP": MLP,
    "queries and values": ["q_proj", "v_proj"],
    "keys": ["k_proj"],
    "gate": ["gate_proj"],
    "up and down": ["up_proj", "down_proj"],
}


def adapted(base: Any, targets: list[str] = TARGETS["all"], **how: Any) -> Any:
    """With adapters that have moved, each of its own strength."""
    model = add_lora(base, r=4, alpha=8, targets=targets, base_name="base", seed=1, **{"dropout": 0.0, **how})
    torch.manual_seed(5)
    with torch.no_grad():
        for number, (_, part) in enumerate(item for item in model.named_parameters() if item[1].requires_grad):
            part.add_(torch.randn_like(part) * 0.05)
            if part.dim() == 2 and number % 2:
                part.mul_(1 + number / 20)
    return model


@contextmanager
def by_peft() -> Iterator[None]:
    """Every layer by itself, in PEFT's own operations."""
    patch = pytest.MonkeyPatch()
    patch.setattr(together, "_learning", lambda: False)
    patch.setattr(Fused, "_can_be_fused", lambda self, dtype: False)
    yield
    patch.undo()


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """How often each of the two functions is used."""
    found, patch = {"layers": 0, "mlp": 0}, pytest.MonkeyPatch()

    def watched(name: str, real: Any) -> Any:
        def apply(*parts: Any) -> Any:
            found[name] += 1
            return real(*parts)

        return apply

    patch.setattr(LoraProducts, "apply", watched("layers", LoraProducts.apply))
    patch.setattr(MlpProduct, "apply", watched("mlp", MlpProduct.apply))
    yield found
    patch.undo()


def one_pass() -> Any:
    return WAYS["all eight in one pass"](rows())


# --- the same gradient ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_together_is_what_peft_computes_layer_by_layer(family: str, targets: str) -> None:
    objective, passes = Objective(adapted(tiny(family), TARGETS[targets]), torch.float32), one_pass()
    with counted() as used:
        loss, grad = in_passes(objective, passes)
    with by_peft():
        plain_loss, plain = in_passes(objective, passes)
    attentions = {"all": 2, "attention": 2, "queries and values": 1, "keys": 1}.get(targets, 0)
    assert used == {"layers": 2 * attentions, "mlp": 2}
    assert loss == pytest.approx(plain_loss, rel=1e-6)
    assert apart(grad, plain) < 1e-5


@pytest.mark.parametrize("how", [{"init": "pissa"}, {"bias": "all"}, {"bias": "lora_only"}, {"variant": "rslora"}])
def test_kinds_of_adapters_that_are_computed_together(how: dict[str, str]) -> None:
    model, passes = adapted(tiny("qwen2"), **how), one_pass()
    objective = Objective(model, torch.float32)
    with counted() as used:
        _, grad = in_passes(objective, passes)
    with by_peft():
        _, plain = in_passes(objective, passes)
    assert used == {"layers": 4, "mlp": 2}
    assert apart(grad, plain) < 2e-5


@pytest.mark.parametrize("activation", products.ACTIVATIONS)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("workspace", [1, 10**6])
def test_an_mlp_in_float64(activation: str, biased: bool, workspace: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against autograd over the textbook's formula, some rows at a time and all at once."""
    monkeypatch.setitem(products.MLP_WORKSPACE, "cpu", workspace)
    torch.manual_seed(0)
    x, slope = (torch.randn(2, 7, 6, dtype=torch.float64) for _ in range(2))
    x.requires_grad_()
    parts = []
    for inputs, outputs in ((6, 10), (6, 10), (10, 6)):
        layer = torch.nn.Linear(inputs, outputs, bias=biased).double()
        layer.weight.requires_grad_(False)
        down, up = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((3, inputs), (outputs, 3)))
        parts.append(Part(layer, layer.bias, down, up, 0.5 + len(parts)))

    def plain(x: torch.Tensor, part: Part) -> torch.Tensor:
        return part.base(x) + part.scale * (x @ part.down.T @ part.up.T)

    trained = [x, *(tensor for part in parts for tensor in part[1:4] if tensor is not None)]
    middle = products.ACTIVATIONS[activation][0](plain(x, parts[0])) * plain(x, parts[1])
    expected = plain(middle, parts[2])
    found = mlp_product(x, parts, products.GATINGS[activation], torch.float64)
    assert torch.allclose(found, expected, rtol=1e-12)
    found.backward(slope, inputs=trained)
    reference = torch.autograd.grad(expected, trained, slope)
    assert [apart(tensor.grad, right) < 1e-6 for tensor, right in zip(trained, reference, strict=True)] == [True] * len(trained)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_bfloat16_is_as_near_as_layer_by_layer(family: str) -> None:
    model = adapted(tiny(family))
    _, whole = in_passes(Objective(model, torch.float32), one_pass())
    half = adapted(tiny(family).bfloat16())
    objective = Objective(half, torch.bfloat16)
    _, grad = in_passes(objective, one_pass())
    with by_peft():
        _, plain = in_passes(objective, one_pass())
    assert apart(grad, whole) < 1.2 * apart(plain, whole) < 0.06


@pytest.mark.parametrize("targets", ["all", "queries and values"])
@pytest.mark.parametrize("bits", ["nf4", "int8"])
def test_packed_weights(bits: str, targets: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    tiny("llama").save_pretrained(tmp_path)
    base = load_base(Located("llama", tmp_path), "float32", quantization=bits)
    objective = Objective(adapted(base, TARGETS[targets]), torch.float32)
    with counted() as used:
        _, grad = in_passes(objective, one_pass())
    with by_peft():
        _, plain = in_passes(objective, one_pass())
    assert used["mlp"] == 2
    assert apart(grad, plain) < 1e-5


def test_outputs_may_be_changed_in_place() -> None:
    """OLMo clamps queries, keys and values where they are."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("olmo", **SMALL, clip_qkv=0.1)
    objective = Objective(adapted(AutoModelForCausalLM.from_config(config, attn_implementation=NAME)), torch.float32)
    with counted() as used:
        _, grad = in_passes(objective, one_pass())
    with by_peft():
        _, plain = in_passes(objective, one_pass())
    assert used == {"layers": 4, "mlp": 2}
    assert apart(grad, plain) < 1e-5


# --- what is kept ---------------------------------------------------------------------------------------------


def kept(objective: Objective) -> list[torch.Tensor]:
    """What autograd keeps in a forward pass, each piece of memory once."""
    found: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        found.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        objective.summed(one_pass()[0])
    return list(found.values())


@pytest.mark.parametrize("targets", ["all", "attention"])
def test_the_gated_product_is_not_kept(targets: str) -> None:
    objective = Objective(adapted(tiny("llama"), TARGETS[targets]), torch.float32)
    tokens, inner = one_pass()[0].tokens, SMALL["intermediate_size"]
    wide = [tensor for tensor in kept(objective) if tensor.shape[-1] == inner and tensor.numel() == tokens * inner]
    assert len(wide) == 2 * SMALL["num_hidden_layers"]
    with by_peft():
        assert sum(tensor.numel() == tokens * inner and tensor.shape[-1] == inner for tensor in kept(objective)) > len(wide)


def test_a_second_backward_is_refused_and_not_wrong() -> None:
    """The slopes were written over what was kept."""
    total = adapted(tiny("llama"))(input_ids=torch.arange(3, 20)[None]).logits.sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


# --- through the life of a run --------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 2])
def test_recomputing_and_evaluating_between_change_nothing(every: int) -> None:
    model = adapted(tiny("llama"))
    objective, passes = Objective(model, torch.float32), WAYS["packed into a few"](rows())
    loss, grad = in_passes(objective, passes)
    recompute_blocks(model, every)
    with counted() as used:
        again, recomputed = in_passes(objective, passes)
    assert again == loss
    assert torch.equal(recomputed, grad)
    assert used["mlp"] == len(passes) * (2 + 2 // every)
    held_out = mean_loss(objective, passes)
    with without_adapter(model):
        assert mean_loss(objective, passes) != held_out
    model.generate(input_ids=torch.arange(3, 9)[None], max_new_tokens=2, do_sample=False)
    assert mean_loss(objective, passes) == held_out
    assert torch.equal(in_passes(objective, passes)[1], grad)


def groups(model: Any) -> list[together.Together]:
    return [module.forward.func.__self__ for module in model.modules() if "Attention" in type(module).__name__]


def test_nothing_waits_after_a_forward_however_it_ends() -> None:
    model = adapted(tiny("llama"))
    objective, passes = Objective(model, torch.float32), one_pass()
    _, grad = in_passes(objective, passes)
    values = [module for path, module in model.named_modules() if path.endswith("v_proj")]

    def fails(*_: Any) -> None:
        assert groups(model)[0].waiting  # the values at least
        raise KeyboardInterrupt

    handle = values[0].register_forward_pre_hook(fails)
    with pytest.raises(KeyboardInterrupt):
        objective.summed(passes[0])
    handle.remove()
    assert [(group.given, group.waiting, group.open) for group in groups(model)] == [(None, {}, False)] * 2
    assert torch.equal(in_passes(objective, passes)[1], grad)
    assert [(group.given, group.waiting, group.open) for group in groups(model)] == [(None, {}, False)] * 2


class Attention(torch.nn.Module):
    """Keys out of one tensor, values out of another, as attention over two texts has them."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = base.q_proj, base.k_proj, base.v_proj

    def forward(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(other)], -1)


def test_what_waits_is_handed_out_for_the_same_tensor_only() -> None:
    own = next(module for module in adapted(tiny("llama")).modules() if hasattr(module, "k_proj"))
    layers = [getattr(own, name) for name in together.READERS]
    for layer in layers:
        del layer.forward
    x, other = torch.randn(2, 32), torch.randn(2, 32)
    expected = torch.cat([layer(given) for layer, given in zip(layers, (x, x, other), strict=True)], -1)
    attention = Attention(own)
    together.Together(attention).put_on()
    assert torch.allclose(attention(x, other), expected, atol=1e-6)
    assert torch.allclose(attention(x, x)[:, -16:], layers[2](x), atol=1e-6)


def test_a_copy_is_its_own() -> None:
    model = adapted(tiny("llama"))
    _, grad = in_passes(Objective(model, torch.float32), one_pass())
    other = copy.deepcopy(model)
    with torch.no_grad():
        for part in other.parameters():
            part.mul_(1.5)
    objective = Objective(other, torch.float32)
    with counted() as used:
        _, moved = in_passes(objective, one_pass())
    assert used == {"layers": 4, "mlp": 2}
    assert apart(moved, grad) > 0.1
    assert torch.equal(in_passes(Objective(model, torch.float32), one_pass())[1], grad)


def second(model: Any) -> None:
    model.add_adapter("second", model.peft_config["default"])
    model.base_model.set_adapter(["default", "second"])


STATES: dict[str, Any] = {
    "dropout at work": ({"dropout": 0.3}, lambda model: None),
    "DoRA": ({"variant": "dora"}, lambda model: None),
    "merged": ({}, lambda model: model.merge_adapter()),
    "off": ({}, lambda model: model.base_model.disable_adapter_layers()),
    "two adapters": ({}, second),
    "a base that learns": ({}, lambda model: [part.requires_grad_() for part in model.parameters()]),
}


@pytest.mark.parametrize("state", STATES)
def test_what_cannot_be_fused_is_computed_layer_by_layer(state: str) -> None:
    how, change = STATES[state]
    model = adapted(tiny("llama"), **how)
    change(model)
    with counted() as used, torch.random.fork_rng():
        model.train()
        torch.manual_seed(3)
        out = model(input_ids=torch.arange(3, 20)[None]).logits
    assert used["mlp"] == 0 and used["layers"] in (0, 14)  # DoRA's layers have a product each
    with by_peft():
        torch.manual_seed(3)
        assert apart(model(input_ids=torch.arange(3, 20)[None]).logits.detach(), out.detach()) < 1e-5


def test_what_a_merge_leaves_is_the_base() -> None:
    model = adapted(tiny("llama"), TARGETS["queries and values"]).merge_and_unload()
    x = torch.arange(3, 20)[None]
    with counted() as used:
        found = model(input_ids=x).logits.detach()
    assert used["layers"] == 0
    fresh = adapted(tiny("llama"), TARGETS["queries and values"])
    assert apart(found, fresh(input_ids=x).logits.detach()) < 1e-5


def doubled(self: Any, x: torch.Tensor) -> torch.Tensor:
    return 2 * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def swapped(self: Any, x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))
    return out


@pytest.mark.parametrize(("act", "forward"), [("relu", None), ("silu", doubled), ("silu", swapped)])
def test_an_mlp_that_is_another_one_stays_as_it_is(act: str, forward: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **SMALL, hidden_act=act)
    base = AutoModelForCausalLM.from_config(config, attn_implementation=NAME)
    if forward is not None:
        kind = next(type(module) for module in base.modules() if hasattr(module, "up_proj"))
        monkeypatch.setattr(kind, "forward", forward)
    model = adapted(base)
    objective = Objective(model, torch.float32)
    with counted() as used:
        in_passes(objective, one_pass())
    assert used == {"layers": 2 * (2 + 3), "mlp": 0}
    assert gradient(model).norm() > 0
