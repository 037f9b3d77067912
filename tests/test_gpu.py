"""What a GPU computes, as far as a CPU can show it: stand-ins for its kernels, tensors without numbers, the decisions.

benchmarks/gpu.py has the same checks on a real one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import varlen

from llm_finetune_kit.config import RunConfig
from llm_finetune_kit.data.batches import Pass, make_passes
from llm_finetune_kit.events import Event, Stepped, Warned
from llm_finetune_kit.models import attention
from llm_finetune_kit.models.attention import Documents, has_arguments, has_kernels, one_kernel, per_document_attention
from llm_finetune_kit.run import run
from llm_finetune_kit.training import compiled
from llm_finetune_kit.training.compiled import compile_blocks
from llm_finetune_kit.training.optimizer import make_optimizer
from llm_finetune_kit.training.recompute import recompute_blocks
from llm_finetune_kit.training.step import Objective, accumulate
from test_step import alike, apart, in_passes, rows, tiny, with_lora

CPU = torch.device("cpu")
LENGTHS = (5, 1, 9, 3)


# --- the contract of torch's kernel, in plain operations ---------------------------------------------------------


def laid(offsets: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each token its document, and how far it stands before that document's end."""
    ends = offsets[1:].long()
    place = torch.arange(int(ends[-1]))
    document = torch.bucketize(place, ends, right=True)
    return document, ends[document] - place


def weights_of(query: Any, key: Any, at_q: Any, at_k: Any, scale: float | None, window: list[int]) -> torch.Tensor:
    """Attention weights [heads, queries, keys] of all documents, float32: the last query and the last key of each stand level."""
    (document, left), (key_document, key_left) = laid(at_q), laid(at_k)
    ahead = key_left[None] - left[:, None]
    seen = (document[:, None] == key_document[None]) & (ahead >= 0)
    if window[0] >= 0:
        seen &= ahead <= window[0]
    scores = torch.einsum("ihd,jhd->hij", query, key) * (scale or query.shape[2] ** -0.5)
    return scores.masked_fill(~seen, float("-inf")).softmax(-1)


