"""A run from its config to its final folder, on one page: run() starts one, resume() goes on with one."""

from __future__ import annotations

import json
import logging
import platform
import random
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llm_finetune_kit.config import RunConfig
from llm_finetune_kit.data import prepare
from llm_finetune_kit.errors import ConfigError, DataError, Interrupted, KitError, ModelError, TrainingError, UsageError
from llm_finetune_kit.events import (
    Event,
    Failed,
    Finished,
    Listen,
    Planned,
    Resumed,
    Sampled,
    Saved,
    Stage,
    Stepped,
    Warned,
    ignore,
)
from llm_finetune_kit.folder import MANIFEST, RunFolder, commit, read_json, write_json, write_whole
from llm_finetune_kit.models.locate import check_name, locate
from llm_finetune_kit.plain_yaml import dump_yaml
from llm_finetune_kit.plan import DataFacts, Plan, make_plan
from llm_finetune_kit.settings import changed

RESOLVED = "resolved.json"
ROWS = {"train_file": "train_rows.jsonl", "eval_file": "eval_rows.jsonl"}
MOST_SAMPLES = 3


@dataclass(frozen=True)
class Result:
    """A finished run: its folder, and the tuned model in memory with its tokenizer."""

    folder: RunFolder
    model: Any
    chat: Any
    objective: Any


@dataclass(frozen=True)
class Material:
    """What a run works with: data as tokens, the tokenizer, where the model is, and all that was learned about them."""

    chat: Any
    located: Any
    train: Any
    held_out: Any
    report: dict[str, Any]
    plan: Plan
    warnings: list[str]


def run(config: RunConfig, listen: Listen = ignore, *, loaded: Any = None) -> Result:
    """Train as the config asks; `listen` hears every event. `loaded` is the base model if it is in memory already.

    Raises KitError for what the user can fix. Nothing is written before the data and the plan are sound.
    """
    told: list[Event] = []

    def note(event: Event) -> None:
        told.append(event)
        listen(event)

    material = prepare_run(config, note)
    folder = RunFolder.create(Path(config.output.output_dir), str(material.plan.config.output.run_name))
    with folder.locked():
        for event in told:
            folder.record(event)
        _write_start(folder, config, material)
        return _train(folder, material, listen, loaded)


def resume(folder: RunFolder, listen: Listen = ignore, *, max_steps: int | None = None) -> Result:
    """Go on with a run from its newest sound checkpoint, to the same end as if it had never stopped.

    Raises UsageError for a run that is finished and DataError if the data changed.
    """
    try:
        resolved = read_json(folder.path / RESOLVED)
    except FileNotFoundError:
        raise UsageError(6, "the run stopped before training began", where=str(folder.path), fix="start it again") from None
    config = RunConfig.model_validate(resolved["config"]).with_values(_stored_rows(folder))
    if folder.finished and (max_steps is None or max_steps <= folder.step):
        fix = f"to train longer: finetune resume RUN --max-steps N, with N above {folder.step}"
        raise UsageError(4, "the run is finished", where=str(folder.path), fix=fix)
    if max_steps is not None:
        config = changed(config, {"training.max_steps": max_steps})
    with folder.locked():
        material = prepare_run(config, listen)
        for name, was in resolved["data_fingerprints"].items():
            now = material.report[name]["fingerprint"]
            if was != now:
                raise DataError(
                    50,
                    "has changed since the run began",
                    where=str(material.report[name]["name"]),
                    why=f"its SHA-256 was {was[:12]}… and is {now[:12]}…",
                    fix="put the old file back, or start a new run",
                )
        if max_steps is not None:  # where it is to end now, for a resume after this one
            resolved["config"]["training"]["max_steps"] = max_steps
            write_json(folder.path / RESOLVED, resolved)
        return _train(folder, material, listen)


