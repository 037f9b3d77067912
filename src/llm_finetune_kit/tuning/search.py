"""A search over settings: optuna proposes, ordinary runs answer with their held-out losses."""

from __future__ import annotations

import gc
import itertools
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llm_finetune_kit.config import MANY, RunConfig
from llm_finetune_kit.errors import ConfigError, Interrupted, KitError, MachineError, TrainingError, UsageError
from llm_finetune_kit.events import Evaluated, Event, Finished, Listen, Stage, Stepped, ignore
from llm_finetune_kit.folder import RunFolder
from llm_finetune_kit.hardware import release_memory
from llm_finetune_kit.interrupts import StopAsked, interruptible
from llm_finetune_kit.material import Material, prepare_run
from llm_finetune_kit.models.fingerprint import model_fingerprint
from llm_finetune_kit.report import words
from llm_finetune_kit.run import resume, run
from llm_finetune_kit.runs import remove_run
from llm_finetune_kit.settings import changed
from llm_finetune_kit.tuning.space import DEFAULT_FACTOR, RATE, Choices, Space, combinations, default_space, read_space
from llm_finetune_kit.tuning.study import DONE, FAILED, PRUNED, SKIPPED, STUDY, Study, Trial, begin, read_study, same_study

SPREAD = 4  # trials after the first that are spread over the space; those after them learn from the ones before
COMPARED = 3  # finished trials that a later one must be held against before it may be stopped early
UNDISTURBED = 1 / 3  # of a trial's steps, in which it is never stopped: high rates begin badly and may end well
CANNOT_RUN = (20, 60)  # codes of the machine: too little memory, or no such optimizer; others stop the whole study


def tune(config: RunConfig, space: Mapping[str, str] | None = None, *, trials: int = 8, listen: Listen = ignore) -> Study:
    """Search settings by held-out loss: `trials` runs that share a config, a seed and held-out rows.

    `space` holds ranges (`1e-4..3e-3`) and lists (`8,16,32`) by their knobs; without it the learning rate is searched.
    A study that asks for the same and lies in output.output_dir goes on. Raises KitError for what the user can fix, and
    Interrupted after a signal, which loses nothing of the study.

    >>> values = {"model.name": "demo", "data.train_file": "sample:chat", "training.max_steps": 2}
    >>> study = tune(RunConfig().with_values(values), {"training.learning_rate": "1e-3,1e-4"}, trials=2)
    >>> study.best.settings
    {'training.learning_rate': 0.001}
    """
    require_optuna()
    if trials < 1:
        raise UsageError(15, f"{trials} trials", where="trials", fix="ask for at least 1")
    texts = dict(space or {})
    read_space(texts, config)
    with _signals("nothing was written yet", "start it again"):
        study = _begun(config, texts, trials, listen)
    study.wanted = max(trials, study.wanted)
    return _searched(study, listen)


def go_on(folder: Path, *, trials: int | None = None, listen: Listen = ignore) -> Study:
    """Go on with the study in a folder, to its own number of trials or another. Raises what `tune` raises."""
    require_optuna()
    study = read_study(folder)
    study.wanted = trials or study.wanted
    with _signals("the study is as it was", f"go on with: finetune tune --resume {folder}"):
        if study.data != _fingerprints(_material(study.config)):
            problem = "the data or the model has changed since the study began"
            raise UsageError(72, problem, where=str(folder), fix="put the old ones back, or begin another study")
    return _searched(study, listen)


def require_optuna() -> None:
    """Raises MachineError with the command that installs it where optuna is missing."""
    try:
        import optuna
    except ImportError:
        fix = "pip install 'llm-finetune-kit[tune]'"
        raise MachineError(54, "searching settings needs optuna", fix=fix) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)


@contextmanager
def _signals(state: str, fix: str) -> Iterator[None]:
    """Signals raise Interrupted with the state of the study; those that a trial hears too."""
    with interruptible():
        try:
            yield
        except StopAsked as stop:
            raise Interrupted(stop.number, f"stopped; {state}", fix=fix) from None
        except Interrupted as stop:
            raise Interrupted(stop.number, f"{stop.problem}; {state}", fix=fix) from None


def _material(config: RunConfig) -> Material:
    """What all trials work with; what there is to tell of it, such as whether it fits, each tells by itself.

    Raises ConfigError without held-out rows.
    """
    material = prepare_run(config, force=True)
    if material.held_out is None:
        fix = "name some in data.eval_file, or leave data.validation_split out"
        raise ConfigError(83, "no rows are held out, so no trial can be judged", where="data.validation_split", fix=fix)
    return material


