"""What the terminal's commands have in common: flags for knobs, and a parser whose errors help."""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

from llm_finetune_kit.config import ALIASES, VALUES, RunConfig, knobs
from llm_finetune_kit.errors import UsageError, nearest

# Flags for the knobs people turn most; every other knob is set by `section.key=value`.
FLAGS: dict[str, str] = {
    "--model": "model.name",
    "--data": "data.train_file",
    "--eval-data": "data.eval_file",
    "--method": "method",
    "--max-steps": "training.max_steps",
    "--epochs": "training.num_epochs",
    "--batch-size": "training.batch_size",
    "--gradient-accumulation-steps": "training.gradient_accumulation_steps",
    "--learning-rate": "training.learning_rate",
    "--max-length": "model.max_length",
    "--max-samples": "data.max_samples",
    "--lora-r": "lora.r",
    "--seed": "training.seed",
    "--trackers": "training.trackers",
    "--output-dir": "output.output_dir",
    "--run-name": "output.run_name",
}
SHORT = {"--model": "-m", "--data": "-d"}

EXAMPLE_OF = {
    "--mode": "--mode train",
    "--prompt": 'outputs/final --prompt "How do I reset my password?"',
    "--data": "outputs/final --data sample:chat",
    "--model": "train.jsonl --model gpt2",
    "--to": "train.jsonl --to messages --out rows.jsonl",
    "--out": "train.jsonl --to messages --out rows.jsonl",
}


# What a command returns to the shell; see errors.py.
EXITS = {
    0: "done",
    2: "the command line or config is wrong",
    3: "the data is wrong",
    4: "model files are wrong",
    5: "the machine is short of something (memory, disk, network, a package)",
    6: "training went wrong",
    7: "another process works there",
    70: "a fault of this program",
    130: "stopped by Ctrl-C",
    143: "stopped by the system",
}
COLUMNS = 80  # of help texts


class Parser(argparse.ArgumentParser):
    """argparse, with errors in our form, a hint for misspelt flags, and help as a manual has it.

    `description` is one line, and paragraphs after an empty one; `exits` are the EXITS that a script may meet.
    """

    def __init__(self, prog: str, description: str, examples: Sequence[str] = (), exits: Sequence[int] = ()) -> None:
        parts = [_wrapped(part) for part in description.strip().split("\n\n")]
        after = ["examples:\n" + "\n".join(f"  {line}" for line in examples)] if examples else []
        after += ["exit codes:\n" + "\n".join(f"  {code:<3}  {EXITS[code]}" for code in exits)] if exits else []
        super().__init__(
            prog=prog,
            description="\n\n".join(parts),
            epilog="\n\n".join(after) or None,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=26, width=COLUMNS),
            allow_abbrev=False,
        )

    def error(self, message: str) -> Any:
        found = re.fullmatch(r"argument (\S+/)?(--\S+): expected one argument", message)
        if found:
            message = f"{found[2]} needs a value"
        wrong = re.fullmatch(r"argument (\S+/)?(--\S+): invalid (int|float) value: (.+)", message)
        if wrong:
            message = f"{wrong[2]} is {wrong[4]}, expected a {'whole ' if wrong[3] == 'int' else ''}number"
        chosen = re.fullmatch(r"argument (?:\S+/)?(\S+): invalid choice: '(.*)' \(choose from (.+)\)", message)
        if chosen:
            known = re.findall(r"[\w.-]+", chosen[3])
            near = nearest(chosen[2], known)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UsageError(2, f"{chosen[1]} is {chosen[2]}", fix=f"{hint}choose from {', '.join(known)}")
        missing = re.fullmatch(r"the following arguments are required: (--\w+).*", message)
        if missing:
            raise UsageError(2, f"{missing[1]} is missing", fix=f"for example: {self.prog} {EXAMPLE_OF[missing[1]]}")
        raise UsageError(2, message, fix=f"see `{self.prog} --help`")

    def parse_all(self, words: list[str]) -> argparse.Namespace:
        """The values of all words; flags and other words may stand in any order."""
        self.usage = self._usage()
        options = [name for action in self._actions for name in action.option_strings]
        words = self._with_other_spellings(words, options)
        for word in words:
            flag = word.partition("=")[0]
            if re.match(r"--\w", flag) and flag not in options:
                raise UsageError(2, f"unknown option {flag}", fix=self._instead(flag, nearest(flag, options)))
        lists = {name for action in self._actions if isinstance(action.default, list) for name in action.option_strings}
        flags = [flag for word in words if word.startswith("--") and (flag := word.partition("=")[0]) not in lists]
        twice = next((flag for flag in flags if flags.count(flag) > 1), None)
        if twice:
            several = "keep one; for several data sets: data.mix='{a.jsonl: 1, b.jsonl: 1}'"
            raise UsageError(2, f"{twice} is given twice", fix=several if twice == "--data" else "keep one of them")
        found, unknown = self.parse_known_intermixed_args(words)
        if unknown:
            kind = "option" if unknown[0].startswith("-") else "word"
            raise UsageError(2, f"unexpected {kind} {unknown[0]}", fix=f"see `{self.prog} --help`")
        return found

    def _with_other_spellings(self, words: list[str], options: list[str]) -> list[str]:
        """The words, with flags of other tools (`--lr X`) and, where data is read, of its settings as `knob=X`."""
        if not any(action.dest == "words" for action in self._actions):
            return words
        found, left = [], list(words)
        while left:
            flag, equals, value = left.pop(0).partition("=")
            name = flag.removeprefix("--").replace("-", "_")
            knob = ALIASES.get(name) if "--config" in options else f"data.{name}"
            if flag in options or not flag.startswith("--") or knob not in knobs():
                found.append(flag + equals + value)
                continue
            if not equals:
                value = _value_after(left, switch=True in VALUES.get(name, {}) or knobs()[knob].annotation is bool)
            if not value:
                raise UsageError(2, f"{flag} needs a value", fix=f"write {knob}=VALUE")
            found.append(f"{name if '--config' in options else knob}={value}")
        return found

    def _usage(self) -> str:
        """One line that names what is worked on, and leaves the options to their list."""
        words = [self.prog]
        for action in self._actions:
            if action.option_strings:
                words += [f"{action.option_strings[-1]} {action.metavar or action.dest.upper()}"] if action.required else []
                continue
            name = "|".join(map(str, action.choices)) if action.choices else str(action.metavar or action.dest.upper())
            words.append({"?": f"[{name}]", "*": f"[{name} ...]"}.get(str(action.nargs), name))
        line = " ".join([*words, "[options]"])
        return textwrap.fill(line, COLUMNS - len("usage: "), subsequent_indent=" " * 11, break_on_hyphens=False)

    def _instead(self, flag: str, near: list[str]) -> str:
        """A knob that has no flag of this name is set by its path."""
        name = flag.lstrip("-").replace("-", "_").replace("__", ".")
        paths = [path for path in knobs() if name in (path, path.rpartition(".")[2])]
        knob = paths[0] if paths else ALIASES.get(name)
        places = {action.dest for action in self._actions}
        if knob is not None and "changes" in places:
            return f"write {knob}=VALUE"
        if knob is None or "words" not in places:
            return f"did you mean {near[0]}?" if near else f"see `{self.prog} --help`"
        return next((f"write {ours} VALUE" for ours, path in FLAGS.items() if path == knob), f"write {knob}=VALUE")


