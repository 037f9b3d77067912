"""Liger's kernels as a model uses them, with stand-ins in plain operations; test_liger_kernels.py has the real ones."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_finetune_kit.config import RunConfig
from llm_finetune_kit.data.batches import make_passes
from llm_finetune_kit.events import Event, Planned, Stepped, Warned
from llm_finetune_kit.models import liger
from llm_finetune_kit.models.facts import facts_of_model
from llm_finetune_kit.models.liger import Kernels, NormKind, forget_kernels, half_turn, norm_kind, turns_halves, use_kernels
from llm_finetune_kit.models.products import GATINGS, Gating
from llm_finetune_kit.plan import contradictions
from llm_finetune_kit.run import run
from llm_finetune_kit.training.fused import fuse
from llm_finetune_kit.training.recompute import recompute_blocks
from llm_finetune_kit.training.step import Objective, mean_loss
from test_step import FAMILIES, SMALL, apart, in_passes, rows, tiny, with_lora

pytestmark = pytest.mark.usefixtures("one_thread")

HALF, FULL, ONE = NormKind("llama", 0.0), NormKind("gemma", 0.0), NormKind("gemma", 1.0)
NORMS = {  # of two blocks and the end; the two attentions are counted apart
    "llama": 5, "mistral": 5, "phi3": 5, "qwen2": 5, "qwen3": 9, "gemma": 5, "gemma2": 9, "gemma3_text": 13, "granite": 5,
}  # fmt: skip


def plain_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, kind: NormKind) -> torch.Tensor:
    normal = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    if kind.casting == "llama":
        return weight * normal.to(x.dtype)
    return (normal * (kind.offset + weight.float())).to(x.dtype)


def plain_turn(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return half_turn(q, cos, sin).to(q.dtype), half_turn(k, cos, sin).to(k.dtype)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the stand-ins ran; they are what `load_kernels` gives from now on."""
    calls: Counter[str] = Counter()

    def watched(name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*values: Any) -> Any:
            calls[name] += 1
            return operation(*values)

        return call

    silu = Gating(watched("gate", GATINGS["silu"].product), watched("slopes", GATINGS["silu"].slopes))
    made = Kernels(watched("norm", plain_norm), watched("turn", plain_turn), silu)
    monkeypatch.setattr(liger, "load_kernels", lambda: made)
    return calls


def adapted(family: str) -> Any:
    """A tiny model with an adapter on every linear layer of its blocks."""
    model = tiny(family)
    return with_lora(model, targets=facts_of_model(model, family).linear_names)


def put_on(model: Any) -> dict[Any, Any]:
    """The forwards that modules were given instead of their class's."""
    return {module: vars(module)["forward"] for module in model.modules() if "forward" in vars(module)}


def replaced(model: Any, before: dict[Any, Any]) -> int:
    """How many modules have another forward than they had."""
    now = put_on(model)
    return sum(now.get(module) != before.get(module) for module in now.keys() | before.keys())


# --- what a model is made of ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*FAMILIES, "granite"])
def test_every_norm_and_every_turn_is_found_and_the_model_learns_the_same(family: str, counted: Counter[str]) -> None:
    model, passes = tiny(family), make_passes(rows(), range(8), 90)
    objective = Objective(model, torch.float32)
    (loss, grad), before = in_passes(objective, passes), put_on(model)
    why_not = fuse(objective)
    assert (why_not is not None) is (family == "gpt2")
    counted.clear()
    again, slope = in_passes(objective, passes)
    assert again == pytest.approx(loss, rel=1e-5)
    assert apart(slope, grad) < 1e-5
    if family != "gpt2":
        assert counted == {"norm": len(passes) * NORMS[family], "turn": len(passes) * 2}
        assert replaced(model, before) == NORMS[family] + 2


@pytest.mark.parametrize(
    ("family", "kind"),
    [("llama", HALF), ("mistral", HALF), ("qwen3", HALF), ("olmo2", FULL), ("gemma", ONE), ("gemma3_text", ONE)],
)
def test_a_norm_is_known_by_what_it_computes(family: str, kind: NormKind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "olmo2", SMALL)
    norms = [module for module in tiny(family).modules() if type(module).__name__.endswith("RMSNorm")]
    assert {norm_kind(norm, 1e-6) for norm in norms} == {kind}
    assert norms[0].weight.dtype is torch.float32  # it was asked in 16 bits, and left as it is