def widened(query: Any, *shared: Any) -> list[torch.Tensor]:
    """In float32, with keys and values once for each head that asks them."""
    return [query.float(), *(part.float().repeat_interleave(query.shape[1] // part.shape[1], 1) for part in shared)]


def forward(q: Any, k: Any, v: Any, at_q: Any, at_k: Any, most_q: int, most_k: int, *rest: Any, **named: Any) -> Any:
    causal, scale, window = rest[:3] if rest else (named["is_causal"], named["scale"], named["window_size"])
    assert at_q.dtype == at_k.dtype == torch.int32 and window[1] == 0
    assert (most_q, most_k) == (int(at_q.diff().max()), int(at_k.diff().max()))
    assert causal == (window[0] == -1)
    query, key, value = widened(q, k, v)
    out = torch.einsum("hij,jhd->ihd", weights_of(query, key, at_q, at_k, scale, window), value)
    return out.to(q.dtype).contiguous(), torch.zeros(q.shape[1], q.shape[0]), torch.zeros(2, dtype=torch.uint64)


def backward(slope: Any, q: Any, k: Any, v: Any, out: Any, sums: Any, at_q: Any, at_k: Any, *rest: Any) -> Any:
    _, _, _, _, scale, window = rest
    query, key, value = widened(q, k, v)
    weights, slope = weights_of(query, key, at_q, at_k, scale, window), slope.float()
    steep = torch.einsum("ihd,jhd->hij", slope, value)
    steep = weights * (steep - (weights * steep).sum(-1, keepdim=True)) * (scale or q.shape[2] ** -0.5)
    parts = (
        torch.einsum("hij,jhd->ihd", steep, key),
        torch.einsum("hij,ihd->jhd", steep, query),
        torch.einsum("hij,ihd->jhd", weights, slope),
    )
    return tuple(
        part.unflatten(1, (like.shape[1], -1)).sum(2).to(like.dtype).contiguous()
        for part, like in zip(parts, (q, k, v), strict=True)
    )


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """This CPU counts as a GPU with flash kernels: torch's own function, with the contract above as its kernel."""
    varlen._varlen_attn.register_kernel("cpu")(forward)
    varlen._varlen_attn_backward.register_kernel("cpu")(backward)
    monkeypatch.setattr(attention, "has_kernels", lambda device: True)


def counted_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each call of torch's function from now on, whose inputs are as the kernel wants them."""
    used: list[int] = []
    real = varlen.varlen_attn

    def watched(*parts: Any, **how: Any) -> Any:
        used.append(1)
        assert {part.dtype for part in parts[:3]} == {torch.bfloat16}  # full training turns queries and keys in float32
        assert all(part.is_contiguous() for part in parts[:3])
        assert len(parts[0]) <= len(parts[1]) == len(parts[2])  # shared keys are seen more than once
        assert parts[3].dtype == parts[4].dtype == torch.int32
        return real(*parts, **how)

    monkeypatch.setattr(attention, "varlen_attn", watched)
    return used


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    torch._dynamo.reset()
    counters.clear()


# --- attention ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "width", "softcap", "dropout", "fits"),
    [
        (torch.bfloat16, 64, None, 0.0, True),
        (torch.float16, 256, None, 0.0, True),
        (torch.float32, 64, None, 0.0, False),  # flash kernels compute in 16 bits
        (torch.bfloat16, 60, None, 0.0, False),
        (torch.bfloat16, 224, None, 0.0, False),
        (torch.bfloat16, 512, None, 0.0, False),
        (torch.bfloat16, 64, 50.0, 0.0, False),
        (torch.bfloat16, 64, None, 0.1, False),
    ],
)
def test_one_kernel_is_used_only_where_it_computes_the_same(
    dtype: torch.dtype, width: int, softcap: float | None, dropout: float, fits: bool
) -> None:
    assert one_kernel(dtype, width, softcap, dropout) is fits


def test_a_torch_or_a_device_without_the_kernel_goes_on_document_by_document() -> None:
    assert not has_kernels(CPU)
    assert has_arguments(varlen.varlen_attn)
    assert not has_arguments(None)
    assert not has_arguments(lambda query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False: None)


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("shared", [1, 2])
@pytest.mark.parametrize(
    ("lengths", "parents"), [(LENGTHS, None), ((18,), None), ((6, 3, 1, 8), (-1, 0, 1, 0)), ((2, 5, 9, 2), (-1, -1, 1, 0))]
)
def test_all_documents_in_one_kernel_are_each_document_by_itself(
    kernels: None,
    monkeypatch: pytest.MonkeyPatch,
    lengths: tuple[int, ...],
    parents: tuple[int, ...] | None,
    shared: int,
    window: int | None,
) -> None:
    torch.manual_seed(0)
    made = [torch.randn(1, heads, 18, 8, dtype=torch.bfloat16) for heads in (4, 4 // shared, 4 // shared)]
    slope = torch.randn(1, 18, 4, 8, dtype=torch.bfloat16)
    used = counted_calls(monkeypatch)
    found = []
    for documents in (Documents(lengths, CPU, parents), Documents(lengths, CPU, parents)):
        parts = [part.clone().requires_grad_() for part in made]
        if found:
            documents.spans = None
        out, _ = per_document_attention(torch.nn.Module(), *parts, None, scaling=0.3, sliding_window=window, documents=documents)
        out.backward(slope)
        found.append(torch.cat([out.detach().flatten(), *(part.grad.flatten() for part in parts)]))
    assert apart(*found) < 1e-2
    assert len(used) == 1


@pytest.mark.parametrize("sharing", [None, 8])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma2"])
def test_a_model_learns_the_same_from_one_kernel(
    family: str, sharing: int | None, kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = counted_calls(monkeypatch)
    passes = make_passes(alike() if sharing else rows(), range(8), 90, sharing=sharing)
    at_once = in_passes(Objective(tiny(family), torch.bfloat16), passes)
    assert bool(used) is (family != "gemma2")  # whose scores are capped
    monkeypatch.undo()
    each = in_passes(Objective(tiny(family), torch.bfloat16), passes)
    assert at_once[0] == pytest.approx(each[0], rel=5e-3)
    assert apart(at_once[1], each[1]) < 0.03


# --- tensors without numbers: shapes, number formats, and nothing that waits for a GPU ---------------------------


def without_numbers(objective: Objective, mode: FakeTensorMode) -> None:
    """Every weight of the model in its shape and number format alone."""
    bare: dict[int, Any] = {}
    for module in objective.model.modules():
        for name, part in module._parameters.items():
            if part is not None and id(part) not in bare:
                bare[id(part)] = torch.nn.Parameter(mode.from_tensor(part.detach()), part.requires_grad)
            module._parameters[name] = bare[id(part)] if part is not None else None
        for name, part in module._buffers.items():
            module._buffers[name] = part if part is None else mode.from_tensor(part)


@pytest.mark.parametrize(("family", "lora"), [("llama", True), ("llama", False), ("gpt2", True), ("qwen3", False)])
@pytest.mark.parametrize("one", [True, False])
def test_a_step_waits_for_nothing_before_its_end(family: str, lora: bool, one: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward, backward, clipping and optimizer: a tensor without numbers raises where Python asks for one."""
    used = counted_calls(monkeypatch)
    passes = make_passes(rows(), range(8), 90)
    places = {id(work): work.rows for work in passes}  # they are counted on the CPU, where numbers are at hand
    monkeypatch.setattr(Pass, "rows", property(lambda self: places[id(self)]))
    model = tiny(family)
    objective = Objective(with_lora(model.bfloat16()) if lora else model, torch.bfloat16)
    monkeypatch.setattr(attention, "has_kernels", lambda device: one)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    without_numbers(objective, mode)
    optimizer = make_optimizer(objective.model.named_parameters(), 0.01)
    with mode:
        objective.model.train()
        loss = accumulate(objective, passes)
        weights = [part for group in optimizer.param_groups for part in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        assert torch.stack([loss, norm]).shape == (2,)
        with pytest.raises(Exception, match="_local_scalar_dense"):
            float(loss)
    assert len(used) == (len(passes) * 2 if one else 0)


# --- compiled blocks --------------------------------------------------------------------------------------------

SETS = [
    rows(),
    rows((9, 33, 2), (1, 4, 1), 1),
    rows((50,), (3,), 2),
    rows((7, 7, 7, 8, 9), (1, 2, 3, 4, 5), 3),
    rows((100, 60), (3, 9), 4),
]


@pytest.mark.parametrize(
    ("family", "dtype", "lora", "every", "one"),
    [("qwen2", "bfloat16", True, 0, True), ("mistral", "float32", False, 1, False)],
)
def test_compiled_blocks_learn_the_same_and_are_made_once_for_all_lengths(
    family: str, dtype: str, lora: bool, every: int, one: bool, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """What a compiler sees of them is run as it is, which leaves out only the minutes in which it writes kernels."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    if one:
        request.getfixturevalue("kernels")
    precision = getattr(torch, dtype)
    model = with_lora(tiny(family).to(precision)) if lora else tiny(family)
    objective = Objective(model, precision)
    passes = [work for tokens in SETS for work in make_passes(tokens, range(len(tokens)), 10**6)]
    plain = [in_passes(objective, [work]) for work in passes]
    random = torch.get_rng_state()
    assert compile_blocks(objective) is None
    assert torch.equal(random, torch.get_rng_state())
    assert not any(part.grad is not None for part in model.parameters())
    recompute_blocks(model, every)
    made = counters["stats"]["unique_graphs"]
    limit = 1e-5 if dtype == "float32" else 0.03
    for work, (loss, grad) in zip(passes, plain, strict=True):
        again, slope = in_passes(objective, [work])
        assert again == pytest.approx(loss, rel=limit / 10)
        assert apart(slope, grad) < limit
    assert made == counters["stats"]["unique_graphs"] > 0
    assert bool(counters["graph_break"]) is not one
    model.eval()
    with torch.no_grad():
        model(input_ids=torch.arange(3, 9)[None], use_cache=True)
    assert made == counters["stats"]["unique_graphs"]


def test_where_compiling_fails_the_blocks_stay_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "BACKEND", broken)
    objective = Objective(tiny("llama"), torch.float32)
    work = make_passes(rows(), range(8), 90)
    loss, grad = in_passes(objective, work)
    assert "no compiler on this machine" in str(compile_blocks(objective))
    again, slope = in_passes(objective, work)
    assert again == loss
    assert torch.equal(slope, grad)


def broken(graph: Any, inputs: Any) -> Any:
    raise RuntimeError("no compiler on this machine")


@pytest.mark.parametrize("asked", [True, False])
def test_the_knob_is_heard_and_a_failure_is_told(asked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "BACKEND", broken)
    heard: list[Event] = []
    values = {"model.name": "demo", "data.train_file": "sample:chat", "output.output_dir": str(tmp_path)}
    few = {"training.max_steps": 1, "evaluation.compare": False, "evaluation.generation.max_new_tokens": 1}
    run(RunConfig().with_values(values | few | {"training.compile": asked}), heard.append)
    told = [event.message for event in heard if isinstance(event, Warned) and "no compiler on this machine" in event.message]
    assert len(told) == asked
    assert any(isinstance(event, Stepped) for event in heard)
