"""Adapters of every kind: what they compute, save, load, switch off and refuse."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from llm_finetune_kit.errors import ConfigError, ModelError
from llm_finetune_kit.models.adapters import add_lora, load_adapter, restore_adapter, save_adapter, without_adapter
from llm_finetune_kit.models.attention import NAME
from llm_finetune_kit.models.freezing import freeze
from llm_finetune_kit.models.loading import load_base, train_all
from llm_finetune_kit.models.locate import Located
from llm_finetune_kit.models.products import LoraProducts
from llm_finetune_kit.training.step import Objective, mean_loss
from test_step import SMALL, TARGETS, WAYS, apart, gradient, in_passes, plain_loss, rows, tied_model, tiny

IDS = torch.arange(3, 40)[None]
EMBEDDINGS = {"gpt2": "wte", "llama": "embed_tokens", "qwen2": "embed_tokens"}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"variant": "rslora"},
    "dora": {"variant": "dora"},
    "pissa": {"init": "pissa"},
    "pissa rslora": {"init": "pissa", "variant": "rslora"},
    "all biases": {"bias": "all"},
    "their biases": {"bias": "lora_only"},
    "embeddings": {"modules_to_save": ["EMBEDDINGS", "lm_head"]},
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def base_of(family: str, tied: bool = False) -> Any:
    return (tied_model(family) if tied else tiny(family)).eval()


def adapted(model: Any, kind: str, *, dropout: float = 0.0, seed: int = 1, **more: Any) -> Any:
    family = model.config.model_type
    how = {**KINDS[kind], **more}
    if "modules_to_save" in how:
        how["modules_to_save"] = [EMBEDDINGS[family] if name == "EMBEDDINGS" else name for name in how["modules_to_save"]]
    return add_lora(model, r=4, alpha=8, dropout=dropout, targets=TARGETS[family], base_name="the/base", seed=seed, **how).eval()


def shake(model: Any, size: float = 0.05) -> Any:
    """As after training: everything that is trained has moved."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * size)
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits  # type: ignore[no-any-return]


# --- every kind, through its whole life ---------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", TARGETS)
def test_fault_054_an_adapter_lives_and_comes_back(family: str, kind: str, tied: bool, tmp_path: Path) -> None:
    """Starts as the base, moves, is the base when off, and gives the same logits in plain PEFT, restored and merged."""
    base = logits(base_of(family, tied))
    model = adapted(base_of(family, tied), kind)
    assert apart(logits(model), base) < 1e-6
    tuned = logits(shake(model))
    assert apart(tuned, base) > 1e-2
    with without_adapter(model):
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), tuned)
    save_adapter(model, tmp_path)
    assert apart(logits(PeftModel.from_pretrained(base_of(family, tied), tmp_path).eval()), tuned) < 1e-6
    loaded = load_adapter(base_of(family, tied), tmp_path).eval()
    assert torch.equal(logits(loaded), tuned)
    with without_adapter(loaded):
        assert torch.equal(logits(loaded), base)
    again = adapted(base_of(family, tied), kind, seed=2)
    restore_adapter(again, tmp_path)
    assert torch.equal(logits(again), tuned)
    assert [name for name, part in again.named_parameters() if not torch.equal(part, dict(model.named_parameters())[name])] == []
    assert apart(logits(again.merge_and_unload()), tuned) < 1e-5


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "pissa" not in kind])
@pytest.mark.parametrize("family", TARGETS)
def test_every_kind_is_what_peft_computes(family: str, kind: str, tmp_path: Path) -> None:
    """Loss and gradients in all ways of making passes, against PEFT's own layers on a padded batch."""
    tokens, ours = rows(), shake(adapted(base_of(family), kind))
    save_adapter(ours, tmp_path)
    theirs = PeftModel.from_pretrained(base_of(family), tmp_path, is_trainable=True).train()
    loss = plain_loss(theirs, tokens)
    loss.backward()
    reference = dict(theirs.named_parameters())
    objective = Objective(ours, torch.float32)
    assert objective.plain_head
    for way, arranged in WAYS.items():
        found, _ = in_passes(objective, arranged(tokens))
        assert found == pytest.approx(loss.item(), rel=1e-6), way
        for name, part in ours.named_parameters():
            if part.requires_grad:
                assert apart(part.grad, reference[name].grad) < 2e-5, (way, name)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("family", TARGETS)