class Scaled(torch.nn.Module):
    """An RMSNorm that Liger's kernels have no word for."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = torch.nn.Parameter(torch.ones(8)), 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2.0 * plain_norm(x, self.weight, self.eps, HALF)


def neighbours(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    def turned(part: torch.Tensor) -> torch.Tensor:
        pairs = torch.stack([-part[..., 1::2], part[..., ::2]], dim=-1).flatten(-2)
        return part * cos[:, None] + pairs * sin[:, None]

    return turned(q), turned(k)


def test_what_is_of_another_kind_is_left_alone(counted: Counter[str]) -> None:
    assert norm_kind(Scaled(), 1e-6) is None
    assert norm_kind(torch.nn.LayerNorm(8, bias=False), 1e-6) is None
    assert not turns_halves(neighbours)
    assert not turns_halves(lambda x, cos, sin: x)
    assert turns_halves(plain_turn)
    cohere = tiny("cohere")  # norms with a mean, turns of neighbours
    assert "neither" not in str(fuse(Objective(cohere, torch.float32)))
    assert put_on(cohere) == {} and not counted


def test_other_models_of_the_family_keep_their_own(counted: Counter[str]) -> None:
    model, other = tiny("llama"), tiny("llama")
    modules = use_kernels(model, liger.load_kernels())
    assert put_on(other) == {}
    with torch.no_grad():
        other(input_ids=torch.arange(3, 9)[None])
    assert not counted
    forget_kernels(modules)
    assert put_on(model) == {}


def test_what_was_put_around_an_attention_stays_around_it(counted: Counter[str]) -> None:
    model, around = tiny("llama"), Counter[str]()

    def within(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        around["before" if not counted else "after"] += 1
        return forward(*args, **kwargs)

    attentions = [block.self_attn for block in model.model.layers]
    for attention in attentions:
        attention.forward = partial(within, attention.forward)
    before = put_on(model)
    modules = use_kernels(model, liger.load_kernels())
    with torch.no_grad():
        model(input_ids=torch.arange(3, 9)[None])
    assert around == {"after": 2} and counted["turn"] == 2
    forget_kernels(modules)
    assert replaced(model, before) == 0
    attentions[0].forward = lambda *args, **kwargs: None  # nobody knows what that computes
    assert attentions[0] not in [module for module, _ in use_kernels(model, liger.load_kernels())]


# --- in training ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_an_adapter_over_16_bits_learns_the_same(family: str, counted: Counter[str]) -> None:
    model = adapted(family)
    for part in model.parameters():
        part.data = part.data if part.requires_grad else part.data.bfloat16()
    objective = Objective(model, torch.bfloat16)
    passes = make_passes(rows(), range(8), 90)
    loss, grad = in_passes(objective, passes)
    assert fuse(objective) is None
    counted.clear()
    again, slope = in_passes(objective, passes)
    assert again == pytest.approx(loss, rel=5e-3)
    assert apart(slope, grad) < 0.03
    assert (counted["gate"], counted["slopes"]) == ((0, 0) if family == "gemma2" else (2 * len(passes),) * 2)  # GELU, or SiLU


def test_queries_in_16_bits_and_norms_in_32_keep_the_format_that_the_model_gives_them(counted: Counter[str]) -> None:
    """Full training: the weights are float32 and the products 16 bits, so norms of queries get 16 and give 32."""
    objective, passes = Objective(tiny("qwen3"), torch.bfloat16), make_passes(rows(), range(8), 90)
    loss, grad = in_passes(objective, passes)
    assert fuse(objective) is None
    counted.clear()
    again, slope = in_passes(objective, passes)
    assert counted["norm"] == len(passes) * 5  # not the four of queries and keys
    assert again == pytest.approx(loss, rel=5e-3)
    assert apart(slope, grad) < 0.03


def test_recomputing_evaluation_and_answers_use_them_too(counted: Counter[str]) -> None:
    objective, passes = Objective(tiny("llama"), torch.float32), make_passes(rows(), range(8), 90)
    plain, (loss, grad) = mean_loss(objective, passes), in_passes(objective, passes)
    asked = {"input_ids": torch.arange(3, 9)[None].repeat(2, 1), "max_new_tokens": 3, "do_sample": False}
    answer = objective.model.generate(**asked)
    assert fuse(objective) is None
    recompute_blocks(objective.model, 1)
    objective.model.train()
    again, slope = in_passes(objective, passes)
    assert again == pytest.approx(loss, rel=1e-5) and apart(slope, grad) < 1e-5
    for use in (lambda: mean_loss(objective, passes), lambda: objective.model.generate(**asked)):
        counted.clear()
        found = use()
        assert counted["norm"] and counted["turn"]
    assert mean_loss(objective, passes)[0] == pytest.approx(plain[0], rel=1e-5)
    assert torch.equal(found, answer)


# --- where they fail --------------------------------------------------------------------------------------------


def wrong_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, kind: NormKind) -> torch.Tensor:
    return plain_norm(x, weight + 1.0, eps, kind)


def stuck_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, kind: NormKind) -> torch.Tensor:
    """Right values whose gradient is not."""
    right = plain_norm(x, weight, eps, kind)
    return (right - x).detach() + x


def no_number(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return x * float("nan")


def broken(*_: Any) -> Any:
    raise RuntimeError("no compiler on this machine")


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (Kernels(wrong_norm, plain_turn), "from what it was without them"),
        (Kernels(stuck_norm, plain_turn), "gradient"),
        (Kernels(plain_norm, lambda q, k, cos, sin: plain_turn(q, k, cos, -sin)), "from what it was without them"),
        (Kernels(no_number, plain_turn), "loss is nan%"),
        (Kernels(broken, plain_turn), "no compiler on this machine"),
        (Kernels(plain_norm, broken), "no compiler on this machine"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_that_compute_something_else_are_not_used(
    made: Kernels, told: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(liger, "load_kernels", lambda: made)
    objective, passes = Objective(tiny("llama"), dtype), make_passes(rows(), range(8), 90)
    loss, grad = in_passes(objective, passes)
    objective.model.zero_grad()
    random = torch.get_rng_state()
    assert told in str(fuse(objective))
    assert torch.equal(random, torch.get_rng_state()) and objective.model.training
    assert not any(part.grad is not None for part in objective.model.parameters())
    assert put_on(objective.model) == {}
    again, slope = in_passes(objective, passes)
    assert again == loss and torch.equal(slope, grad)


def test_a_machine_without_them_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("liger_kernel", "liger_kernel.ops"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "liger_kernel" in str(fuse(Objective(tiny("llama"), torch.float32)))


def test_memory_that_runs_out_is_no_reason_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(liger, "load_kernels", lambda: Kernels(full, plain_turn))
    model = tiny("llama")
    with pytest.raises(torch.OutOfMemoryError):
        fuse(Objective(model, torch.float32))
    assert put_on(model) == {}


# --- the knob ---------------------------------------------------------------------------------------------------


def told_by_a_run(place: Path, **more: Any) -> list[Event]:
    heard: list[Event] = []
    values = {"model.name": "demo", "data.train_file": "sample:chat", "output.output_dir": str(place)}
    few = {"training.max_steps": 1, "evaluation.compare": False, "evaluation.generation.max_new_tokens": 1}
    run(RunConfig().with_values(values | few | {f"training.{name}": value for name, value in more.items()}), heard.append)
    assert any(isinstance(event, Stepped) for event in heard)
    return heard


def warnings_of(heard: list[Event]) -> str:
    return "\n".join(event.message for event in heard if isinstance(event, Warned))


@pytest.mark.parametrize("asked", [True, False])
def test_the_knob_is_heard(asked: bool, tmp_path: Path, counted: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contradictions, "LIGER", ("cuda", "cpu"))
    told = warnings_of(told_by_a_run(tmp_path, liger=asked))
    assert bool(counted) is asked
    assert "Liger" not in told and "training.liger" not in told


def test_a_failure_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contradictions, "LIGER", ("cuda", "cpu"))
    monkeypatch.setattr(liger, "load_kernels", broken)
    told = warnings_of(told_by_a_run(tmp_path, liger=True))
    assert told.count("Liger's kernels are not used: RuntimeError: no compiler on this machine") == 1


def test_asked_for_on_a_cpu_it_is_told_and_not_used(tmp_path: Path, counted: Counter[str]) -> None:
    heard = told_by_a_run(tmp_path, liger=True)
    planned = next(event.plan for event in heard if isinstance(event, Planned))
    assert any("training.liger will not be used" in warning for warning in planned["warnings"])
    assert not counted and "Liger" not in warnings_of(heard)