def _value_after(words: list[str], *, switch: bool) -> str:
    """Take the value of a flag off the words behind it; a switch needs none to be on."""
    if words and not words[0].startswith("--") and (not switch or words[0].lower() in ("true", "false")):
        return words.pop(0)
    return "true" if switch else ""


def _wrapped(paragraph: str) -> str:
    """A paragraph in lines of COLUMNS; one that is indented stays as it is."""
    if paragraph.startswith("  "):
        return paragraph
    return textwrap.fill(" ".join(paragraph.split()), COLUMNS, break_on_hyphens=False, break_long_words=False)


def asked_config(asked: argparse.Namespace, defaults: dict[str, Any] | None = None) -> RunConfig:
    """The config that a file, flags and `key=value` words add up to; notes on other spellings go to stderr."""
    from llm_finetune_kit.settings import load_config

    files = [word for word in asked.words if "=" not in word]
    if asked.config:
        files.append(asked.config)
    if len(files) > 1:
        raise UsageError(2, f"more than one config file: {', '.join(files)}", fix="name one, and change it by section.key=value")
    flags = [f"{knob}={value}" for knob in FLAGS.values() if (value := getattr(asked, knob)) is not None]
    overrides = [word for word in asked.words if "=" in word]
    if getattr(asked, "profile", False):
        flags.append("training.profile=true")
    if getattr(asked, "compare", None) is not None:
        flags.append(f"evaluation.compare={str(asked.compare).lower()}")
    config, notes = load_config(files[0] if files else None, [*flags, *overrides], defaults if not files else None)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    return config


def file_and_config(words: Sequence[str], command: str) -> tuple[str, RunConfig]:
    """The one file that the words name, and what their `section.key=value` set. Raises UsageError for none or two."""
    from llm_finetune_kit.settings import load_config

    knob_like = {word for word in words if word.partition("=")[0].replace("-", "_") in knobs() and "=" in word}
    files = [word for word in words if word not in knob_like]
    if len(files) != 1:
        problem = "no data is named" if not files else f"more than one data set: {', '.join(files)}"
        raise UsageError(2, problem, fix=f"for example: finetune data {command} train.jsonl")
    config, notes = load_config(None, [word for word in words if word in knob_like])
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    return files[0], config
