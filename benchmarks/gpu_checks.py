"""Whether a GPU computes what it should: each check gives what it measured, its limit, and whether it held."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy

from gpu_parts import RANK, Place, build, documents, ours, targets, tiny_config, tokens_of, train
from llm_finetune_kit.data.batches import make_passes
from llm_finetune_kit.events import Event, Stepped
from llm_finetune_kit.models.attention import Documents, per_document_attention
from llm_finetune_kit.models.liger import NormKind, _normed, gated, gated_slopes, load_kernels
from llm_finetune_kit.training.step import Objective, accumulate

Found = dict[str, Any]


def held(value: float, limit: float, **more: Any) -> Found:
    """A relative error and its limit; NaN never holds."""
    return {"value": value, "limit": limit, "holds": value <= limit, **more}


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def one_kernel(place: Place) -> Found:
    """Attention of all documents in one kernel against one document at a time: outputs and gradients, bfloat16."""
    lengths, worst = (83, 1, 300, 17, 129), 0.0
    if Documents(lengths, place.device).spans is None:
        return {"skipped": "this device has no kernel for documents of different lengths"}
    for shared, width, window in ((1, 64, None), (4, 128, None), (2, 64, 50), (1, 256, None)):
        torch.manual_seed(0)
        shapes = [(1, heads, sum(lengths), width) for heads in (8, 8 // shared, 8 // shared)]
        made = [torch.randn(shape, device=place.device).bfloat16() for shape in shapes]
        found = []
        for together in (True, False):
            laid = Documents(lengths, place.device)
            laid.spans = laid.spans if together else None
            parts = [part.clone().requires_grad_() for part in made]
            out, _ = per_document_attention(torch.nn.Module(), *parts, None, sliding_window=window, documents=laid)
            out.square().sum().backward()
            found.append(torch.cat([out.detach().flatten(), *(part.grad.flatten() for part in parts)]))
        worst = max(worst, apart(*found))
    return held(worst, 0.02)


def gradient(model: Any) -> torch.Tensor:
    return torch.cat([part.grad.flatten() for part in model.parameters() if part.requires_grad])


def shaken(model: Any) -> Any:
    """With B matrices that are not 0, which would hide errors in A."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, part in model.named_parameters():
            if "lora_B" in name:
                part.copy_(0.05 * torch.randn(part.shape))
    return model


def fused_lora(place: Place) -> Found:
    """Loss and gradient of our LoRA layers, packed documents, against PEFT's and transformers' on each document, float32."""
    worst = 0.0
    for family in ("llama", "gpt2"):
        config, found = tiny_config(family), documents(Place(place.device, None, True), 12, 256)
        objective = ours(config, place.device, torch.float32)
        shaken(objective.model)
        loss = float(accumulate(objective, make_passes(tokens_of(found), range(len(found)), 10**6)))
        theirs = by_peft(build(config, place.device, torch.float32))
        theirs.load_state_dict(objective.model.state_dict())
        count = sum(sum(learned[1:]) for _, learned in found)
        total = 0.0
        for ids, learned in found:
            row = torch.tensor(ids, device=place.device)
            labels = torch.where(torch.tensor(learned, device=place.device), row, -100)[1:]
            logits = theirs(input_ids=row[None], use_cache=False).logits[0, :-1].float()
            part = cross_entropy(logits, labels, ignore_index=-100, reduction="sum") / count
            part.backward()
            total += float(part)
        worst = max(worst, abs(loss - total) / total, apart(gradient(objective.model), gradient(theirs)))
    return held(worst, 1e-3)


def by_peft(model: Any) -> Any:
    """The same adapter in PEFT's own layers."""
    gpt2 = model.config.model_type == "gpt2"
    settings = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules=targets(model.config), fan_in_fan_out=gpt2, task_type="CAUSAL_LM"
    )
    return get_peft_model(model, settings)


def four_bits(place: Place) -> Found:
    """Loss and gradient over NF4 weights against the same weights unpacked into a plain model, bfloat16."""
    import bitsandbytes.nn as bnb

    from llm_finetune_kit.models.quantized_layers import plain_weight

    config, passes = tiny_config("llama"), _passes()
    packed = ours(config, place.device, torch.bfloat16, packed=True)
    plain = ours(config, place.device, torch.bfloat16)
    for (name, layer), other in zip(packed.model.named_modules(), plain.model.modules(), strict=True):
        if isinstance(layer, bnb.Linear4bit) and name.endswith("base_layer"):
            other.weight.data.copy_(plain_weight(layer, torch.bfloat16))
    losses = [float(accumulate(shaken_objective(one), passes)) for one in (packed, plain)]
    worst = max(abs(losses[0] - losses[1]) / losses[1], apart(gradient(packed.model), gradient(plain.model)))
    return held(worst, 0.02)


def shaken_objective(objective: Objective) -> Objective:
    shaken(objective.model)
    return objective


def _passes() -> list[Any]:
    found = documents(Place(torch.device("cpu"), None, True), 12, 256)
    return make_passes(tokens_of(found), range(len(found)), 150)


def losses(device: torch.device, dtype: torch.dtype, steps: int, **how: Any) -> list[float]:
    """Of the first steps of the tiny Llama under our loop."""
    found: list[float] = []

    def listen(event: Event) -> None:
        if isinstance(event, Stepped):
            found.append(event.loss)

    rows = tokens_of(documents(Place(device, None, True), 4 * steps, 256))
    # the weights of both devices are those of the CPU: their random numbers differ
    objective = ours(tiny_config("llama"), torch.device("cpu"), torch.float32, **how)
    objective.model.to(device)
    for part in objective.model.parameters():
        if not part.requires_grad:
            part.data = part.data.to(dtype)
    train(Objective(objective.model, dtype), rows, 4, steps, 100, listen)
    return found


