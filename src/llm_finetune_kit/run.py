"""A run from its config to its final folder, on one page: run() starts one, resume() goes on with one."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_finetune_kit import beginning
from llm_finetune_kit.config import RunConfig
from llm_finetune_kit.doctor import places, software
from llm_finetune_kit.errors import Interrupted, KitError, MachineError, ModelError, TrainingError
from llm_finetune_kit.events import (
    Event,
    Failed,
    Finished,
    Listen,
    Resumed,
    Saved,
    Stage,
    Stepped,
    Warned,
    ignore,
)
from llm_finetune_kit.files import damage, read_json, write_json
from llm_finetune_kit.folder import RunFolder
from llm_finetune_kit.hardware import versions
from llm_finetune_kit.interrupts import Interrupts, StopAsked, interruptible
from llm_finetune_kit.logs import debug_log
from llm_finetune_kit.material import Material, prepare_run
from llm_finetune_kit.plan import compare
from llm_finetune_kit.report.live import LiveReport
from llm_finetune_kit.tracking import require_trackers, tracked

LIGER = "set training.liger=false, or look whether it is there: pip install 'llm-finetune-kit[gpu]'"
COMPILER = "install a C++ compiler and, for a GPU, triton; or set training.compile=false"
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM}


@dataclass(frozen=True)
class Result:
    """A finished run: its folder, and the tuned model in memory with its tokenizer."""

    folder: RunFolder
    model: Any
    chat: Any
    objective: Any
    comparison: dict[str, Any] | None = None  # see evaluation.comparison; None where there was none


def never() -> bool:
    """A run's own end is the only one."""
    return False


def run(
    config: RunConfig, listen: Listen = ignore, *, loaded: Any = None, force: bool = False, enough: Callable[[], bool] = never
) -> Result:
    """Train as the config asks; `listen` hears every event. `loaded` is the base model if it is in memory already.

    With `force` a run starts that the plan says cannot fit. When `enough` becomes true, the run ends after that step or
    evaluation as if it had been its last one, with the reason `asked to stop`. Raises KitError for what the user can fix,
    and Interrupted after a signal. Nothing is written before the data and the plan are sound.

    >>> values = {"model.name": "demo", "data.train_file": "sample:chat", "training.max_steps": 1, "evaluation.compare": False}
    >>> run(RunConfig().with_values(values)).folder.path.name
    'demo-chat'
    """
    told: list[Event] = []

    def note(event: Event) -> None:
        told.append(event)
        listen(event)

    software.check_versions()
    require_trackers(config)
    places.check_file_system(Path(config.output.output_dir))
    with _signals("nothing was written yet", "start it again") as heard:
        material = prepare_run(config, note, force=force)
        folder = RunFolder.create(Path(config.output.output_dir), str(material.plan.config.output.run_name))
        with folder.locked():
            for event in told:
                folder.record(event)
            with _disk(folder):
                beginning.write_beginning(folder, config, material)
            return _train(folder, material, listen, heard, loaded, enough)


def resume(
    folder: RunFolder,
    listen: Listen = ignore,
    *,
    max_steps: int | None = None,
    changes: Sequence[str] = (),
    allow_change: bool = False,
    enough: Callable[[], bool] = never,
) -> Result:
    """Go on with a run from its newest sound checkpoint, to the same end as if it had never stopped.

    `changes` (`section.key=value`) may say how it is computed and kept, and with `allow_change` how it learns from here
    on; `enough` is that of `run`. Raises UsageError for a run that is finished, ConfigError for changes that would make
    another run of it, and DataError or ModelError where data or model are no longer what they were.

    >>> values = {"model.name": "demo", "data.train_file": "sample:chat", "training.max_steps": 1, "evaluation.compare": False}
    >>> result = resume(run(RunConfig().with_values(values)).folder, max_steps=2)
    >>> result.folder.checkpoints()[0].name
    'checkpoint-2'
    """
    config = beginning.config_to_go_on(folder, max_steps, changes, allow_change, listen)
    with _signals("the run is as it was", f"go on with: finetune resume {folder.path}") as heard, folder.locked():
        beginning.check_files(folder)
        material = prepare_run(config, listen, force=True)  # it started once, and was told then
        beginning.check_material(folder, material, listen)
        if max_steps is not None or changes:
            beginning.remember(folder, config)
        return _train(folder, material, listen, heard, None, enough)


