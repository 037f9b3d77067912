"""What a config asks for that cannot be, or that nothing will read: told before any weights are loaded. Pure."""

from __future__ import annotations

from typing import Any

from llm_finetune_kit.errors import ConfigError, MachineError

OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit")
LIGER = ("cuda",)  # devices that Liger's kernels are for


def refuse(config: Any, model: Any, data: Any) -> None:
    """Raise ConfigError for settings that exclude each other or are more than the model has.

    `config` is a RunConfig, `model` a ModelFacts and `data` a DataFacts.
    """
    if config.method == "full":
        _refuse_full(config, model)
    else:
        _refuse_adapter(config.lora, config.model.quantization)
    asked = config.model.max_length
    if asked is not None and min(asked, data.longest) > model.positions and model.learned_positions:
        problem = f"{model.name} has {model.positions:,} positions, and an example has {data.longest:,} tokens"
        fix = f"set model.max_length={model.positions} or less, or leave it out"
        raise ConfigError(
            64, problem, where=f"model.max_length: {asked}", why="a position that was never learned is not there", fix=fix
        )


def _refuse_full(config: Any, model: Any) -> None:
    if config.model.quantization is not None:
        fix = "set method=lora, or leave model.quantization out"
        raise ConfigError(30, "a quantized model cannot be trained in full", where="model.quantization", fix=fix)
    frozen = config.training.freeze_layers
    if frozen > model.layers:
        where = f"training.freeze_layers: {frozen}"
        raise ConfigError(63, f"{model.name} has only {model.layers} blocks", where=where, fix="freeze fewer")


def _refuse_adapter(lora: Any, quantization: str | None) -> None:
    if lora.variant == "dora" and lora.init == "pissa":
        raise ConfigError(61, "dora and pissa do not go together", where="lora.init", fix="set lora.init=default")
    if quantization is not None and lora.bias != "none":
        raise ConfigError(61, "the biases of a quantized model cannot be trained", where="lora.bias", fix="set lora.bias=none")


def optimizers_on(device: str) -> tuple[str, ...]:
    """The kinds that run on cpu, cuda, xpu or mps: paged memory is the GPU's, and MPS has no 8-bit kernels."""
    return {"cpu": OPTIMIZERS[:2], "mps": OPTIMIZERS[:1]}.get(device, OPTIMIZERS)


def refuse_optimizer(kind: str | None, device: str) -> None:
    """Raise MachineError for an optimizer that was asked for and does not run on a device."""
    if kind is not None and kind not in optimizers_on(device):
        fix = f"choose one of {', '.join(optimizers_on(device))}, or leave it out; to plan for another machine: --on T4"
        raise MachineError(60, f"the optimizer {kind} does not run on {device}", where="training.optimizer", fix=fix)


def refuse_rank(config: Any, model: Any, r: int, targets: list[str]) -> None:
    """Raise ConfigError where PiSSA would start from more directions than a layer has."""
    inputs, outputs = min(((i, o) for name, i, o in model.linear_shapes if name in targets), key=min, default=(r, r))
    if config.lora.init == "pissa" and r > min(inputs, outputs):
        problem = f"{r} is more than a layer of {inputs} inputs and {outputs} outputs has directions"
        fix = f"set lora.r={min(inputs, outputs)} or less, or lora.init=default"
        raise ConfigError(60, problem, where="lora.r", fix=fix)


def without_liger(training: Any, quantization: str | None, device: str) -> str | None:
    """Why `training.liger` changes nothing on a device (cpu, cuda or mps), or None where it does."""
    if device not in LIGER:
        return f"its kernels are for NVIDIA's GPUs, not for {device}"
    if training.compile and quantization is None:
        return "training.compile has torch write kernels for the same"
    return None


def unused(config: Any, model: Any, quantization: str | None, device: str) -> list[str]:
    """Settings that were given and that this run does not read, or not as far; `quantization` is the one decided for."""
    found = []
    training, asked = config.training, config.model.max_length
    if config.method == "full":
        names = [f"lora.{name}" for name in config.lora.model_dump(exclude_defaults=True)]
        if names:
            found.append(f"{', '.join(names)} will not be used: with method=full there is no adapter")
    elif config.lora.bias != "none" and not model.bias_parameters:
        found.append(f"lora.bias will not be used: {model.name} has no biases")
    if config.method == "lora" and training.freeze_layers:
        found.append("training.freeze_layers will not be used: beside an adapter all blocks stay as they are")
    if not config.model.double_quantization and quantization not in ("nf4", "fp4"):
        found.append("model.double_quantization will not be used: no weights are kept in 4 bits")
    if training.compile and quantization is not None:
        found.append("training.compile will not be used: packed weights are unpacked by kernels that torch cannot compile")
    if training.liger and (why := without_liger(training, quantization, device)):
        found.append(f"training.liger will not be used: {why}")
    if training.checkpoint_every is not None and training.gradient_checkpointing is False:
        found.append("training.checkpoint_every will not be used: training.gradient_checkpointing is off")
    if asked is not None and asked > model.positions:
        found.append(
            f"model.max_length={asked:,} is more than the {model.positions:,} tokens that {model.name} was made for: "
            "what stands beyond them is hardly understood"
        )
    return found
