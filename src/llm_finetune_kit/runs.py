"""All runs of a folder: which there are, how each stands, and which of them, or which model, a name means."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llm_finetune_kit.catalog import short_name
from llm_finetune_kit.errors import BusyError, MachineError, UsageError, nearest
from llm_finetune_kit.events import Evaluated, Event, Failed, Finished, Noted, Resumed, Stepped, Warned
from llm_finetune_kit.files import MANIFEST, remove
from llm_finetune_kit.folder import EVENTS, RunFolder

OUTPUTS = "outputs"  # where runs are looked for by their names alone


@dataclass(frozen=True)
class Standing:
    """How a run stands. `state` is running, finished, interrupted (stopped or killed, and can go on) or failed."""

    name: str
    folder: str
    state: str
    step: int
    total_steps: int | None
    loss: float | None  # of the last step
    held_out_before: float | None
    held_out_best: float | None
    why: str  # it is where it is: who works in it, why it ended or what stopped it
    go_on: str  # the command that goes on with it or uses it


def standing(run: RunFolder, told: Sequence[Event] | None = None) -> Standing:
    """Read off the log of a run, and off its lock, how it stands; `told` is its log where that was read already."""
    told = run.replay() if told is None else told
    steps = [event for event in told if isinstance(event, Stepped)]
    losses = {event.step: event.loss for event in told if isinstance(event, Evaluated)}
    state, why = _state(run, told)
    commands = {
        "running": "",
        "finished": f'finetune generate {run.path} --prompt "…"',
        "interrupted": f"finetune resume {run.path}",
        "failed": f"finetune resume {run.path}" if _can_go_on(run, told) else f"finetune train {run.path / 'config.yaml'}",
    }
    return Standing(
        name=run.path.name,
        folder=str(run.path),
        state=state,
        step=steps[-1].step if steps else 0,
        total_steps=steps[-1].total_steps if steps else None,
        loss=steps[-1].loss if steps else None,
        held_out_before=losses.get(0),
        held_out_best=min((loss for step, loss in losses.items() if step > 0), default=None),
        why=why,
        go_on=commands[state],
    )


def _can_go_on(run: RunFolder, told: Sequence[Event]) -> bool:
    failures = [event for event in told if isinstance(event, Failed)]
    return bool(run.checkpoints()) and not (failures and failures[-1].code.startswith("MODEL"))  # none of them is sound


def _state(run: RunFolder, told: Sequence[Event]) -> tuple[str, str]:
    if run.at_work:
        word = next((event for event in reversed(told) if isinstance(event, (Warned, Noted, Stepped))), None)
        waits = isinstance(word, Warned) and "the run waits" in word.message
        return "running", word.message if isinstance(word, Warned) and waits else run.holder
    ends = [event for event in told if isinstance(event, (Finished, Failed, Resumed, Stepped))]
    last = ends[-1] if ends else None
    if isinstance(last, Finished) and (run.final / MANIFEST).is_file():
        return "finished", last.reason
    if isinstance(last, Failed) and not last.code.startswith("STOP"):
        return "failed", f"{last.code}: {last.problem}"
    return "interrupted", last.problem if isinstance(last, Failed) else "its process ended without a word"


def runs(output_dir: Path) -> list[RunFolder]:
    """All runs under a folder, the last started first."""
    found = [path.parent for path in output_dir.glob(f"*/{EVENTS}")]
    return [RunFolder(path) for path in sorted(found, key=_order, reverse=True)]


def started(run: Path) -> float:
    """When a run said its first word, in seconds since 1970; 0 where that cannot be read."""
    try:
        with open(run / EVENTS, encoding="utf-8", errors="replace") as log:
            return float(json.loads(log.readline())["time"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0


def _order(run: Path) -> tuple[float, int, str]:
    """By their first words; runs of one instant follow the number in their names."""
    number = re.search(r"-(\d+)$", run.name)
    return started(run), int(number[1]) if number else 1, run.name


def find_run(name: str | None, output_dir: Path) -> RunFolder:
    """The run a user means: a path, a name under `output_dir`, or without a name the last unfinished one.

    Raises UsageError where there is none.
    """
    if name is not None:
        for path in (Path(name), output_dir / name):
            if (path / EVENTS).is_file():
                return RunFolder(path)
        names = [run.path.name for run in runs(output_dir)]
        near = nearest(Path(name).name, names) or names[:3]
        fix = f"did you mean {' or '.join(near)}?" if near else f"{output_dir} holds no runs; start one with `finetune train`"
        raise UsageError(3, f"no run is called {name}", where=str(output_dir), fix=fix)
    known = runs(output_dir)
    unfinished = [run for run in known if not run.finished]
    for run in unfinished:
        if not run.at_work:
            return run
    if unfinished:
        fix = "wait for it; `finetune runs` shows how it stands"
        raise BusyError(2, "every unfinished run is at work", where=str(output_dir), why=unfinished[0].holder, fix=fix)
    finished = [str(run.path) for run in known]
    fix = "start one with `finetune train`, or name its folder with --output-dir"
    if finished:
        fix = f"to train one for longer: finetune resume {finished[0]} --max-steps N"
    raise UsageError(3, "no unfinished run" if finished else "no run is here", where=str(output_dir), fix=fix)


def find_result(path: str) -> Path:
    """The model folder that a path means: itself, a run's `final/`, or `OUTPUTS/final` and `OUTPUTS/checkpoint-N`
    of the newest run under OUTPUTS that has it. The name of a run alone means the run, where no model is called so.

    Raises UsageError naming what there is. Paths that are no part of any run come back as they are.
    """
    asked = Path(path)
    if not asked.exists() and not short_name(path) and (named := run_named(path)):
        asked, path = named, str(named)
    if (asked / EVENTS).is_file():
        run = RunFolder(asked)
        if run.finished:
            return run.final
        if run.checkpoints():
            return run.checkpoints()[0]
        raise UsageError(5, "the run has no model yet", where=path, fix=f"go on with: finetune resume {path}")
    if asked.is_dir():
        return asked
    if not re.fullmatch(r"final|checkpoint-\d+", asked.name):
        return find_run(asked.name, asked.parent).path if "/" in path and runs(asked.parent) else asked
    for run in runs(asked.parent):
        if (run.path / asked.name).is_dir():
            return run.path / asked.name
    held = [str(folder) for run in runs(asked.parent) for folder in (run.final, *run.checkpoints()) if folder.is_dir()]
    fix = f"there is {', '.join(held[:4])}" if held else "train first: finetune train --model demo --data sample:chat"
    raise UsageError(5, f"no run has a {asked.name}", where=str(asked.parent), fix=fix)


def run_named(name: str) -> Path | None:
    """The folder of the run under OUTPUTS that has this name, if one has."""
    named = Path(OUTPUTS, name)
    return named if named.name == name and (named / EVENTS).is_file() else None


def remove_run(run: RunFolder) -> None:
    """Delete a run and all it holds. Raises BusyError while a process works in it."""
    with run.locked():
        gone = remove(run.path)
    if not gone:
        fix = "mend the rights of the folder, then try again"
        raise MachineError(14, "cannot be removed", where=str(run.path), fix=fix)
