"""Models in 4 and 8 bits: what is packed, that products and gradients are right, and QLoRA from start to other tools."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llm_finetune_kit.data.batches import Pass, evaluation_passes
from llm_finetune_kit.data.masks import Tokens
from llm_finetune_kit.errors import ConfigError, MachineError
from llm_finetune_kit.files import MANIFEST, write_json
from llm_finetune_kit.models import quantization
from llm_finetune_kit.models.adapters import add_lora
from llm_finetune_kit.models.loading import DTYPES, load_base, train_all
from llm_finetune_kit.models.locate import Located, demo_folder, locate
from llm_finetune_kit.models.quantization import quantization_facts
from llm_finetune_kit.models.tokenizer import load_tokenizer
from llm_finetune_kit.opening import open_model
from llm_finetune_kit.training import checkpoint
from llm_finetune_kit.training.optimizer import make_optimizer
from llm_finetune_kit.training.step import Objective, accumulate

bitsandbytes = pytest.importorskip("bitsandbytes")

WAYS = [("nf4", True), ("nf4", False), ("fp4", True), ("int8", False)]
BITS = {"nf4": 0.25, "fp4": 0.35, "int8": 0.02}  # most relative error of a weight matrix
TALL = torch.arange(3, 43)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    was = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(was)


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    settings = {"vocab_size": 120, "n_positions": 64, "n_embd": 48, "n_layer": 2, "n_head": 4, "bos_token_id": 0}
    GPT2LMHeadModel(GPT2Config(**settings, eos_token_id=1)).save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def packed(model: Any) -> dict[str, Any]:
    kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def logits(model: Any, ids: torch.Tensor = TALL) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids[None] % model.config.vocab_size, use_cache=False).logits[0].float()
    return found


# --- what is packed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("kind", "double"), WAYS)
def test_only_the_blocks_linear_layers_are_packed_and_all_else_keeps_its_dtype(
    stories: Path, kind: str, double: bool, dtype: str
) -> None:
    model = load_base(locate(str(stories)), dtype, quantization=kind, double_quantization=double)
    assert len(packed(model)) == 5 * 7
    rest = [part for name, part in model.named_parameters() if "proj" not in name]
    assert len(rest) == 1 + 2 * 5 + 1 and {part.dtype for part in rest} == {DTYPES[dtype]}, "embeddings, norms and head"
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert not any(part.requires_grad for part in model.parameters())
    assert quantization_facts(model) == {
        "type": kind,
        "double_quantization": double,
        "compute_dtype": dtype,
        "library": f"bitsandbytes {bitsandbytes.__version__}",
    }


@pytest.mark.parametrize(("kind", "double"), WAYS)
def test_unpacked_weights_are_near_the_true_ones(stories: Path, kind: str, double: bool) -> None:
    from llm_finetune_kit.models.quantized_layers import plain_weight

    true = dict(load_base(locate(str(stories)), "float32").named_modules())
    model = load_base(locate(str(stories)), "float32", quantization=kind, double_quantization=double)
    for name, layer in packed(model).items():
        weight = plain_weight(layer, torch.float32)
        wanted = true[name].weight
        assert weight.shape == wanted.shape
        assert (weight - wanted).norm() < BITS[kind] * wanted.norm(), name
        assert torch.equal(plain_weight(layer, torch.bfloat16).float(), weight.bfloat16().float())


@pytest.mark.parametrize(("kind", "double"), WAYS)
def test_conv1d_of_gpt2_is_packed_the_right_way_round(gpt2: Path, kind: str, double: bool) -> None:
    located = Located("gpt2", gpt2)
    model = load_base(located, "float32", quantization=kind, double_quantization=double)
    assert len(packed(model)) == 2 * 4
    whole, small = logits(load_base(located, "float32")), logits(model)
    assert (whole - small).norm() < 0.2 * whole.norm()


# --- products and gradients --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_packed_layer_computes_what_its_unpacked_weight_does(stories: Path, kind: str, dtype: torch.dtype) -> None:
    from llm_finetune_kit.models.quantized_layers import plain_weight

    model = load_base(locate(str(stories)), str(dtype).removeprefix("torch."), quantization=kind)
    torch.manual_seed(0)
    for layer in list(packed(model).values())[:7]:
        x = torch.randn(2, 5, layer.in_features, dtype=dtype, requires_grad=True)
        y = layer(x)
        slope = torch.randn_like(y)
        (got,) = torch.autograd.grad(y, x, slope)
        weight = plain_weight(layer, dtype)
        (wanted,) = torch.autograd.grad(torch.nn.functional.linear(x, weight), x, slope)
        assert torch.equal(y, torch.nn.functional.linear(x, weight))
        torch.testing.assert_close(got, wanted)


class Memory(TorchDispatchMode):
    """Notes every piece of memory that an operation's result of at least `least` numbers lies in."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.places = least, set[int]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.numel() >= self.least and out.is_floating_point():
            self.places.add(out.untyped_storage().data_ptr())
        return out