def _begun(config: RunConfig, texts: dict[str, str], trials: int, listen: Listen) -> Study:
    """The study of the output folder that asks for the same of the same data, or a new one."""
    material = _material(config)
    decided = material.plan.config
    if not texts:
        texts = default_space(float(decided.training.learning_rate or 0.0))
        told = f"no setting is named to search: {RATE} is, a factor of {DEFAULT_FACTOR} each way of the plan's"
        listen(Stage("study", told))
    data, place = _fingerprints(material), Path(config.output.output_dir)
    begun = same_study(config, texts, data, [path.parent for path in place.glob(f"*/{STUDY}")])
    if begun is not None:
        return begun
    counts = {"rows": len(material.held_out), "target_tokens": int(material.held_out.targets.sum())}
    planned = {knob: _at(decided, knob) for knob in texts}
    study = Study(place, config, texts, trials, data, counts, planned)
    return begin(study, config.output.run_name or f"tune-{decided.output.run_name}")


def _fingerprints(material: Material) -> dict[str, str]:
    found = {name: str(part["fingerprint"]) for name, part in material.report.items() if "fingerprint" in part}
    return found | {"model": str(model_fingerprint(material.located.folder))}


def _at(config: RunConfig, knob: str) -> Any:
    value: Any = config.model_dump()
    for part in knob.split("."):
        value = value[part]
    return value


# --- the search --------------------------------------------------------------------------------------------


def _searched(study: Study, listen: Listen) -> Study:
    """The study with all trials that it wants, or as many as its space has."""
    space = read_space(study.space, study.config)
    total = int(min(study.wanted, combinations(space)))
    searched = "; ".join(f"{knob}: {one}" for knob, one in space.items())
    listen(Stage("study", f"{study.folder}, {total} trials of {searched}"))
    kept = f"{STUDY} in {study.folder} holds every trial that ended"
    with _signals(kept, f"go on with: finetune tune --resume {study.folder}"), study.locked():
        study.trials, study.running = (now := read_study(study.folder)).trials, now.running  # another process may have gone on
        while len(study.trials) < total:
            number, proposal = len(study.trials) + 1, _proposal(study, space)
            study.running = _settings(proposal, space)
            study.keep()
            listen(Stage("trial", f"{number} of {total}: {in_words(study.running)}"))
            study.trials.append(_tried(study, number, proposal, listen))
            study.running = None
            study.keep()
            listen(Stage("trial", f"{number} of {total} is {_outcome(study.trials[-1], study)}"))
    return study


def in_words(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{knob}={_shown(value)}" for knob, value in settings.items())


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else words.value(value)


def _outcome(trial: Trial, study: Study) -> str:
    loss = "" if trial.loss is None else f": held-out loss {trial.loss:.4f}"
    best = ", the lowest so far" if trial.loss is not None and study.best is trial else ""
    why = f" ({trial.why})" if trial.why else ""
    return f"{trial.state}{loss}{best}{why}"


def _optuna_study(study: Study, space: Space, attempt: int = 0) -> Any:
    """The trials so far as optuna sees them. Its random numbers follow from the seed and the trial's number alone, so a
    study that was stopped goes on as it would have."""
    import optuna

    seed = [study.config.training.seed, len(study.trials), attempt]
    sampler = optuna.samplers.TPESampler(seed=_mixed(seed), n_startup_trials=SPREAD)
    pruner = optuna.pruners.MedianPruner(n_startup_trials=COMPARED, n_warmup_steps=0)
    made = optuna.create_study(sampler=sampler, pruner=pruner)
    states = {DONE: optuna.trial.TrialState.COMPLETE, PRUNED: optuna.trial.TrialState.PRUNED}
    for trial in study.trials:
        known = trial.state in states
        made.add_trial(
            optuna.trial.create_trial(
                state=states.get(trial.state, optuna.trial.TrialState.FAIL),
                value=trial.loss if trial.state == DONE else None,
                params=_params(trial.settings, space),
                distributions=_distributions(space),
                intermediate_values=dict(trial.evaluations) if known else {},
            )
        )
    return made


def _mixed(numbers: list[int]) -> int:
    import numpy as np

    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _distributions(space: Space) -> dict[str, Any]:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, Any] = {}
    for knob, one in space.items():
        if isinstance(one, Choices):
            found[knob] = CategoricalDistribution(range(len(one.values)))  # by place: a value may be a list
        elif one.whole:
            found[knob] = IntDistribution(int(one.low), int(one.high), log=one.log)
        else:
            found[knob] = FloatDistribution(one.low, one.high, log=one.log)
    return found


def _params(settings: Mapping[str, Any], space: Space) -> dict[str, Any]:
    """Settings as optuna has them: those that lie in the space."""
    inside = {knob: value for knob, value in settings.items() if space[knob].holds(value)}
    return {knob: one.values.index(value) if isinstance(one := space[knob], Choices) else value for knob, value in inside.items()}


def _settings(proposal: Any, space: Space) -> dict[str, Any]:
    taken = proposal.params
    return {knob: one.values[taken[knob]] if isinstance(one, Choices) else taken[knob] for knob, one in space.items()}