@contextmanager
def _signals(state: str, fix: str) -> Iterator[Interrupts]:
    """Signals are heard, and raise Interrupted where nothing better is known about the run."""
    with interruptible() as heard:
        try:
            yield heard
        except StopAsked as stop:
            raise Interrupted(stop.number, f"stopped; {state}", fix=fix) from None


def _train(
    folder: RunFolder, material: Material, listen: Listen, heard: Interrupts, loaded: Any, enough: Callable[[], bool]
) -> Result:
    tell = _Told(folder, listen)
    listen(Stage("run", str(folder.path)))  # told, not stored: nothing in a run folder says where the folder is
    with debug_log(folder.path, str(versions())) as log, tracked(folder.path, material.plan.config, tell) as told:
        say = LiveReport(folder.path, told)
        try:
            try:
                with _disk(folder):
                    return _train_to_the_end(folder, material, say, heard, loaded, enough)
            except StopAsked as stop:
                whole = folder.checkpoints()
                state = f"stopped at once; {whole[0].name} was saved last" if whole else "stopped before the first step"
                raise Interrupted(stop.number, state, fix=f"go on with: finetune resume {folder.path}") from None
        except KitError as error:
            log.warning("stopped by %s", error.code, exc_info=True)
            can_go_on = folder.checkpoints() and not isinstance(error, ModelError)  # that is: none of them is sound
            resume_command = f"finetune resume {folder.path.name}" if can_go_on else ""
            say(Failed(error.code, error.problem, error.fix, resume_command))
            raise
        except Exception:
            log.exception("the run failed")
            say(Failed("BUG-001", "the run failed by a fault of this program", "see debug.log in the run folder"))
            raise
        finally:
            with heard.at_boundaries():  # a first signal does not spoil the report
                _write_evidence(folder, log)


@contextmanager
def _disk(folder: RunFolder) -> Iterator[None]:
    """A disk that fails, wherever it is touched, is no fault of this program."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK:
            raise
        problem, where = f"cannot be read or written: {error.strerror}", str(error.filename or folder.path)
        fix = f"mend the disk or free some space, then: finetune resume {folder.path} (or start again, if nothing was saved)"
        raise MachineError(16, problem, where=where, fix=fix) from error


class _Told:
    """Puts events into the run's log and hands them to the listener; that the log fails is told once and costs no run."""

    def __init__(self, folder: RunFolder, listen: Listen) -> None:
        self.folder = folder
        self.listen = listen
        self.log_fails = False

    def __call__(self, event: Event) -> None:
        trouble = self.folder.record(event)
        self.listen(event)
        if trouble and not self.log_fails:
            self.log_fails = True
            self.listen(Warned(f"events.jsonl cannot be written: {trouble}; the run goes on without it", "free some disk space"))