def into(packed: torch.Tensor, state: Any, out: torch.Tensor | None = None) -> torch.Tensor:
    """bitsandbytes' unpacking into a tensor, which it has on a GPU only."""
    plain = bitsandbytes.functional.dequantize_4bit(packed, state)
    with torch.utils._python_dispatch._disable_current_modes():
        return plain if out is None else out.copy_(plain)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_layers_unpack_into_one_piece_of_memory(stories: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from llm_finetune_kit.models import quantized_layers

    model = load_base(Located("stories", stories), "float32", quantization=kind)
    layers = list(packed(model).values())
    shape = max((plain_shape(layer) for layer in layers), key=lambda shape: shape.numel())
    alike = [layer for layer in layers if plain_shape(layer) == shape]
    expected = [quantized_layers.plain_weight(layer, torch.float32) for layer in alike]
    monkeypatch.setattr(quantized_layers, "IN_PLACE", {"cpu"})
    monkeypatch.setattr(quantized_layers, "dequantize_4bit", into)
    places = set()
    for layer, weight in zip(alike, expected, strict=True):
        found = quantized_layers.passing_weight(layer, torch.float32)
        assert torch.equal(found, weight)
        places.add(found.data_ptr())
    assert len(alike) > 1
    assert len(places) == 1


def plain_shape(layer: Any) -> torch.Size:
    return torch.Size((layer.out_features, layer.in_features))


@pytest.mark.parametrize("rows", [1, 7])
def test_a_step_makes_no_weight_anew(stories: Path, rows: int) -> None:
    """Int8, which a CPU too unpacks into a given tensor: forward and backward of a product, after the first one."""
    from llm_finetune_kit.models import quantized_layers

    layers = packed(load_base(Located("stories", stories), "float32", quantization="int8")).values()
    layer = max(layers, key=lambda layer: layer.out_features)
    assert layer.out_features > quantized_layers.ROWS  # of which it unpacks so many at once
    x = torch.randn(rows, layer.in_features, requires_grad=True)
    quantized_layers.product(layer, x).sum().backward()
    room = quantized_layers.passing_weight(layer, torch.float32).untyped_storage().data_ptr()
    with Memory(plain_shape(layer).numel()) as made:
        quantized_layers.product(layer, x).sum().backward()
    assert made.places <= {room}


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_training_is_the_same_after_an_evaluation(stories: Path, kind: str) -> None:
    """bitsandbytes' own CPU layers pack their weights anew in evaluation and give no right gradient from then on."""
    model = load_base(locate(str(stories)), "bfloat16", quantization=kind)

    def gradient() -> torch.Tensor:
        states = model.get_input_embeddings()(TALL[None]).detach().requires_grad_(True)
        model.train()
        model(inputs_embeds=states, use_cache=False).logits.float().square().mean().backward()
        assert states.grad is not None
        return states.grad

    before = gradient()
    model.eval()
    evaluated = logits(model)
    assert torch.equal(gradient(), before) and before.abs().max() > 0
    model.train()
    assert torch.equal(logits(model), evaluated), "training and evaluation see the same model"


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_document_comes_out_as_it_does_alone(stories: Path, kind: str) -> None:
    model = load_base(locate(str(stories)), "float32", quantization=kind).eval()
    alone = logits(model)
    with torch.no_grad():
        other = torch.full_like(TALL, 40)
        both = model(input_ids=torch.stack([other, TALL]), use_cache=False).logits[1]
    torch.testing.assert_close(both, alone, rtol=1e-4, atol=1e-4)


# --- QLoRA -------------------------------------------------------------------------------------------------


def two_documents() -> Pass:
    ids = np.concatenate([np.arange(3, 43), np.arange(60, 100)]).astype(np.int32)
    tokens = Tokens(ids, np.ones(80, dtype=bool), np.array([0, 40, 80]), np.zeros(2, dtype=np.int32))
    return next(evaluation_passes(tokens, 128))


Made = tuple[Any, Any, Any]


@pytest.fixture
def make() -> Callable[..., Made]:
    def made(folder: Path, kind: str, dtype: str = "float32") -> Made:
        base = load_base(locate(str(folder)), dtype, quantization=kind)
        targets = ["q_proj", "v_proj", "up_proj", "down_proj"]
        how = {"r": 4, "alpha": 8, "dropout": 0.0, "targets": targets, "base_name": str(folder), "seed": 1}
        model = add_lora(base, **how)
        model.train()
        return model, Objective(model, DTYPES[dtype]), make_optimizer(model.named_parameters(), 0.0)

    return made


def train(made: Made, steps: int) -> list[float]:
    model, objective, optimizer = made
    losses = []
    for _ in range(steps):
        model.train()
        losses.append(float(accumulate(objective, [two_documents()])))
        for group in optimizer.param_groups:
            group["lr"] = 0.02
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return losses


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("name", ["stories", "demo"])
def test_qlora_learns_on_a_cpu(stories: Path, make: Callable[..., Made], name: str, kind: str, dtype: str) -> None:
    made = make(stories if name == "stories" else demo_folder(), kind, dtype)
    losses = train(made, 8)
    assert losses[-1] < 0.8 * losses[0]
    frozen = {part.dtype for part in made[0].parameters() if not part.requires_grad}
    assert frozen <= {DTYPES[dtype], torch.uint8, torch.int8}, "nothing was widened to float32 in passing"


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_qlora_resumes_bit_for_bit(stories: Path, make: Callable[..., Made], kind: str, tmp_path: Path) -> None:
    whole = make(stories, kind)
    losses = train(whole, 4)
    first = make(stories, kind)
    begun = train(first, 2)
    checkpoint.take(first[0], first[2], checkpoint.Progress(step=2)).write(tmp_path)
    second = make(stories, kind)
    assert checkpoint.restore(second[0], second[2], tmp_path).step == 2
    assert begun + train(second, 2) == losses
    trained = [{name: part for name, part in made[0].named_parameters() if part.requires_grad} for made in (whole, second)]
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


@pytest.mark.parametrize("full", [True, False])
def test_its_adapter_loads_in_plain_peft_on_the_whole_base_and_on_the_packed_one(
    stories: Path, make: Callable[..., Made], tmp_path: Path, full: bool
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    made = make(stories, "nf4")
    train(made, 3)
    checkpoint.weights_writer(made[0])(tmp_path)
    load_tokenizer(stories).save(tmp_path)
    settings = None if full else quantization.loading_settings("nf4", True, torch.float32)
    base = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32, quantization_config=settings)
    there = logits(PeftModel.from_pretrained(base, tmp_path).train())  # in evaluation bitsandbytes rounds to bfloat16
    here = logits(open_model(str(tmp_path), dtype="float32", quantization=None if full else "nf4").model)
    torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-4)


