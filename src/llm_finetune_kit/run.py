"""A run from its config to its final folder, on one page: run() starts one, resume() goes on with one."""

from __future__ import annotations

import json
import logging
import platform
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_finetune_kit.config import RunConfig
from llm_finetune_kit.data.cache import file_fingerprint
from llm_finetune_kit.doctor import places, software
from llm_finetune_kit.errors import DataError, Interrupted, KitError, ModelError, TrainingError, UsageError
from llm_finetune_kit.events import (
    Event,
    Failed,
    Finished,
    Listen,
    Resumed,
    Sampled,
    Stage,
    Stepped,
    Warned,
    ignore,
)
from llm_finetune_kit.folder import RunFolder, read_json, write_json, write_whole
from llm_finetune_kit.hardware import versions
from llm_finetune_kit.logs import debug_log
from llm_finetune_kit.material import Material, prepare_run
from llm_finetune_kit.plain_yaml import dump_yaml
from llm_finetune_kit.plan import compare
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
    comparison: dict[str, Any] | None = None  # see evaluation.comparison; None where there was none


def run(config: RunConfig, listen: Listen = ignore, *, loaded: Any = None, force: bool = False) -> Result:
    """Train as the config asks; `listen` hears every event. `loaded` is the base model if it is in memory already.

    With `force` a run starts that the plan says cannot fit into memory. Raises KitError for what the user can fix.
    Nothing is written before the data and the plan are sound.
    """
    told: list[Event] = []

    def note(event: Event) -> None:
        told.append(event)
        listen(event)

    software.check_versions()
    places.check_file_system(Path(config.output.output_dir))
    material = prepare_run(config, note, force=force)
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
        for name, was in resolved["data_files"].items():
            _must_be(was, file_fingerprint(Path(name)) if Path(name).is_file() else None, name)
        material = prepare_run(config, listen, force=True)  # it started once, and was told then
        for name, was in resolved["data_fingerprints"].items():
            _must_be(was, material.report[name]["fingerprint"], str(material.report[name]["name"]))
        if max_steps is not None:  # where it is to end now, for a resume after this one
            resolved["config"]["training"]["max_steps"] = max_steps
            write_json(folder.path / RESOLVED, resolved)
        return _train(folder, material, listen)


def material_of(folder: RunFolder) -> Material:
    """What a run worked with, prepared again: its held-out rows, tokenizer and plan. Raises UsageError where it never began."""
    try:
        decided = read_json(folder.path / RESOLVED)["config"]
    except FileNotFoundError:
        raise UsageError(6, "the run stopped before training began", where=str(folder.path), fix="start it again") from None
    return prepare_run(RunConfig.model_validate(decided).with_values(_stored_rows(folder)), force=True)


def _must_be(was: str, now: str | None, name: str) -> None:
    """Raises DataError if a data set is not what it was when the run began."""
    if now is None:
        raise DataError(50, "is no longer there", where=name, fix="put the file back, or start a new run")
    if was != now:
        why = f"its SHA-256 was {was[:12]}… and is {now[:12]}…"
        raise DataError(
            50, "has changed since the run began", where=name, why=why, fix="put the old file back, or start a new run"
        )


def _data_files(report: dict[str, Any]) -> dict[str, str]:
    """Every single file that the run reads, with the SHA-256 of its bytes."""
    parts = [part for whole in report.values() for part in (whole, *whole.get("parts", ()))]
    return {part["name"]: part["fingerprint"] for part in parts if "name" in part and Path(part["name"]).is_file()}


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
            "data_files": _data_files(material.report),
            "base_model": material.located.name,
            "versions": versions(),
            "machine": {"system": platform.platform(), "device": material.plan.device},
        },
    )


def _train(folder: RunFolder, material: Material, listen: Listen, loaded: Any = None) -> Result:
    def say(event: Event) -> None:
        folder.record(event)
        listen(event)

    listen(Stage("run", str(folder.path)))  # told, not stored: nothing in a run folder says where the folder is
    with debug_log(folder.path, str(versions())) as log:
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


def _train_to_the_end(folder: RunFolder, material: Material, say: Listen, loaded: Any) -> Result:
    from llm_finetune_kit.evaluation.end_of_run import compare_run
    from llm_finetune_kit.training import checkpoint
    from llm_finetune_kit.training.assembly import assemble
    from llm_finetune_kit.training.loop import evaluate, fit
    from llm_finetune_kit.training.saving import save_checkpoint, save_final
    from llm_finetune_kit.training.scaling import LossScale

    say(Stage("model", material.located.name))
    objective, optimizer, schedule = assemble(material, loaded)
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
        progress = checkpoint.Progress(loss_scale=LossScale() if schedule.scaled else None)
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
        save_checkpoint(folder, material, objective.model, optimizer, now, say)

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
    save_final(folder, material, objective.model, step, say)
    comparison = compare_run(objective, material, step, progress.seconds, say)
    summary = _summary(folder, progress, step)
    predicted = read_json(folder.path / "plan.json")
    summary["measured"] = compare(predicted, summary["peak_memory"], summary["tokens_per_second"])
    write_json(folder.path / "plan.json", predicted | {"measured": summary["measured"]})
    say(Finished(progress.step, reason, summary))
    return Result(folder, objective.model, material.chat, objective, comparison)


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
    tokens = material.shown
    found = []
    for index in range(min(MOST_SAMPLES, len(tokens))):
        ids, trained = tokens.example(index)
        first = int(np.flatnonzero(trained)[0])
        if first == 0:  # raw text: begin with its first words
            first = min(16, len(ids) // 2)
        last = first + int(np.argmin(np.append(trained[first:], False)))  # the end of the first answer
        asked, reference = ids[:first].tolist(), ids[first:last].tolist()
        found.append((asked, chat.decode(asked).strip(), chat.decode(reference).strip()))
    return found


def _sample(objective: Any, material: Material, prompts: list[tuple[list[int], str, str]], step: int, say: Listen) -> None:
    from llm_finetune_kit.generation import answers

    how = material.plan.config.evaluation.generation
    say(Stage("answer", f"{len(prompts)} sample prompts"))
    with objective.precision():
        said = answers(objective.model, material.chat, [ids for ids, _, _ in prompts], how)
    for (_, text, reference), one in zip(prompts, said, strict=True):
        say(Sampled(step, text, one.text, reference))


def _summary(folder: RunFolder, progress: Any, step: int) -> dict[str, Any]:
    from llm_finetune_kit.hardware import peak_memory
    from llm_finetune_kit.report.figures import before_and_after

    told = folder.replay()
    losses = [event.loss for event in told if isinstance(event, Stepped)]
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
        **before_and_after(told, step),
    }


def _write_evidence(folder: RunFolder, log: logging.Logger) -> None:
    """The report of whatever there is; that it cannot be written must not cost the run."""
    from llm_finetune_kit.report.write import write_report

    try:
        write_report(folder.path)
    except Exception:
        log.exception("the report could not be written")
