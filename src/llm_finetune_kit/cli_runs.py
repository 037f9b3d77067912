"""`finetune resume`, `report` and `runs`: going on with runs, and looking at and after them."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from llm_finetune_kit.arguments import Parser
from llm_finetune_kit.cli_texts import RUNNING
from llm_finetune_kit.errors import MachineError, UsageError
from llm_finetune_kit.folder import RunFolder
from llm_finetune_kit.report.words import size
from llm_finetune_kit.runs import Standing, find_run, remove_run, runs, standing

ACTIONS = ("list", "show", "rm")
ALL_DONE = "all steps done"  # the reason of a run that ended as planned

RESUME = """\
go on with a run that was stopped, from its newest sound checkpoint to the same end as if it had never stopped

Settings may follow as section.key=value. Those that say how it is computed and kept (training.save_steps,
training.tokens_per_pass…) are taken; those that say how it learns from here on (training.learning_rate…) with
--allow-change; all others would make another run of it and are refused.
"""
RUNS = """\
list all runs and how they stand; show one, or remove it

States, newest run first: running, finished, interrupted (it can go on), failed.

  finetune runs            all of them
  finetune runs [show] RUN one, with the command that goes on with it
  finetune runs rm RUN ... delete runs and all they hold, after a question;
                           never one that is running
"""

REPORT = """\
renew the report of a run: report.html and the other files of evidence, made anew from what the run recorded