def test_pissa_is_the_residual_and_its_main_part(family: str, dropout: float) -> None:
    """Against PEFT's PiSSA, which takes the main part out of the base: same sum, same gradients, dropout too."""
    ours = adapted(base_of(family), "pissa", dropout=dropout)
    theirs = adapted(base_of(family), "lora", dropout=dropout)
    with torch.no_grad():
        mine = dict(ours.named_modules())
        for path, layer in theirs.named_modules():
            if hasattr(layer, "lora_A"):
                twin = mine[path]
                main = twin.scaling["default"] * twin.first_up @ twin.first_down
                layer.get_base_layer().weight -= main.T if layer.fan_in_fan_out else main
                layer.lora_A["default"].weight.copy_(twin.lora_A["default"].weight)
                layer.lora_B["default"].weight.copy_(twin.lora_B["default"].weight)
    for model in (ours, theirs):
        model.train()
        torch.manual_seed(4)
        plain_loss(shake(model), rows()).backward()
    assert apart(gradient(ours), gradient(theirs)) < 1e-4


def test_pissa_starts_at_the_largest_directions() -> None:
    model = adapted(base_of("llama"), "pissa")
    layer = next(module for path, module in model.named_modules() if path.endswith("gate_proj"))
    weight, main = layer.get_base_layer().weight, layer.scaling["default"] * layer.first_up @ layer.first_down
    best = torch.linalg.svdvals(weight)[4:].square().sum().sqrt()
    assert float((weight - main).norm()) < 1.01 * float(best)


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "pissa"])
def test_a_kind_that_can_be_fused_is(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    product, model = LoraProducts.apply, adapted(base_of("llama"), kind)
    monkeypatch.setattr(LoraProducts, "apply", lambda *parts: (used.append(1), product(*parts))[1])
    logits(model)
    assert len(used) == 2 * 7


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_trains_in_float32(family: str, kind: str, dtype: torch.dtype) -> None:
    """What is trained is float32, what is frozen is not, and the gradient is that of full precision to a percent or so."""
    tokens, whole = rows(), shake(adapted(base_of(family), kind))
    _, reference = in_passes(Objective(whole, torch.float32), WAYS["packed into a few"](tokens))
    half = adapted(base_of(family).to(dtype), kind)
    norms = kind == "all biases"
    assert {part.dtype for part in half.parameters() if part.requires_grad} == {torch.float32}
    assert {part.dtype for name, part in half.named_parameters() if not part.requires_grad and not (norms and "ln_" in name)} == {
        dtype
    }
    half.load_state_dict(whole.state_dict())
    for path, layer in half.named_modules():
        if getattr(layer, "first_down", None) is not None:
            twin = whole.get_submodule(path)
            layer.set_first(twin.first_down, twin.first_up)
    objective = Objective(half, dtype)
    _, grad = in_passes(objective, WAYS["packed into a few"](tokens))
    assert apart(grad, reference) < 0.06
    if kind == "embeddings":
        assert half.get_base_model().get_input_embeddings()(IDS).dtype == dtype  # states do not grow with the weights


# --- heads, embeddings and new tokens ----------------------------------------------------------------------


@pytest.mark.parametrize("family", TARGETS)
def test_fault_054_trained_embeddings_stay_tied_to_the_head(family: str, tmp_path: Path) -> None:
    model = adapted(base_of(family, tied=True), "lora", modules_to_save=["EMBEDDINGS"])
    ends = [model.get_base_model().get_input_embeddings(), model.get_base_model().get_output_embeddings()]
    weights = [end.modules_to_save["default"].weight for end in ends]
    assert weights[0] is weights[1]
    assert sum(part is weights[0] for part in model.parameters()) == 1
    save_adapter(shake(model), tmp_path)
    merged = load_adapter(base_of(family, tied=True), tmp_path).merge_and_unload()
    assert torch.equal(merged.get_input_embeddings().weight, merged.get_output_embeddings().weight)


def test_the_head_follows_the_switch() -> None:
    base, model = Objective(base_of("llama"), torch.float32), shake(adapted(base_of("llama"), "embeddings"))
    objective, passes = Objective(model, torch.float32), WAYS["packed into a few"](rows())
    tuned = mean_loss(objective, passes)
    with without_adapter(model):
        assert mean_loss(objective, passes) == mean_loss(base, passes)
    assert mean_loss(objective, passes) == tuned != mean_loss(base, passes)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", TARGETS)
def test_fault_053_new_tokens_are_trained_and_saved(family: str, tied: bool, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="133 tokens and the model embeddings for 128") as refused:
        adapted(base_of(family, tied), "lora", vocabulary=133)
    assert f"lora.modules_to_save=[{EMBEDDINGS[family]}, lm_head]" in refused.value.fix
    model = adapted(base_of(family, tied), "embeddings", vocabulary=133)
    embeddings = model.get_base_model().get_input_embeddings().weight
    assert torch.allclose(embeddings[128:], embeddings[:128].mean(0).expand(5, -1), atol=1e-6)
    ids = torch.arange(100, 133)[None]
    shake(model)
    save_adapter(model, tmp_path)
    with torch.no_grad():
        tuned = model(input_ids=ids).logits
        assert tuned.shape[-1] == 133
        again = load_adapter(base_of(family, tied), tmp_path).eval()
        assert torch.equal(again(input_ids=ids).logits, tuned)
        back = adapted(base_of(family, tied), "embeddings", vocabulary=133, seed=8)
        restore_adapter(back, tmp_path)
        assert torch.equal(back(input_ids=ids).logits, tuned)


def test_a_layer_to_train_whole_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="no layer embed_token") as refused:
        adapted(tiny("llama"), "lora", modules_to_save=["embed_token"])
    assert "embed_tokens" in refused.value.fix