def worst_of(some: list[float], others: list[float]) -> float:
    return max(abs(a - b) / b for a, b in zip(some, others, strict=True))


def half(place: Place) -> Found:
    """Losses of 10 steps in float16 with a scaled loss against float32."""
    return held(worst_of(losses(place.device, torch.float16, 10), losses(place.device, torch.float32, 10)), 0.01)


def as_on_the_cpu(place: Place) -> Found:
    """Losses of 20 steps on this device against the CPU's, float32 and bfloat16."""
    there = losses(torch.device("cpu"), torch.float32, 20)
    narrow = worst_of(losses(place.device, torch.bfloat16, 20), there)
    return held(worst_of(losses(place.device, torch.float32, 20), there), 1e-3, bfloat16=narrow, bfloat16_limit=0.01)


def compiled(place: Place) -> Found:
    """Loss and gradient with compiled blocks against plain ones, over passes of different lengths, bfloat16."""
    from torch._dynamo.utils import counters

    config, passes = tiny_config("llama"), _passes()
    plain = shaken_objective(ours(config, place.device, torch.bfloat16))
    began = time.perf_counter()
    objective = shaken_objective(ours(config, place.device, torch.bfloat16, compiled=True))
    seconds, graphs = time.perf_counter() - began, counters["stats"]["unique_graphs"]
    if objective.not_compiled:
        return {"skipped": objective.not_compiled}
    expected, found = (float(accumulate(one, passes)) for one in (plain, objective))
    worst = max(abs(found - expected) / expected, apart(gradient(objective.model), gradient(plain.model)))
    again = counters["stats"]["unique_graphs"] - graphs
    return held(worst, 0.03, compile_seconds=seconds, graphs=graphs, graphs_made_later=again)


def fused_kernels(place: Place) -> Found:
    """Loss and gradient with Liger's norms and turns against plain ones, bfloat16; and its gated product against torch's."""
    worst, passes, norms = 0.0, _passes(), {}
    for family in ("llama", "qwen3", "gemma"):
        plain, objective = (
            shaken_objective(ours(tiny_config(family), place.device, torch.bfloat16, fused=fused)) for fused in (False, True)
        )
        if objective.not_fused:
            return {"skipped": f"{family}: {objective.not_fused}"}
        put_on = [vars(module).get("forward") for module in objective.model.modules()]
        norms[family] = sum(getattr(forward, "func", None) is _normed for forward in put_on)
        expected, found = (float(accumulate(one, passes)) for one in (plain, objective))
        worst = max(worst, abs(found - expected) / expected, apart(gradient(objective.model), gradient(plain.model)))
    alone = {"gated_product": products(place), "many_narrow_norms": narrow_norms(place)}
    return held(worst, 0.03, norms=norms, **alone, alone_limit=0.01)


def products(place: Place) -> float:
    """How far Liger's gated product and its gradient are from torch's in float32."""
    torch.manual_seed(0)
    gate, up, slope = (torch.randn(300, 5632, device=place.device).bfloat16() for _ in range(3))
    leaves = [part.float().requires_grad_() for part in (gate, up)]
    expected = torch.nn.functional.silu(leaves[0]) * leaves[1]
    expected.backward(slope.float())
    found = [gated(gate, up), *gated_slopes(slope, gate, up)]
    pairs = zip(found, [expected.detach(), *(leaf.grad for leaf in leaves), expected.detach()], strict=True)
    return max(apart(*pair) for pair in pairs)


def narrow_norms(place: Place) -> float:
    """The same for norms of so many queries that Liger has a kernel of its own for them, which a small pass does not reach."""
    torch.manual_seed(0)
    made = [torch.randn(shape, device=place.device).bfloat16() for shape in ((1, 2048, 32, 128), (128,), (1, 2048, 32, 128))]
    found = []
    for norm in (
        load_kernels().norm,
        lambda x, weight, eps, _: torch.nn.functional.rms_norm(x.float(), (128,), weight.float(), eps),
    ):
        x = made[0].clone().requires_grad_()
        out = norm(x, made[1], 1e-6, NormKind("llama", 0.0))
        out.backward(made[2].to(out.dtype))
        found.append(torch.cat([out.detach().flatten().float(), x.grad.flatten().float()]))
    return apart(*found)


CHECKS: dict[str, Callable[[Place], Found]] = {
    "all documents in one kernel": one_kernel,
    "fused LoRA is PEFT's": fused_lora,
    "NF4 is its unpacked weights": four_bits,
    "float16 with a scaled loss": half,
    "20 steps as on the CPU": as_on_the_cpu,
    "Liger's kernels": fused_kernels,
    "compiled blocks": compiled,
}
SLOW_ON_A_CPU = {"compiled blocks"}  # a minute of C++


def check(place: Place, keep: Callable[[str, Any], None]) -> None:
    """Every check, whatever becomes of the others."""
    for name, function in CHECKS.items():
        if place.dry and name in SLOW_ON_A_CPU:
            continue
        try:
            keep(name, function(place))
        except Exception as error:
            keep(name, {"failed": f"{type(error).__name__}: {error}"[:500]})