A run writes them by itself. This is for a run that was killed, that an earlier version wrote, or whose report was
deleted; of a run that is at work only the page is renewed. Nothing is computed again.
"""

RESUMED = (
    "finetune resume",
    "finetune resume outputs/demo --max-steps 200",
    "finetune resume demo training.save_steps=50",
    "finetune resume demo training.learning_rate=1e-5 --allow-change",
)
REPORTED = ("finetune report", "finetune report outputs/demo")
LISTED = ("finetune runs", "finetune runs show demo", "finetune runs rm demo demo-2", "finetune runs --json")


def resume_command(words: list[str]) -> int:
    """`finetune resume [RUN] [section.key=value ...]`; returns the exit code."""
    parser = Parser(prog="finetune resume", description=RESUME, examples=RESUMED, exits=RUNNING)
    parser.add_argument("run", nargs="?", help="the run's folder or name (default: the newest unfinished run)")
    parser.add_argument("changes", nargs="*", metavar="section.key=value", help="what is to be different from here on")
    parser.add_argument("--output-dir", default="outputs", help="folder that holds the runs")
    parser.add_argument("--max-steps", type=int, help="go on to this many steps instead; the schedule is stretched to them")
    parser.add_argument("--allow-change", action="store_true", help="take settings that change how it learns from here on")
    asked = parser.parse_all(words)
    names = [word for word in (asked.run, *asked.changes) if word and "=" not in word]
    changes = [word for word in (asked.run, *asked.changes) if word and "=" in word]
    if len(names) > 1:
        raise UsageError(1, f"one run at a time, and {' and '.join(names)} are named", fix="finetune resume RUN")
    folder = find_run(names[0] if names else None, Path(asked.output_dir))
    if folder.finished and asked.max_steps is None and not changes:
        print(f"{folder.path} is finished at step {folder.step}; to train longer, name more: --max-steps N")
        return 0
    from llm_finetune_kit.run import resume
    from llm_finetune_kit.terminal import Terminal

    whole = folder.checkpoints()
    after = int(whole[0].name.partition("-")[2]) if whole else 0
    with Terminal(goes_on=after) as terminal:
        resume(folder, terminal, max_steps=asked.max_steps, changes=changes, allow_change=asked.allow_change)
    return 0


def report_command(words: list[str]) -> int:
    """`finetune report [RUN]`; returns the exit code."""
    parser = Parser(prog="finetune report", description=REPORT, examples=REPORTED)
    parser.add_argument("run", nargs="?", help="the run's folder or name (default: the run that was started last)")
    parser.add_argument("--output-dir", default="outputs", help="folder that holds the runs")
    asked = parser.parse_all(words)
    place = Path(asked.output_dir)
    known = [] if asked.run else runs(place)
    folder = known[0] if known else find_run(asked.run, place)
    from llm_finetune_kit.report.page import write_page

    try:
        if folder.at_work:
            write_page(folder.path)
        else:
            from llm_finetune_kit.report.write import write_report

            write_report(folder.path)
    except OSError as error:
        problem = f"the report cannot be written: {error.strerror}"
        fix = "free some disk space, mend the rights of the folder, or copy it elsewhere"
        raise MachineError(19, problem, where=str(folder.path), fix=fix) from None
    print(folder.path / "report.html")
    return 0


def runs_command(words: list[str]) -> int:
    """`finetune runs [list | show RUN | rm RUN ...]`; returns the exit code."""
    parser = Parser(prog="finetune runs", description=RUNS, examples=LISTED, exits=(0, 2, 5, 7))
    parser.add_argument("action", nargs="?", metavar="|".join(ACTIONS), default="list", help="what to do (default list)")
    parser.add_argument("run", nargs="*", help="a run's folder or name")
    parser.add_argument("--output-dir", default="outputs", help="folder that holds the runs")
    parser.add_argument("--yes", "-y", action="store_true", help="remove without asking")
    parser.add_argument("--json", action="store_true", help="print JSON")
    asked = parser.parse_all(words)
    place = Path(asked.output_dir)
    if asked.action not in ACTIONS:  # the name of a run alone
        asked.action, asked.run = "show", [asked.action, *asked.run]
    if asked.action == "list":
        return _list([standing(run) for run in runs(place)], place, asked.json)
    if not asked.run:
        raise UsageError(3, "no run is named", fix=f"finetune runs {asked.action} RUN; `finetune runs` lists them")
    found = [find_run(name, place) for name in asked.run]  # all are found before one is touched
    if asked.action == "show" and asked.json:
        told = [asdict(standing(folder)) for folder in found]
        print(json.dumps(told[0] if len(told) == 1 else told, indent=2))
        return 0
    if asked.action == "show":
        for folder in found:
            _show(folder)
        return 0
    if asked.yes or _sure(found):
        for folder in found:
            remove_run(folder)
            print(f"removed {folder.path}")
    return 0


def _sure(found: list[RunFolder]) -> bool:
    """Ask whoever sits at the terminal. Raises UsageError where nobody does."""
    names = ", ".join(str(folder.path) for folder in found)
    if not (sys.stdin and sys.stdin.isatty()):
        raise UsageError(30, f"{names} would be deleted, and nobody can be asked", fix="add --yes to delete without a question")
    held = sum(path.stat().st_size for folder in found for path in folder.path.rglob("*") if path.is_file())
    try:
        answer = input(f"Delete {names} and all in {'it' if len(found) == 1 else 'them'} ({size(held)})? [y/N] ")
    except EOFError:
        answer = ""
    return answer.strip().lower() in ("y", "yes")


def _list(found: list[Standing], place: Path, as_json: bool) -> int:
    if as_json:
        print(json.dumps([asdict(one) for one in found], indent=2))
        return 0
    from llm_finetune_kit.terminal import print_table, show

    if not found:
        show(f"{place} holds no runs; start one: finetune demo")
        return 0
    heads = ("run", "state", "step", "held-out loss")
    print_table(heads, [(one.name, _state(one), _steps(one), _losses(one)) for one in found])
    commands = [one.go_on for one in found if one.go_on]
    if commands:  # below the table, where none is folded: they are there to be copied
        print("\nto go on:\n" + "\n".join(f"  {command}" for command in commands), flush=True)
    return 0


def _state(one: Standing) -> str:
    """The state in a few words: with why it ended where that was not the last step, or the code of its error."""
    if one.state == "failed":
        return f"failed ({one.why.partition(':')[0]})"
    return f"finished ({one.why})" if one.state == "finished" and one.why != ALL_DONE else one.state


def _show(folder: RunFolder) -> None:
    one = standing(folder)
    from llm_finetune_kit.terminal import print_pairs

    whole = ", ".join(path.name for path in folder.checkpoints()) or "none"
    pairs = [
        ("run", one.folder, ""),
        ("state", one.state, one.why),
        ("step", _steps(one), ""),
        ("loss", "none yet" if one.loss is None else f"{one.loss:.4f}", "of the last step"),
        ("held-out loss", _losses(one) or "not measured", "before training, and the best since"),
        ("checkpoints", whole, ""),
        ("report", f"{one.folder}/report.html" if (folder.path / "report.html").is_file() else "not written yet", ""),
        ("go on", one.go_on or "wait for it", ""),
    ]
    print_pairs(pairs)


def _steps(one: Standing) -> str:
    return f"{one.step:,} of {one.total_steps:,}" if one.total_steps else "0"


def _losses(one: Standing) -> str:
    told = (one.held_out_before, one.held_out_best)
    return " → ".join(f"{loss:.3f}" for loss in told if loss is not None)