def _proposal(study: Study, space: Space) -> Any:
    """The next trial: the one that had begun; first what the plan would take, then some that are spread over the space, then
    what optuna proposes; nothing twice."""
    number = len(study.trials)
    begun = study.planned if number == 0 else _spread(study, space, number - 1) if number <= SPREAD else {}
    begun = begun if study.running is None else study.running
    tried = [trial.settings for trial in study.trials]
    for attempt in range(20):
        made = _optuna_study(study, space, attempt)
        made.enqueue_trial(_params(begun if attempt == 0 else {}, space))
        proposal = made.ask(_distributions(space))
        if _settings(proposal, space) not in tried:
            return proposal
    made = _optuna_study(study, space)
    made.enqueue_trial(_params(next(one for one in _every(space) if one not in tried), space))
    return made.ask(_distributions(space))


def _spread(study: Study, space: Space, number: int) -> dict[str, Any]:
    """Of each range another part than the other spread trials have, and so of each list (a Latin hypercube)."""
    import numpy as np

    random = np.random.default_rng(study.config.training.seed)
    shares = {knob: (random.permutation(SPREAD) + random.random(SPREAD)) / SPREAD for knob in space}
    return {knob: one.at(float(shares[knob][number])) for knob, one in space.items()}


def _every(space: Space) -> Iterator[dict[str, Any]]:
    """All settings of a space, one after the other; of a range of any numbers its ends."""
    values = [
        one.values if isinstance(one, Choices) else range(int(one.low), int(one.high) + 1) if one.whole else (one.low, one.high)
        for one in space.values()
    ]
    return (dict(zip(space, one, strict=True)) for one in itertools.product(*values))


# --- one trial ---------------------------------------------------------------------------------------------


class _Watch:
    """Listens to a trial and knows when it is not worth going on with: its losses are above the median of the others'."""

    def __init__(self, proposal: Any, listen: Listen) -> None:
        self.proposal = proposal
        self.listen = listen
        self.reported: set[int] = set()
        self.hopeless = False
        self.total = 0

    def __call__(self, event: Event) -> None:
        self.listen(event)
        self.note(event)

    def note(self, event: Event) -> None:
        if isinstance(event, Stepped):
            self.total = event.total_steps
        if not isinstance(event, Evaluated) or not math.isfinite(event.loss):
            return
        if event.step > 0 and event.step not in self.reported:
            self.reported.add(event.step)
            self.proposal.report(event.loss, event.step)
            judged = UNDISTURBED * self.total <= event.step < self.total
            self.hopeless = judged and bool(self.proposal.should_prune())


def _tried(study: Study, number: int, proposal: Any, listen: Listen) -> Trial:
    """Run a trial to its end, or from where it was stopped, and what it came to."""
    folder, watch = RunFolder(study.folder / f"trial-{number}"), _Watch(proposal, listen)
    settings = dict(study.running or {})
    try:
        _run(study, folder, settings, watch)
    except TrainingError as error:
        return Trial(number, settings, FAILED, steps=folder.step, why=_why(error))
    except (ConfigError, MachineError) as error:
        if isinstance(error, MachineError) and error.number not in CANNOT_RUN:
            raise
        return Trial(number, settings, SKIPPED, why=_why(error))
    finally:
        _let_go()
    told = folder.replay()
    losses = [(event.step, event.loss) for event in told if isinstance(event, Evaluated) and math.isfinite(event.loss)]
    study.loss_before = next((loss for step, loss in losses if step == 0), study.loss_before)
    ends = [event.reason for event in told if isinstance(event, Finished)]
    pruned = ends[-1:] == ["asked to stop"]
    why = "above the median of the others" if pruned else ends[-1] if ends[-1:] == ["no improvement"] else ""
    found = [(step, loss) for step, loss in losses if step > 0]
    if not found:
        return Trial(number, settings, FAILED, steps=folder.step, why="no held-out loss was finite")
    return Trial(number, settings, PRUNED if pruned else DONE, found, folder.step, why)


def _why(error: KitError) -> str:
    return f"{error.code}: {error.problem}"


def _run(study: Study, folder: RunFolder, settings: dict[str, Any], watch: _Watch) -> None:
    if not (folder.finished or folder.checkpoints()):
        if folder.path.is_dir():
            remove_run(folder)
        run(_config_of(study, folder.path.name, settings), watch, enough=lambda: watch.hopeless)
        return
    for event in folder.replay():
        watch.note(event)
    if not folder.finished:  # else it was stopped between the run's end and the study's
        resume(folder, watch, enough=lambda: watch.hopeless)


def _config_of(study: Study, name: str, settings: dict[str, Any]) -> RunConfig:
    """A trial's config: without what a single run does for its reader, and with as little on the disk as it can go on from."""
    plain = RunConfig()
    own = {"output.output_dir": str(study.folder), "output.run_name": name, "evaluation.compare": False}
    left_open = {"evaluation.sample_steps": MANY, "training.save_total_limit": 1}
    own |= {knob: value for knob, value in left_open.items() if _at(study.config, knob) == _at(plain, knob)}
    return changed(study.config, settings | own)


def _let_go() -> None:
    """Free what the trial before held: models refer to themselves in circles."""
    gc.collect()
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    release_memory()
