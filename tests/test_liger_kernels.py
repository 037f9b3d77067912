"""Liger's own kernels as they are called here, under Triton's interpreter on a CPU: `make liger`.

Its interpreter multiplies bfloat16's bits as integers, so products in that format are left to benchmarks/gpu.py.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch

from llm_finetune_kit.data.batches import make_passes
from llm_finetune_kit.models.liger import NormKind, gated, gated_slopes, load_kernels
from llm_finetune_kit.training.fused import fuse
from llm_finetune_kit.training.step import Objective, mean_loss
from test_liger import FULL, HALF, NORMS, ONE, adapted, plain_norm, plain_turn, put_on, replaced
from test_step import apart, in_passes, rows, tiny

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("only under Triton's interpreter: make liger", allow_module_level=True)
triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
interpreter = pytest.importorskip("triton.runtime.interpreter")
rms_norm = pytest.importorskip("liger_kernel.ops.rms_norm")


@triton.jit
def inverse_root(x: Any) -> Any:
    return tl.rsqrt(x)


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Triton 3.7's interpreter lacks: numbers that are float32 tensors to a kernel, and the GPU library's root."""
    convert = interpreter._implicit_cvt

    def with_floats(value: Any) -> Any:
        if isinstance(value, float):
            return tl.tensor(interpreter.TensorHandle(np.array([value], np.float32), tl.float32), tl.float32)
        return convert(value)

    monkeypatch.setattr(interpreter, "_implicit_cvt", with_floats)
    monkeypatch.setattr(rms_norm, "rsqrt", inverse_root)


LIMITS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}  # the interpreter cuts bfloat16 off instead of rounding


BY_SIXTEEN = (1, 8192, 4, 8)  # so many and so narrow rows, queries' and keys', have a kernel of their own


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("shape", [BY_SIXTEEN, (1, 7, 64), (1, 5, 3, 8), (2, 3, 100), (1, 1, 8)])
@pytest.mark.parametrize("kind", [HALF, FULL, ONE])
@pytest.mark.parametrize("dtype", LIMITS)
def test_a_norm_and_its_gradient(dtype: torch.dtype, kind: NormKind, shape: tuple[int, ...], trained: bool) -> None:
    if dtype is torch.bfloat16 and kind is HALF and trained:
        pytest.skip("the gradient of such a weight multiplies in bfloat16; norms that train are in float32")
    if shape == BY_SIXTEEN and not (trained and dtype is torch.float32):
        pytest.skip("once is enough, at 20 seconds")
    torch.manual_seed(0)
    made = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype), torch.randn(shape).to(dtype)
    found = []
    for norm in (load_kernels().norm, plain_norm):
        x, weight, slope = (part.clone() for part in made)
        x.requires_grad_(), weight.requires_grad_(trained)
        out = norm(x, weight, 1e-5, kind)
        assert out.dtype == dtype and out.shape == shape
        out.backward(slope)
        assert torch.equal(slope, made[2])  # a residual connection hands it on
        found.append([out.detach(), x.grad, *([weight.grad] if trained else [])])
        assert trained or weight.grad is None
    assert max(apart(*pair) for pair in zip(*found, strict=True)) < LIMITS[dtype]


@pytest.mark.parametrize(("dtype", "angles"), [(torch.float32,) * 2, (torch.float16,) * 2, (torch.float16, torch.float32)])
@pytest.mark.parametrize(("heads", "shared", "width"), [(4, 4, 8), (4, 2, 16), (3, 1, 24)])
@pytest.mark.parametrize("one_piece", [True, False])
def test_a_turn_and_its_gradient(
    dtype: torch.dtype, angles: torch.dtype, heads: int, shared: int, width: int, one_piece: bool
) -> None:
    """Positions begin anew with each document; queries lie token by token, as layers write them, or head by head."""
    torch.manual_seed(0)
    positions = torch.cat([torch.arange(count) for count in (4, 1, 6)])
    steps = positions[None, :, None] / 3.0 ** torch.arange(width // 2)
    cos, sin = (torch.cat([part, part], dim=-1).to(angles) for part in (steps.cos(), steps.sin()))
    laid = [torch.randn(1, 11, count, width).to(dtype) for count in (heads, shared)]
    slopes = [torch.randn(1, count, 11, width).to(dtype) for count in (heads, shared)]
    found = []
    for turn in (load_kernels().turn, plain_turn):
        leaves = [part.clone().requires_grad_() for part in laid]
        q, k = ((leaf * 1).transpose(1, 2) for leaf in leaves)
        out = turn(*((q, k) if not one_piece else (q.contiguous(), k.contiguous())), cos, sin)
        torch.autograd.backward(out, [slope.clone() for slope in slopes])
        assert [part.dtype for part in out] == [dtype] * 2
        found.append([*(part.detach() for part in out), *(leaf.grad for leaf in leaves)])
    assert max(apart(*pair) for pair in zip(*found, strict=True)) < LIMITS[dtype]


@pytest.mark.parametrize("shape", [(5, 64), (7, 100), (1, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_gated_product_and_its_gradient_in_place(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    gate, up, slope = (torch.randn(shape).to(dtype) for _ in range(3))
    leaves = [part.clone().requires_grad_() for part in (gate, up)]
    expected = (torch.nn.functional.silu(leaves[0].float()) * leaves[1].float()).to(dtype)
    expected.backward(slope)
    kept = gate.clone(), up.clone(), slope.clone()
    out = gated(gate, up)
    assert torch.equal(gate, kept[0]) and torch.equal(up, kept[1]) and out.dtype == dtype
    assert apart(out, expected.detach()) < LIMITS[dtype]
    *grads, again = gated_slopes(slope, gate, up)
    assert torch.equal(again, out)
    assert [grad.data_ptr() for grad in grads] == [gate.data_ptr(), up.data_ptr()]
    assert torch.equal(slope, kept[2])
    assert max(apart(grad, leaf.grad) for grad, leaf in zip(grads, leaves, strict=True)) < LIMITS[dtype]


SILU = {"llama", "mistral", "qwen2", "qwen3", "granite"}  # with gate and up in layers of their own


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("family", NORMS)
def test_a_model_learns_the_same(family: str, lora: bool) -> None:
    objective = Objective(adapted(family) if lora else tiny(family), torch.float32)
    tokens = rows((3, 7, 11, 2), (1, 2, 5, 1))
    passes = make_passes(tokens, range(4), 14)
    (loss, grad), held_out, before = in_passes(objective, passes), mean_loss(objective, passes)[0], put_on(objective.model)
    assert fuse(objective) is None
    gates = 2 if lora and family in SILU else 0
    assert replaced(objective.model, before) == NORMS[family] + 2 + gates
    again, slope = in_passes(objective, passes)
    assert again == pytest.approx(loss, rel=1e-5)
    assert apart(slope, grad) < 1e-5
    assert mean_loss(objective, passes)[0] == pytest.approx(held_out, rel=1e-5)