def test_an_adapter_is_opened_on_a_base_as_it_was_trained_on(stories: Path, make: Callable[..., Made], tmp_path: Path) -> None:
    made = make(stories, "fp4")
    train(made, 2)
    checkpoint.weights_writer(made[0])(tmp_path)
    load_tokenizer(stories).save(tmp_path)
    write_json(tmp_path / MANIFEST, {"base_model": str(stories), "quantization": quantization_facts(made[0]), "files": {}})
    opened = open_model(str(tmp_path), dtype="float32")
    assert quantization_facts(opened.model)["type"] == "fp4"
    torch.testing.assert_close(logits(opened.model), logits(made[0].eval()), rtol=1e-4, atol=1e-4)
    assert quantization_facts(open_model(str(tmp_path), dtype="float32", quantization=None).model) == {}
    assert quantization_facts(open_model(str(tmp_path), dtype="float32", quantization="int8").model)["type"] == "int8"
    assert quantization_facts(open_model(str(stories), dtype="float32").model) == {}


# --- refusals ----------------------------------------------------------------------------------------------


def test_without_bitsandbytes_the_exact_command_is_told(stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    with pytest.raises(MachineError) as caught:
        load_base(locate(str(stories)), "float32", quantization="nf4")
    assert caught.value.fix == "pip install 'llm-finetune-kit[quantization]'"
    load_base(locate(str(stories)), "float32")


def test_a_packed_model_cannot_be_trained_in_full(stories: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be trained in full"):
        train_all(load_base(locate(str(stories)), "float32", quantization="nf4"))


def test_transformers_reads_files_as_before_after_a_model_was_packed(stories: Path) -> None:
    from transformers import modeling_utils

    before = modeling_utils.safe_open
    load_base(locate(str(stories)), "float32", quantization="nf4")
    assert modeling_utils.safe_open is before


PLAIN_THEN_PACKED = """
import sys
from llm_finetune_kit.models.adapters import add_lora
from llm_finetune_kit.models.loading import load_base
from llm_finetune_kit.models.locate import locate

def adapted(quantization):
    base = load_base(locate("demo"), "bfloat16", quantization=quantization)
    return add_lora(base, r=2, alpha=4, dropout=0.0, targets=["q_proj"], base_name="demo", seed=0)

adapted(None)
print([name for name in ("bitsandbytes", "torch._inductor.compile_fx") if name in sys.modules])
print(type(adapted("nf4").get_submodule("base_model.model.model.layers.0.self_attn.q_proj")).__name__)
"""


def test_a_plain_adapter_loads_no_quantizer_and_a_packed_one_after_it_does() -> None:
    done = subprocess.run([sys.executable, "-c", PLAIN_THEN_PACKED], capture_output=True, text=True, check=False)
    assert done.stdout.split("\n")[:2] == ["[]", "Fast4bit"], done.stderr
