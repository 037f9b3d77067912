"""A study on the disk: one JSON file that says what is searched and what each trial came to, whole after every trial."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from llm_finetune_kit.config import RunConfig
from llm_finetune_kit.errors import BusyError, MachineError, UsageError
from llm_finetune_kit.files import read_json, write_json, write_whole
from llm_finetune_kit.folder import RunFolder
from llm_finetune_kit.plain_yaml import dump_yaml
from llm_finetune_kit.settings import changed
from llm_finetune_kit.tuning.space import at_edge, read_space

STUDY, BEST = "study.json", "best.yaml"
DONE, PRUNED, FAILED, SKIPPED = "done", "pruned", "failed", "skipped"
ROWS = ("train_file", "eval_file")  # of data, which may be rows in the place of names


@dataclass(frozen=True)
class Trial:
    """One run of a study: its settings, how it ended and its held-out losses (nats per token) by step.

    `state` is done, pruned (stopped early, as it was worse than the median of the others), failed, or skipped (it cannot
    run, for example as it would not fit); `why` tells more. `loss` is the lowest one, at `best_step`, whose weights the run
    kept; None where there is none.
    """

    number: int
    settings: dict[str, Any]
    state: str
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    steps: int = 0
    why: str = ""

    @property
    def loss(self) -> float | None:
        return min((loss for _, loss in self.evaluations), default=None)

    @property
    def best_step(self) -> int | None:
        return min(self.evaluations, key=lambda one: one[1], default=(None, 0.0))[0]


@dataclass
class Study:
    """A search over settings: the config that all trials share, what is searched, and the trials so far.

    `held_out` counts the rows and target tokens of every loss, and `loss_before` is that of the untrained model. `data` are
    fingerprints of what is learned and measured; `planned` is what the plan would take for what is searched. `running` are
    the settings of the trial that has begun and not ended.
    """

    folder: Path
    config: RunConfig
    space: dict[str, str]
    wanted: int
    data: dict[str, str]
    held_out: dict[str, int]
    planned: dict[str, Any]
    loss_before: float | None = None
    running: dict[str, Any] | None = None
    trials: list[Trial] = field(default_factory=list)

    @property
    def ranking(self) -> list[Trial]:
        """Trials with a held-out loss, the lowest first."""
        return sorted((one for one in self.trials if one.loss is not None), key=lambda one: float(one.loss or 0.0))

    @property
    def edges(self) -> list[str]:
        """Knobs whose best value lies at an end of what was searched."""
        space = read_space(self.space, self.config)
        return [knob for knob, one in space.items() if at_edge(one, self.best.settings[knob])]

    @property
    def best(self) -> Trial:
        """The trial with the lowest held-out loss. Raises UsageError where no trial has any."""
        if not self.ranking:
            why = f"the last of {len(self.trials)} was {self.trials[-1].state}: {self.trials[-1].why}" if self.trials else ""
            fix = "search other values: see `finetune tune --help`"
            raise UsageError(70, "no trial came to a held-out loss", where=str(self.folder), why=why, fix=fix)
        return self.ranking[0]

    def keep(self) -> None:
        """Write the study, and the best settings so far as a config."""
        tree = {
            name: getattr(self, name) for name in ("space", "wanted", "data", "held_out", "planned", "loss_before", "running")
        }
        trials = [asdict(trial) for trial in self.trials]
        write_json(self.folder / STUDY, {"config": self.config.asked(), **tree, "trials": trials})
        if self.ranking:
            write_whole(self.folder / BEST, dump_yaml(self._best_config().asked()))

    def _best_config(self) -> RunConfig:
        """Without the study's own name, and without data that was given as rows, which stand in the study alone."""
        rows = [f"data.{name}" for name in ROWS if isinstance(getattr(self.config.data, name), list)]
        return changed(self.config, self.best.settings | dict.fromkeys([*rows, "output.run_name"]))

    def to_dict(self) -> dict[str, Any]:
        """All that it came to, as plain values, the best trial first."""
        ranking = self.ranking
        rest = [trial for trial in self.trials if trial not in ranking]
        second = ranking[1].loss if len(ranking) > 1 else None
        return {
            "folder": str(self.folder),
            "space": self.space,
            "held_out": self.held_out,
            "loss_before": self.loss_before,
            "best": {"trial": self.best.number, "settings": self.best.settings, "loss": self.best.loss},
            "at_an_edge": self.edges,
            "better_than_second_by": second - float(self.best.loss or 0.0) if second is not None else None,
            "best_config": str(self.folder / BEST),
            "trials": [asdict(one) | {"loss": one.loss, "best_step": one.best_step} for one in (*ranking, *rest)],
        }

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the study; the kernel lets go when the process dies. Raises BusyError where another one works in it."""
        with open(self.folder / ".lock", "a") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                problem, fix = "another process works in this study", "wait for it, or give this one another --run-name"
                raise BusyError(4, problem, where=str(self.folder), fix=fix) from None
            except OSError as error:
                fix = "choose an output folder on a local disk: --output-dir FOLDER"
                problem = f"files cannot be locked: {error.strerror}"
                raise MachineError(37, problem, where=str(self.folder), fix=fix) from None
            yield


def begin(study: Study, name: str) -> Study:
    """The study in a new folder of this name, or of the next free one, on the disk."""
    made = replace(study, folder=RunFolder.create(study.folder, name).path)
    made.keep()
    return made


def read_study(folder: Path) -> Study:
    """The study in a folder. Raises UsageError where there is none that can be read."""
    try:
        tree = read_json(folder / STUDY)
        config = RunConfig.model_validate(tree.pop("config"))
        trials = [
            Trial(**one | {"evaluations": [(int(step), float(loss)) for step, loss in one["evaluations"]]})
            for one in tree.pop("trials")
        ]
        return Study(folder, config, **tree, trials=trials)
    except FileNotFoundError:
        raise UsageError(71, "is no study", where=str(folder), fix="name the folder that `finetune tune` made") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"the study cannot be read: {type(error).__name__}"
        raise UsageError(71, problem, where=str(folder / STUDY), fix="begin a new one with another --run-name") from error


def find_study(name: str, output_dir: Path) -> Study:
    """The study that a user means: a folder, or its name under `output_dir`. Raises UsageError where there is none."""
    return read_study(next((path for path in (Path(name), output_dir / name) if (path / STUDY).is_file()), Path(name)))


def same_study(config: RunConfig, space: dict[str, str], data: dict[str, str], others: Sequence[Path]) -> Study | None:
    """The newest study among some folders that asks for the same of the same data."""
    for folder in sorted(others, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            study = read_study(folder)
        except UsageError:
            continue
        if (study.config, study.space, study.data) == (config, space, data):
            return study
    return None
