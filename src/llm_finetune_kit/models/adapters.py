"""LoRA on a base model: put on, saved, loaded, switched off, and asked which base it belongs to."""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from llm_finetune_kit.errors import ConfigError, ModelError, nearest
from llm_finetune_kit.files import about_to
from llm_finetune_kit.models.facts import built_empty
from llm_finetune_kit.models.quantization import only_if_loaded
from llm_finetune_kit.models.safety import check_adapter_files

WEIGHTS = "adapter_model.safetensors"
SETTINGS = "adapter_config.json"
INSIDE = "base_model.model."  # what PEFT puts before the name of a tensor


@only_if_loaded()
def add_lora(
    model: Any,
    *,
    r: int,
    alpha: int,
    dropout: float,
    targets: list[str],
    base_name: str,
    seed: int,
    variant: str = "lora",
    init: str = "default",
    bias: str = "none",
    modules_to_save: list[str] | None = None,
    vocabulary: int | None = None,
) -> Any:
    """The model with trainable low-rank matrices beside frozen layers; all that is trained is float32.

    `variant` is lora, rslora (strength alpha / sqrt(r)) or dora (with the length of each output trained apart);
    `init` is default or pissa; `bias` is none, all or lora_only; `modules_to_save` are layers trained whole, such
    as embed_tokens and lm_head: tied ones stay tied. `vocabulary` is the number of the tokenizer's tokens: missing
    embeddings are added where the embeddings are trained. Raises ConfigError or ModelError for what cannot be.
    """
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers.pytorch_utils import Conv1D

    from llm_finetune_kit.models.lora import Fused, fast_layers
    from llm_finetune_kit.models.together import fuse_blocks

    layers = fast_layers()
    torch.manual_seed(seed)
    whole = _whole_modules(model, modules_to_save or [])
    if getattr(model, "is_quantized", False) and bias != "none":  # it may have come so, unknown to the plan
        raise ConfigError(61, "the biases of a quantized model cannot be trained", where="lora.bias", fix="set lora.bias=none")
    if vocabulary is not None:
        _make_room(model, vocabulary, whole)
    wrapped = [module for path, module in model.named_modules() if path.rpartition(".")[2] in targets]
    settings = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in wrapped),
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=base_name,
        use_rslora=variant == "rslora",
        use_dora=variant == "dora",
        bias=bias,
        modules_to_save=whole or None,
        ensure_weight_tying=bool(whole) and _tied(model),
    )
    settings._register_custom_module(layers)
    biases = _biases(model)
    with _no_warnings():
        adapted = get_peft_model(model, settings, autocast_adapter_dtype=True)
    settings.base_model_name_or_path = base_name
    if init == "pissa":
        for module in adapted.modules():
            if isinstance(module, Fused):
                module.start_at_the_main_part("default")
    finished = _finished(adapted, biases)
    fuse_blocks(finished)
    return finished