def _keep_rows(folder: RunFolder, config: RunConfig) -> dict[str, Any]:
    """Rows that were given as a Python list go into a file of the run; the config then names none."""
    emptied: dict[str, Any] = {}
    for knob, name in ROWS.items():
        rows = getattr(config.data, knob)
        if isinstance(rows, list):
            write_whole(folder.path / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            emptied[f"data.{knob}"] = None
    return emptied


def _stored_rows(folder: RunFolder) -> dict[str, Any]:
    return {
        f"data.{knob}": [json.loads(line) for line in (folder.path / name).read_text(encoding="utf-8").split("\n") if line]
        for knob, name in ROWS.items()
        if (folder.path / name).is_file()
    }


def prepare_run(config: RunConfig, listen: Listen = ignore) -> Material:
    """All that happens before the weights are loaded: data, tokenizer, masks, gate, facts and plan.

    Cheap failures first: names and files are checked before torch is imported.
    """
    if config.model.name is None:
        raise ConfigError(
            5, "no model is named", where="model.name", fix="for example --model demo, --model gpt2 or a local folder"
        )
    if config.data.train_file is None:
        raise ConfigError(
            5, "no training data is named", where="data.train_file", fix="for example --data sample:chat or --data train.jsonl"
        )
    check_name(config.model.name)
    listen(Stage("data", _data_name(config.data.train_file)))
    read = {"train": prepare.read(config.data.train_file, config.data)}
    if config.data.eval_file is not None:
        read["held_out"] = prepare.read(config.data.eval_file, config.data)

    located = locate(config.model.name, revision=config.model.revision, cache_dir=config.model.cache_dir)
    from llm_finetune_kit.models.tokenizer import load_tokenizer

    chat = load_tokenizer(located.folder)
    encoded = {name: prepare.tokenize(data, config.data, chat, chat.fingerprint()) for name, data in read.items()}
    seed = config.training.seed
    train, held_out, origin = prepare.split(encoded["train"].tokens, config.data, seed, apart="held_out" in encoded)
    if "held_out" in encoded:
        held_out, origin = encoded["held_out"].tokens, str(config.data.eval_file)

    longest = int(max(tokens.lengths.max() for tokens in (train, held_out) if tokens is not None))
    length = config.model.max_length or longest
    train, held_out, masks, warnings = _gated(config, chat, train, held_out, length)

    listen(Stage("plan", str(config.model.name)))
    plan, machine = _decided(config, located, train, held_out, longest)
    if int(plan.config.model.max_length or length) < length:  # the model's own limit
        train, held_out, masks, warnings = _gated(config, chat, train, held_out, int(plan.config.model.max_length or length))
    report = {name: data.report for name, data in encoded.items()}
    report["masks"] = {
        "examples": masks.examples,
        "tokens": masks.tokens,
        "target_tokens": masks.target_tokens,
        "held_out_examples": len(held_out) if held_out is not None else 0,
        "held_out_from": origin,
        "longest": longest,
        "template": chat.source,
    }
    warnings = [*(warning for data in encoded.values() for warning in data.report["warnings"]), *warnings, *plan.warnings]
    listen(Planned(plan.to_dict() | {"machine": machine}))
    for warning in warnings:
        listen(Warned(warning))
    return Material(chat, located, train, held_out, report, plan, warnings)


def _gated(config: RunConfig, chat: Any, train: Any, held_out: Any, length: int) -> tuple[Any, Any, Any, list[str]]:
    """Both sets cut to `length` and let through the gate, facts about the training masks, and warnings."""
    train, masks, warnings = prepare.gate(train, chat, config.data, _data_name(config.data.train_file), length)
    if held_out is not None:
        held_out, _, more = prepare.gate(held_out, chat, config.data, "held-out rows", length)
        warnings += [f"held out: {warning}" for warning in more]
    return train, held_out, masks, warnings


def _decided(config: RunConfig, located: Any, train: Any, held_out: Any, longest: int) -> tuple[Plan, str]:
    """The plan for this machine, and the machine's name. The first that needs torch."""
    from llm_finetune_kit.hardware import this_machine
    from llm_finetune_kit.models.facts import model_facts

    facts = DataFacts(
        examples=len(train),
        held_out=len(held_out) if held_out is not None else 0,
        tokens=len(train.ids),
        target_tokens=int(train.targets.sum()),
        longest=longest,
    )
    machine = this_machine(Path(config.output.output_dir))
    return make_plan(config, machine, model_facts(located.folder, str(config.model.name)), facts), machine.name


def _data_name(data: Any) -> str:
    return data if isinstance(data, str) else f"{len(data)} rows"


def _write_start(folder: RunFolder, config: RunConfig, material: Material) -> None:
    """What was asked, what was decided and what the data is like."""
    emptied = _keep_rows(folder, config)
    config, decided = config.with_values(emptied), material.plan.config.with_values(emptied)
    write_whole(folder.path / "config.yaml", dump_yaml(config.asked()))
    write_json(folder.path / "plan.json", material.plan.to_dict() | {"config": decided.model_dump(mode="json")})
    write_json(folder.path / "data_report.json", material.report)
    write_json(
        folder.path / RESOLVED,
        {
            "config": decided.model_dump(mode="json"),
            "choices": [vars(choice) for choice in material.plan.choices],
            "data_fingerprints": {name: part["fingerprint"] for name, part in material.report.items() if "fingerprint" in part},
            "base_model": material.located.name,
            "versions": versions(),
            "machine": {"system": platform.platform(), "device": material.plan.device},
        },
    )


def versions() -> dict[str, str]:
    """Python and the packages that decide results."""
    found = {"python": platform.python_version()}
    for package in ("llm-finetune-kit", "torch", "transformers", "peft", "tokenizers", "safetensors", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _train(folder: RunFolder, material: Material, listen: Listen, loaded: Any = None) -> Result:
    def say(event: Event) -> None:
        folder.record(event)
        listen(event)

    listen(Stage("run", str(folder.path)))  # told, not stored: nothing in a run folder says where the folder is
    with _debug_log(folder) as log:
        try:
            return _train_to_the_end(folder, material, say, loaded)
        except KitError as error:
            log.warning("stopped by %s", error.code, exc_info=True)
            resume_command = f"finetune resume {folder.path.name}" if folder.checkpoints() else ""
            say(Failed(error.code, error.problem, error.fix, resume_command))
            raise
        except Exception:
            log.exception("the run failed")
            say(Failed("BUG-001", "the run failed by a fault of this program", "see debug.log in the run folder"))
            raise
        finally:
            _write_evidence(folder, log)


class _Portable(logging.Formatter):
    """Log lines without the places of this machine: a run folder may be handed on."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        for place in (Path(sys.prefix), Path(__file__).parents[1], Path.cwd(), Path.home()):
            text = text.replace(f"{place}/", "")
        return text


@contextmanager
def _debug_log(folder: RunFolder) -> Iterator[logging.Logger]:
    """Warnings of all libraries and tracebacks go to debug.log while a run works."""
    handler = logging.FileHandler(folder.path / "debug.log", encoding="utf-8")
    handler.setFormatter(_Portable("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    log = logging.getLogger("llm_finetune_kit")
    loggers = [log, logging.getLogger("transformers"), logging.getLogger("py.warnings")]
    logging.captureWarnings(True)
    for one in loggers:
        one.addHandler(handler)
    handler.handle(log.makeRecord(log.name, logging.INFO, __file__, 0, "started: %s", (versions(),), None))
    try:
        yield log
    finally:
        for one in loggers:
            one.removeHandler(handler)
        logging.captureWarnings(False)
        handler.close()


def _train_to_the_end(folder: RunFolder, material: Material, say: Listen, loaded: Any) -> Result:
    from llm_finetune_kit.training import checkpoint
    from llm_finetune_kit.training.loop import evaluate, fit

    say(Stage("model", material.located.name))
    objective, optimizer, schedule = _assemble(material, loaded)
    if not objective.packs:
        say(Warned("this model would mix packed examples, so each is computed alone, which is slower"))
    good, passed = checkpoint.newest_good(folder.checkpoints())
    for reason in passed:
        say(Warned(f"checkpoint passed over: {reason}"))
    if good is None and passed:
        raise ModelError(23, "no sound checkpoint is left", where=str(folder.path), fix="start a new run with its config.yaml")
    prompts = _prompts(material)
    if good is None:
        if any(hasattr(event, "step") for event in folder.replay()):
            say(Resumed(0, ""))
        progress = checkpoint.Progress()
        if material.held_out is not None:
            evaluate(objective, material.held_out, schedule, progress, say)
            progress.best_step = progress.best_loss = None  # training has to produce something
            progress.stale_evaluations = 0
        _sample(objective, material, prompts, 0, say)
    else:
        progress = checkpoint.restore(objective.model, optimizer, good)
        if folder.finished:  # and is to be longer
            progress.stale_evaluations = 0
        say(Resumed(progress.step, good.name))

    def save(now: checkpoint.Progress) -> None:
        _save_checkpoint(folder, material, objective.model, optimizer, now, say)

    say(Stage("train", f"{schedule.steps} steps"))
    with _signals() as caught:
        reason = fit(objective, optimizer, material.train, material.held_out, schedule, progress, save, say, lambda: bool(caught))
    if reason == "asked to stop":
        command = f"finetune resume {folder.path}"
        raise Interrupted(
            caught[0], f"stopped after step {progress.step} of {schedule.steps}, and saved", fix=f"go on with: {command}"
        )
    step = progress.step
    if progress.best_step is not None and progress.best_step != step:
        best, damage = checkpoint.newest_good([folder.path / f"checkpoint-{progress.best_step}"])
        if best is None:
            say(Warned(f"the weights of the last step are kept, as the best ones cannot be used: {damage[0]}"))
        else:
            checkpoint.restore_weights(objective.model, best)
            say(Stage("best", f"the weights of step {progress.best_step} had the lowest held-out loss"))
            step = progress.best_step
    _sample(objective, material, prompts, step, say)
    _save_final(folder, material, objective.model, step, say)
    summary = _summary(folder, progress, step)
    write_json(folder.path / "plan.json", read_json(folder.path / "plan.json") | {"measured_peak_memory": summary["peak_memory"]})
    say(Finished(progress.step, reason, summary))
    return Result(folder, objective.model, material.chat, objective)


def _assemble(material: Material, loaded: Any) -> tuple[Any, Any, Any]:
    """The objective, the optimizer and the schedule that a plan describes."""
    import torch

    from llm_finetune_kit.models.loading import DTYPES, add_lora, load_base, train_all
    from llm_finetune_kit.training.loop import Schedule
    from llm_finetune_kit.training.optimizer import learning_rates, make_optimizer
    from llm_finetune_kit.training.step import Objective

    plan, config, training = material.plan, material.plan.config, material.plan.config.training
    torch.manual_seed(training.seed)
    random.seed(training.seed)
    dtype = str(config.model.dtype)
    base = (
        loaded
        if loaded is not None
        else load_base(material.located, dtype if config.method == "lora" else "float32", plan.device)
    )
    if config.method == "lora":
        lora = config.lora
        targets = list(lora.target_modules or [])
        model = add_lora(
            base,
            r=int(lora.r or 16),
            alpha=int(lora.alpha or 32),
            dropout=lora.dropout,
            targets=targets,
            base_name=material.located.loadable,
            seed=training.seed,
        )
    else:
        model = train_all(base)
    if training.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = make_optimizer(model.parameters(), training.weight_decay)
    rates = learning_rates(training.schedule, plan.steps, float(training.learning_rate or 0), plan.warmup_steps)
    schedule = Schedule(
        rates=rates,
        examples_per_step=plan.examples_per_step,
        tokens_per_pass=int(training.tokens_per_pass or 2048),
        packing=training.packing,
        max_grad_norm=training.max_grad_norm,
        eval_steps=int(training.eval_steps or plan.steps),
        save_steps=int(training.save_steps or plan.steps),
        patience=training.early_stopping_patience if material.held_out is not None else None,
        seed=training.seed,
    )
    return Objective(model, DTYPES[dtype]), optimizer, schedule


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying from them; a second one acts as usual."""
    caught: list[int] = []

    def catch(number: int, frame: Any) -> None:
        caught.append(number)
        signal.signal(number, before[signal.Signals(number)])

    try:
        before = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: whoever started it decides
        yield caught
        return
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _prompts(material: Material) -> list[tuple[list[int], str, str]]:
    """Prompts to answer before and after training: ids, text and reference answer (may be empty)."""
    import numpy as np

    chat, asked = material.chat, material.plan.config.evaluation.prompts
    if asked:
        return [(chat.prompt_ids([{"role": "user", "content": text}]), text, "") for text in asked]
    tokens = material.held_out if material.held_out is not None else material.train
    found = []
    for index in range(min(MOST_SAMPLES, len(tokens))):
        ids, trained = tokens.example(index)
        first = int(np.flatnonzero(trained)[0])
        if first == 0:  # raw text: begin with its first words
            first = min(16, len(ids) // 2)
        found.append((ids[:first].tolist(), chat.decode(ids[:first].tolist()).strip(), chat.decode(ids[first:].tolist()).strip()))
    return found


def _sample(objective: Any, material: Material, prompts: list[tuple[list[int], str, str]], step: int, say: Listen) -> None:
    from llm_finetune_kit.generation import answer

    how = material.plan.config.evaluation.generation
    for ids, text, reference in prompts:
        with objective.precision():
            words = answer(objective.model, material.chat, ids, how)
        say(Sampled(step, text, words, reference))


def _save_checkpoint(folder: RunFolder, material: Material, model: Any, optimizer: Any, progress: Any, say: Listen) -> None:
    from llm_finetune_kit.training import checkpoint

    started = time.perf_counter()
    target = folder.path / f"checkpoint-{progress.step}"

    def write(draft: Path) -> None:
        checkpoint.save(model, optimizer, progress, draft)
        material.chat.save(draft)

    size = commit(target, write, _facts(material, progress.step))
    say(Saved(progress.step, target.name, size, time.perf_counter() - started))
    _rotate(folder, material.plan.config.training.save_total_limit, progress.step, progress.best_step)


def _facts(material: Material, step: int) -> dict[str, Any]:
    fingerprints = {name: part["fingerprint"] for name, part in material.report.items() if "fingerprint" in part}
    return {"step": step, "base_model": material.located.name, "data_fingerprints": fingerprints, "versions": versions()}


def _rotate(folder: RunFolder, keep: int, step: int, best_step: int | None) -> None:
    """Remove the oldest checkpoints beyond `keep`, never that of `step` and never the best.

    Checkpoints of later steps were passed over when the run went on: they are damaged and go first.
    """
    import shutil

    folders = folder.checkpoints()
    this = folders.index(folder.path / f"checkpoint-{step}")
    spare = [path for path in folders[this + 1 :] if path.name != f"checkpoint-{best_step}"]
    for path in folders[:this] + spare[::-1][: max(0, len(folders) - this - keep)]:
        (path / MANIFEST).unlink(missing_ok=True)  # a half removed folder must not look whole
        shutil.rmtree(path, ignore_errors=True)


def _save_final(folder: RunFolder, material: Material, model: Any, step: int, say: Listen) -> None:
    """`final/`: what other tools load. A fully trained model goes back to the dtype its base was stored in."""
    from llm_finetune_kit.models.facts import read_config
    from llm_finetune_kit.models.loading import DTYPES
    from llm_finetune_kit.report.card import model_card
    from llm_finetune_kit.training import checkpoint

    started = time.perf_counter()
    stored = str(getattr(read_config(material.located.folder), "dtype", None) or "float32").removeprefix("torch.")

    def write(draft: Path) -> None:
        checkpoint.save_weights(model, draft, DTYPES.get(stored))
        material.chat.save(draft)
        write_whole(draft / "README.md", model_card(material.plan.config, material.located.name, folder.replay(), step))

    size = commit(folder.final, write, _facts(material, step))
    say(Saved(step, folder.final.name, size, time.perf_counter() - started))


def _summary(folder: RunFolder, progress: Any, step: int) -> dict[str, Any]:
    from llm_finetune_kit.hardware import peak_memory
    from llm_finetune_kit.report.figures import before_and_after

    losses = [event.loss for event in folder.replay() if isinstance(event, Stepped)]
    if not losses:
        raise TrainingError(2, "the run trained nothing", where=str(folder.path), fix="check training.max_steps and the data")
    return {
        "final_step": step,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "tokens": progress.tokens,
        "seconds": progress.seconds,
        "tokens_per_second": progress.tokens / max(progress.seconds, 1e-9),
        "peak_memory": peak_memory(),
        **before_and_after(folder.replay(), step),
    }


def _write_evidence(folder: RunFolder, log: logging.Logger) -> None:
    """The report of whatever there is; that it cannot be written must not cost the run."""
    from llm_finetune_kit.report.write import write_report

    try:
        write_report(folder.path)
    except Exception:
        log.exception("the report could not be written")