def _train_to_the_end(
    folder: RunFolder, material: Material, say: Listen, heard: Interrupts, loaded: Any, enough: Callable[[], bool]
) -> Result:
    from llm_finetune_kit.evaluation.end_of_run import compare_run
    from llm_finetune_kit.generation.samples import answer_during, answer_samples, sample_prompts
    from llm_finetune_kit.training import checkpoint
    from llm_finetune_kit.training.assembly import assemble
    from llm_finetune_kit.training.loop import evaluate, fit
    from llm_finetune_kit.training.profile import profiled
    from llm_finetune_kit.training.saving import Saver
    from llm_finetune_kit.training.scaling import LossScale

    say(Stage("model", material.located.name))
    objective, optimizer, schedule = assemble(material, loaded)
    if not objective.packs:
        say(Warned("this model would mix packed examples, so each is computed alone, which is slower"))
    if objective.not_compiled:
        say(Warned(f"the blocks could not be compiled, so they run as they are: {objective.not_compiled}", COMPILER))
    if objective.not_fused:
        say(Warned(f"Liger's kernels are not used: {objective.not_fused}", LIGER))
    good = _newest_sound(folder, say)
    prompts = sample_prompts(material)
    if good is None:
        if any(hasattr(event, "step") for event in folder.replay()):
            say(Resumed(0, ""))
        progress = checkpoint.Progress(loss_scale=LossScale() if schedule.scaled else None)
        if material.held_out is not None:
            evaluate(objective, material.held_out, schedule, progress, say)
            progress.best_step = progress.best_loss = None  # training has to produce something
            progress.stale_evaluations = 0
        answer_samples(objective, material, prompts, 0, say)
    else:
        progress = checkpoint.restore(objective.model, optimizer, good)
        if folder.finished:  # and is to be longer
            progress.stale_evaluations = 0
        say(Resumed(progress.step, good.name, progress.evaluated, progress.sampled))

    save = Saver(folder, material, objective.model, optimizer, say, heard.asked)

    def asked_to_stop() -> bool:
        save.poll()
        return heard.asked() or enough()

    def sample(step: int) -> bool:
        return answer_during(objective, material, prompts, step, say, asked_to_stop)

    say(Stage("train", f"{schedule.steps} steps"))
    train, held_out = material.train, material.held_out
    watched = profiled(material.plan.config.training.profile, folder.path, say, objective)
    with heard.at_boundaries(), save.to_the_end(), watched as tell:
        place = material.place
        reason = fit(objective, optimizer, train, held_out, schedule, progress, save, tell, asked_to_stop, place, sample)
    if heard.number is not None:
        command = f"finetune resume {folder.path}"
        problem = f"stopped after step {progress.step} of {schedule.steps}, and saved"
        raise Interrupted(heard.number, problem, fix=f"go on with: {command}")
    step = _restore_best(folder, objective.model, progress, say)
    answer_samples(objective, material, prompts, step, say)
    save.final(material, step)
    comparison = compare_run(objective, material, step, say)
    if comparison is not None:
        save.renew_card(material, step)
    summary = _summary(folder, progress, step)
    if comparison is None and summary.get("improvement", 0.0) < 0:
        rose = f"the held-out loss rose from {summary['loss_before']:.3f} to {summary['loss_after']:.3f}"
        say(Warned(f"{rose}: the tuned model is worse than the base", "lower training.learning_rate, or look at the data"))
    predicted = read_json(folder.path / "plan.json")
    summary["measured"] = compare(predicted, summary["peak_memory"], summary["tokens_per_second"])
    with suppress(OSError):  # the summary has it too
        write_json(folder.path / "plan.json", predicted | {"measured": summary["measured"]})
    say(Finished(progress.step, reason, summary))
    return Result(folder, objective.model, material.chat, objective, comparison)


def _newest_sound(folder: RunFolder, say: Listen) -> Path | None:
    """The newest checkpoint that verifies; None where none was ever saved. Raises ModelError where none is left."""
    from llm_finetune_kit.training.checkpoint import newest_good

    good, passed = newest_good(folder.checkpoints())
    for reason in passed:
        say(Warned(f"checkpoint passed over: {reason}"))
    saved = any(isinstance(event, Saved) for event in folder.replay())
    if good is None and (passed or saved):
        fix = f"put one back, or start a new run: finetune train {folder.path / 'config.yaml'}"
        raise ModelError(23, "no sound checkpoint is left", where=str(folder.path), fix=fix)
    return good


def _restore_best(folder: RunFolder, model: Any, progress: Any, say: Listen) -> int:
    """Put the weights of the best evaluation into the model; the step that they are of."""
    from llm_finetune_kit.training.checkpoint import restore_weights

    best: int | None = progress.best_step
    if best is None or best == progress.step:
        return int(progress.step)
    place = folder.path / f"checkpoint-{best}"
    if reason := damage(place):
        say(Warned(f"the weights of the last step are kept, as the best ones cannot be used: {place.name} {reason}"))
        return int(progress.step)
    restore_weights(model, place)
    say(Stage("best", f"the weights of step {best} had the lowest held-out loss"))
    return best


def _summary(folder: RunFolder, progress: Any, step: int) -> dict[str, Any]:
    from llm_finetune_kit.hardware import peak_memory
    from llm_finetune_kit.report.figures import before_and_after

    told = folder.replay()
    losses = [event.loss for event in told if isinstance(event, Stepped)] or [progress.usual_loss]
    if not progress.moved:
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
    try:
        from llm_finetune_kit.report.write import write_report

        write_report(folder.path)
    except Exception:
        log.exception("the report could not be written")
