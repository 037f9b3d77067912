"""`finetune tune`: a search over settings. Holds no logic of its own."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llm_finetune_kit.arguments import FLAGS, Parser, asked_config
from llm_finetune_kit.cli_texts import RUNNING
from llm_finetune_kit.errors import UsageError
from llm_finetune_kit.events import Evaluated, Event, Listen, Stage, Warned

if TYPE_CHECKING:
    from llm_finetune_kit.tuning.study import Study, Trial

TEXT = """\
search settings by held-out loss, in many short runs

What is searched is given as a range a..b or a list a,b,c in the place of a value; everything else is given as for train
and is the same in all trials. Without any, the learning rate is searched, a factor of 10 each way of what the plan would
take. Ranges are drawn on a logarithmic scale, but for lora.dropout, training.warmup_ratio and those that begin at 0.

Each trial is a run in the study's folder, of as many steps as training.max_steps says. One that is worse than the median
of the others is stopped early; one that does not fit into memory is skipped. The same command again, or --resume, goes on
with a study that was stopped. The best settings are written to best.yaml.
"""
EXAMPLES = (
    "finetune tune --model demo --data sample:chat --max-steps 20",
    "finetune tune --model gpt2 --data train.jsonl --max-steps 100 --trials 12 \\\n"
    "      training.learning_rate=1e-4..3e-3 lora.r=8,16,32",
    "finetune tune finetune.yaml lora.target_modules=all-linear,[q_proj,v_proj]",
    "finetune tune --resume outputs/tune-demo-chat --trials 16",
)
PLACE, TRIALS = "output.output_dir", 8


def tune_command(words: Sequence[str]) -> int:
    """`finetune tune [CONFIG.yaml] [section.key=a..b | a,b,c | value ...]`; returns the exit code."""
    from llm_finetune_kit.cli import config_arguments

    parser = Parser(prog="finetune tune", description=TEXT, examples=EXAMPLES, exits=RUNNING)
    config_arguments(parser, "tune")
    parser.add_argument("--trials", type=int, metavar="N", help="how many runs in all (default 8)")
    parser.add_argument("--resume", metavar="STUDY", help="go on with the study in this folder, or of this name")
    parser.add_argument("--json", action="store_true", help="print JSON")
    asked = parser.parse_all(list(words))
    if asked.trials is not None and asked.trials < 1:
        raise UsageError(2, f"--trials is {asked.trials}, expected at least 1", fix="for example --trials 8")
    study = _went_on(asked) if asked.resume else _new(asked)
    told = study.to_dict()
    if asked.json:
        print(json.dumps(told, indent=2))
    else:
        _show(study)
    return 0


def _went_on(asked: argparse.Namespace) -> Study:
    flags = [str(value) for knob in FLAGS.values() if knob != PLACE and (value := getattr(asked, knob)) is not None]
    given = [*asked.words, *flags, *([asked.config] if asked.config else [])]
    if given:
        problem = f"a study goes on with its own settings, and {given[0]} is named"
        raise UsageError(2, problem, fix=f"finetune tune --resume {asked.resume}; begin another study for other settings")
    from llm_finetune_kit.tuning.search import go_on
    from llm_finetune_kit.tuning.study import find_study

    folder = find_study(asked.resume, Path(getattr(asked, PLACE) or "outputs")).folder
    return go_on(folder, trials=asked.trials, listen=_progress())


def _new(asked: argparse.Namespace) -> Study:
    from llm_finetune_kit.tuning.search import tune
    from llm_finetune_kit.tuning.space import searched_words

    flags = {knob: f"{knob}={text}" for knob in FLAGS.values() if (text := getattr(asked, knob)) is not None}
    files = [word for word in asked.words if "=" not in word]
    space, fixed = searched_words([*flags.values(), *(word for word in asked.words if "=" in word)])
    for knob, word in flags.items():
        if word not in fixed:
            setattr(asked, knob, None)
    asked.words = [*files, *(word for word in fixed if word not in flags.values())]
    return tune(asked_config(asked), space, trials=asked.trials or TRIALS, listen=_progress())


def _progress() -> Listen:
    """Lines on stderr: trials, their held-out losses, and each warning once, however many trials give it."""
    from llm_finetune_kit.terminal import Terminal

    terminal, warned = Terminal(), set()

    def hear(event: Event) -> None:
        if isinstance(event, Warned):
            if event.message in warned:
                return
            warned.add(event.message)
        elif not isinstance(event, Evaluated) and not (isinstance(event, Stage) and event.name in ("study", "trial")):
            return
        terminal(event)

    return hear


def _show(study: Study) -> None:
    from llm_finetune_kit.terminal import print_pairs, print_table, show
    from llm_finetune_kit.tuning.search import in_words
    from llm_finetune_kit.tuning.study import BEST

    rest = [trial for trial in study.trials if trial.loss is None]
    knobs = list(study.space)
    heads = ("trial", *knobs, "held-out loss", "steps", "state")
    print_table(heads, [_row(trial, knobs) for trial in (*study.ranking, *rest)])
    show()
    best, counts = study.best, study.held_out
    second = study.ranking[1] if len(study.ranking) > 1 else None
    lead = f"{float(second.loss or 0) - float(best.loss or 0):.4f} below trial {second.number}" if second else "the only one"
    before = f", {study.loss_before:.4f} before training" if study.loss_before is not None else ""
    measured = f"{counts['rows']:,} held-out rows with {counts['target_tokens']:,} tokens to predict"
    doubt = f"the lowest of {len(study.ranking)} on the rows that chose it looks better than it is; only other rows can tell"
    path = study.folder / BEST
    pairs = [
        ("best", f"trial {best.number}: {in_words(best.settings)}", ""),
        ("its held-out loss", f"{best.loss:.4f}, {lead}{before}", measured),
        ("mind", doubt, ""),
    ]
    if study.edges:
        edges = f"the best {' and '.join(study.edges)} lies at an end of what was searched: search beyond it"
        pairs.append(("mind", edges, ""))
    pairs.append(("train with it", f"finetune train --config {path}", ""))
    pairs.append(("confirm it", f"finetune compare {study.folder}/trial-{best.number} --data OTHER.jsonl", ""))
    print_pairs(pairs)


def _row(trial: Trial, knobs: Sequence[str]) -> tuple[str, ...]:
    from llm_finetune_kit.tuning.search import in_words

    settings = [in_words({knob: trial.settings[knob]}).partition("=")[2] for knob in knobs]
    loss = "–" if trial.loss is None else f"{trial.loss:.4f}"
    state = f"{trial.state} ({trial.why})" if trial.why else trial.state
    return str(trial.number), *settings, loss, f"{trial.steps:,}", state