@contextmanager
def _no_warnings() -> Iterator[None]:
    """PEFT warns of what is meant here, and of what is checked and raised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def _tied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def check_whole_modules(folder: Path, asked: list[str], *, trusted: bool = False) -> None:
    """Raise ConfigError where the model has no module that is asked for, before its weights are fetched and loaded."""
    _whole_modules(built_empty(folder, trusted), asked)


def _whole_modules(model: Any, asked: list[str]) -> list[str]:
    """The asked layers by their last names; where embeddings and head are tied, both or neither."""
    names = {path.rpartition(".")[2]: module for path, module in model.named_modules() if path}
    for name in asked:
        if name not in names:
            near = nearest(name, list(names))
            fix = f"did you mean {near[0]}?" if near else f"this model's are {_name(model, True)} and {_name(model, False)}"
            raise ConfigError(62, f"this model has no layer {name}", where="lora.modules_to_save", fix=fix)
    ends = {_name(model, True), _name(model, False)} if _tied(model) else set()
    return sorted({*asked, *ends}) if ends & set(asked) else sorted(set(asked))


def _name(model: Any, inputs: bool) -> str:
    layer = model.get_input_embeddings() if inputs else model.get_output_embeddings()
    return str(next((path.rpartition(".")[2] for path, module in model.named_modules() if module is layer), "lm_head"))


def _make_room(model: Any, vocabulary: int, whole: list[str]) -> None:
    """Embeddings for tokens that the model has none for, each starting as the mean of the others."""
    known = len(model.get_input_embeddings().weight)
    if vocabulary <= known:
        return
    needed = [_name(model, True), _name(model, False)]
    if not set(needed) <= set(whole):
        raise ModelError(
            60,
            f"the tokenizer has {vocabulary} tokens and the model embeddings for {known}",
            why="the new tokens would keep random embeddings, which LoRA does not train",
            fix=f"train them too: lora.modules_to_save=[{', '.join(needed)}]",
        )
    model.resize_token_embeddings(vocabulary, mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight[known:] = layer.weight[:known].float().mean(0).to(layer.weight.dtype)


def _biases(model: Any) -> dict[str, torch.Tensor]:
    return {name: part.detach().clone() for name, part in model.named_parameters() if name.rpartition(".")[2] == "bias"}


def _finished(model: Any, biases: dict[str, torch.Tensor]) -> Any:
    """What PEFT leaves undone: trained weights in float32, no copies of inputs, and the base's biases kept."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = False  # autocast brings each product to the right dtype
        elif isinstance(module, ModulesToSaveWrapper):
            _returns(module.modules_to_save["default"], module.original_module.weight.dtype)
    norms = (module for module in model.modules() if "norm" in type(module).__name__.lower())
    for module in (module for module in norms if getattr(getattr(module, "bias", None), "requires_grad", False)):
        module.weight.data = module.weight.data.float()  # torch has no norm with two dtypes in its weights
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    model.biases_of_base = biases if model.peft_config["default"].bias != "none" else {}
    return model


def _returns(module: Any, dtype: torch.dtype) -> None:
    """Embeddings trained in float32 still hand on states in the model's dtype."""
    if isinstance(module, torch.nn.Embedding):
        module.register_forward_hook(lambda _module, _inputs, out: out.to(dtype))


@contextmanager
def without_adapter(model: Any) -> Iterator[None]:
    """The base as it was before training, biases included (PEFT alone would leave trained ones in)."""
    named = {name.removeprefix(INSIDE).replace(".base_layer.", "."): part for name, part in model.named_parameters()}
    biases = getattr(model, "biases_of_base", {})  # not there where PEFT alone loaded the adapter
    trained = {name: named[name].data for name in biases}
    try:
        for name, values in biases.items():
            named[name].data = values.to(trained[name])
        with _no_warnings(), model.disable_adapter():
            yield
    finally:
        for name, values in trained.items():
            named[name].data = values


@dataclass(frozen=True)
class AdapterCopy:
    """An adapter as it was at one moment: its tensors by the names of PEFT's file, and its settings."""

    tensors: dict[str, torch.Tensor]
    settings: Any


def save_adapter(model: Any, folder: Path) -> None:
    """Write the adapter in PEFT's layout."""
    write_adapter(copy_adapter(model), folder)


def copy_adapter(model: Any) -> AdapterCopy:
    """The adapter now, on the CPU. One that PiSSA started becomes a plain one of rank 2r: W + s BA - s B'A'."""
    from peft import get_peft_model_state_dict

    settings = copy.copy(model.peft_config["default"])
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    for path, layer in _started_by_pissa(model):
        state[f"{path}.lora_A.weight"] = torch.cat([state[f"{path}.lora_A.weight"], layer.first_down])
        state[f"{path}.lora_B.weight"] = torch.cat([state[f"{path}.lora_B.weight"], -layer.first_up], dim=1)
    if any(_started_by_pissa(model)):
        settings.r, settings.lora_alpha = 2 * settings.r, settings.lora_alpha * (2**0.5 if settings.use_rslora else 2)
    if settings.ensure_weight_tying:  # PEFT finds GPT-2's wte tied only where the head is named too
        settings.modules_to_save = sorted({*settings.modules_to_save, _name(model.get_base_model(), False)})
    settings.inference_mode = True
    # a clone each: tied weights stand in the file twice, as PEFT reads both
    return AdapterCopy({name: part.detach().cpu().contiguous().clone() for name, part in state.items()}, settings)


def write_adapter(adapter: AdapterCopy, folder: Path) -> None:
    """Write a copied adapter in PEFT's layout."""
    about_to("write", folder / WEIGHTS)
    save_file(adapter.tensors, folder / WEIGHTS, {"format": "pt"})
    about_to("write", folder / SETTINGS)
    adapter.settings.save_pretrained(folder)