# --- adapters that do not fit ------------------------------------------------------------------------------


def other_size() -> Any:
    config = AutoConfig.for_model("llama", **{**SMALL, "hidden_size": 48})
    return AutoModelForCausalLM.from_config(config, attn_implementation=NAME)


def one_block_fewer() -> Any:
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", **{**SMALL, "num_hidden_layers": 1}), attn_implementation=NAME
    )


def change_settings(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_tensors(folder: Path, change: Any) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})


def renamed(state: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("layers.1", "layers.7"): part for name, part in state.items()}


def without_last(state: dict[str, Any]) -> dict[str, Any]:
    return {name: state[name] for name in sorted(state)[:-1]}


@pytest.mark.parametrize(
    ("base", "spoil", "says"),
    [
        (other_size, None, "4 x 32 in the file and 4 x 48 in the model"),
        (one_block_fewer, None, "is not in the model"),
        (lambda: tiny("gpt2"), None, ""),
        (lambda: tiny("llama"), lambda folder: change_settings(folder, r=8), "4 x 32 in the file and 8 x 32 in the model"),
        (
            lambda: tiny("llama"),
            lambda folder: change_tensors(folder, renamed),
            "layers.1.mlp.down_proj.lora_A.weight is not in the file",
        ),
        (lambda: tiny("llama"), lambda folder: change_tensors(folder, without_last), "is not in the file"),
        (lambda: tiny("llama"), lambda folder: change_settings(folder, peft_type="NONSENSE"), ""),
        (lambda: tiny("llama"), lambda folder: change_settings(folder, target_modules=["none_such"]), ""),
    ],
)
def test_fault_056_an_adapter_that_does_not_fit_names_its_base(base: Any, spoil: Any, says: str, tmp_path: Path) -> None:
    save_adapter(adapted(tiny("llama"), "lora"), tmp_path)
    if spoil:
        spoil(tmp_path)
    with pytest.raises(ModelError, match="trained on the/base") as refused:
        load_adapter(base(), tmp_path)
    assert says in refused.value.why


@pytest.mark.parametrize(("kind", "other"), [("lora", "dora"), ("lora", "pissa"), ("embeddings", "lora")])
def test_fault_056_a_checkpoint_made_otherwise_is_refused(kind: str, other: str, tmp_path: Path) -> None:
    save_adapter(adapted(tiny("llama"), kind), tmp_path)
    with pytest.raises(ModelError, match="does not fit this model"):
        restore_adapter(adapted(tiny("llama"), other), tmp_path)


# --- full fine-tuning of the upper blocks ------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", TARGETS)
def test_frozen_blocks_stay_and_the_others_get_the_same_gradient(family: str, tied: bool) -> None:
    whole, part = train_all(base_of(family, tied)), train_all(base_of(family, tied))
    freeze(part, 1)
    passes = WAYS["packed into a few"](rows())
    in_passes(Objective(whole, torch.float32), passes)
    in_passes(Objective(part, torch.float32), passes)
    reference = dict(whole.named_parameters())
    trained = {name for name, parameter in part.named_parameters() if parameter.requires_grad}
    assert trained and not any(word in name for name in trained for word in ("layers.0.", "h.0.", "embed", "wte", "wpe"))
    assert any("layers.1." in name or "h.1." in name for name in trained)
    for name, parameter in part.named_parameters():
        if name in trained:
            assert apart(parameter.grad, reference[name].grad) < 1e-5, name
        else:
            assert parameter.grad is None
    head = part.get_output_embeddings().weight
    assert (head is part.get_input_embeddings().weight) == (tied or family == "gpt2")
    assert head.requires_grad == (head is not part.get_input_embeddings().weight)


# --- on quantized bases ------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def stored(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Located:
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("stored")
    tiny(request.param).save_pretrained(folder)
    return Located(request.param, folder)


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "pissa", "embeddings"])
@pytest.mark.parametrize("bits", ["nf4", "int8"])
def test_adapters_on_a_quantized_base(stored: Located, kind: str, bits: str, tmp_path: Path) -> None:
    """Passes do not change the gradient, PEFT's layers agree, and the adapter comes back."""
    tokens = rows()

    def fresh() -> Any:
        return load_base(stored, "float32", quantization=bits).eval()

    model = adapted(fresh(), kind)
    assert apart(logits(model), logits(fresh())) < 1e-5
    with without_adapter(shake(model)):
        assert apart(logits(model), logits(fresh())) < 1e-6
    objective = Objective(model, torch.float32)
    loss, reference = in_passes(objective, WAYS["all eight in one pass"](tokens))
    for way, arranged in WAYS.items():
        found, grad = in_passes(objective, arranged(tokens))
        assert found == pytest.approx(loss, rel=1e-6), way
        assert apart(grad, reference) < 2e-5, way
    save_adapter(model.eval(), tmp_path)
    theirs = PeftModel.from_pretrained(fresh(), tmp_path).eval()
    assert apart(logits(theirs), logits(model)) < 1e-5
    assert torch.equal(logits(load_adapter(fresh(), tmp_path).eval()), logits(model))
    whole = PeftModel.from_pretrained(base_of(stored.name), tmp_path).eval()  # and on the base in full precision
    assert apart(logits(whole), logits(model)) < 2 * apart(logits(base_of(stored.name)), logits(fresh()))


def test_biases_of_a_quantized_base_are_refused(stored: Located) -> None:
    with pytest.raises(ConfigError, match="biases"):
        adapted(load_base(stored, "float32", quantization="nf4"), "all biases")


def test_a_copy_of_an_adapted_model_is_its_own() -> None:
    model = adapted(base_of("llama"), "pissa")
    other = copy.deepcopy(model)
    before = logits(model)
    shake(other)
    assert torch.equal(logits(model), before)
    assert not torch.equal(logits(other), before)