def _started_by_pissa(model: Any) -> Iterator[tuple[str, Any]]:
    for path, module in model.named_modules():
        if getattr(module, "first_down", None) is not None:
            yield path, module


@torch.no_grad()
def restore_adapter(model: Any, folder: Path) -> None:
    """Put a saved adapter back into a model that `add_lora` made alike. Raises ModelError if it was made otherwise."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    state = load_file(folder / WEIGHTS)
    for path, layer in _started_by_pissa(model):
        try:
            downs, ups = state[f"{path}.lora_A.weight"].chunk(2), state[f"{path}.lora_B.weight"].chunk(2, dim=1)
        except KeyError:
            break  # told below
        layer.set_first(downs[1].clone(), -ups[1])
        state[f"{path}.lora_A.weight"], state[f"{path}.lora_B.weight"] = downs[0], ups[0]
    here = get_peft_model_state_dict(model, save_embedding_layers=False)
    wrong = _first_difference(
        {name: part.shape for name, part in state.items()}, {name: part.shape for name, part in here.items()}
    )
    if wrong:
        raise ModelError(20, f"does not fit this model: {wrong}", where=str(folder), fix="resume the run with its own base model")
    set_peft_model_state_dict(model, state)


def _first_difference(stored: dict[str, Any], here: dict[str, Any]) -> str:
    """What is wrong between the tensors of a file and those of a model, as words; empty if nothing is."""
    for name in sorted(stored.keys() | here.keys()):
        short = name.removeprefix(INSIDE)
        if name not in here:
            return f"{short} is not in the model"
        if name not in stored:
            return f"{short} is not in the file"
        if tuple(stored[name]) != tuple(here[name]):
            sizes = (" x ".join(map(str, shape[name])) for shape in (stored, here))
            return "{} is {} in the file and {} in the model".format(short, *sizes)
    return ""


def load_adapter(model: Any, folder: Path, *, trainable: bool = False) -> Any:
    """The base model with the adapter in `folder` on it. Raises ModelError, naming its base, if it does not fit."""
    from peft import LoraConfig, PeftModel, get_peft_model_state_dict

    from llm_finetune_kit.models.lora import fast_layers

    check_adapter_files(folder)
    base = base_of_adapter(folder)
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            stored = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        settings = LoraConfig.from_pretrained(folder)
        settings._register_custom_module(fast_layers())
        rows = stored.get(f"{INSIDE}{_path(model, model.get_input_embeddings())}.weight", (0,))[0]
        if rows > len(model.get_input_embeddings().weight):
            model.resize_token_embeddings(rows, mean_resizing=False)
        biases = _biases(model)
        with _no_warnings():
            adapted = PeftModel.from_pretrained(model, folder, config=settings, is_trainable=trainable, local_files_only=True)
        wrong = _first_difference(
            stored, {k: v.shape for k, v in get_peft_model_state_dict(adapted, save_embedding_layers=False).items()}
        )
    except Exception as error:  # PEFT and safetensors raise ValueError, KeyError, RuntimeError and others
        raise _misfit(folder, base, str(error) or type(error).__name__) from error
    if wrong:
        raise _misfit(folder, base, wrong)
    return _finished(adapted, biases)


def _path(model: Any, layer: Any) -> str:
    return str(next(path for path, module in model.named_modules() if module is layer))


def _misfit(folder: Path, base: str | None, problem: str) -> ModelError:
    """The error for an adapter that another model than this one was trained with."""
    lines = problem.strip().splitlines()
    size = re.search(r"size mismatch for (\S+): .*?\[([\d, ]+)\].*?\[([\d, ]+)\]", problem)
    if size:
        name = size[1].removeprefix(INSIDE).replace(".default", "")
        lines = [f"{name} is {size[2].replace(', ', ' x ')} in the file and {size[3].replace(', ', ' x ')} in the model"]
    return ModelError(
        21,
        f"the adapter does not fit this model: it was trained on {base}",
        where=str(folder),
        why=lines[0][:200],
        fix=f"open it on {base}, or use an adapter of this model",
    )


def base_of_adapter(folder: Path) -> str | None:
    """The base model's name if `folder` holds an adapter, else None."""
    path = folder / SETTINGS
    if not path.is_file():
        return None
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(22, "names no base model", where=str(path), fix="train again, or restore the file") from error
