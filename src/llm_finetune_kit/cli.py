"""The terminal: turns a command line into a config, and events into lines. Holds no logic of its own."""

from __future__ import annotations

import argparse
import errno
import io
import json
import logging
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from importlib import import_module

from llm_finetune_kit import cli_evaluate
from llm_finetune_kit.arguments import EXITS, FLAGS, SHORT, Parser, asked_config
from llm_finetune_kit.cli_texts import parser_of
from llm_finetune_kit.config import RunConfig, knobs
from llm_finetune_kit.errors import OUR_BUG, KitError, MachineError, UsageError, nearest
from llm_finetune_kit.hardware import share_the_machine, start_quickly

COMMANDS = {
    "train": "fine-tune a model (the default command)",
    "demo": "fine-tune the small model inside the package: no network, no GPU",
    "resume": "go on with a run that was stopped",
    "tune": "search settings by held-out loss, in many short runs",
    "runs": "list all runs and how they stand; show one, or remove it",
    "report": "renew the report of a run",
    "plan": "show what a run would do and need, without starting it",
    "models": "list the models that have a short name, and what fits here",
    "doctor": "find what is wrong with this machine, and how to mend it",
    **cli_evaluate.COMMANDS,
    "data": "check, preview or convert training data; look at the cache",
    "ui": "open the page in a browser",
    "export": "merge an adapter into its base: a model for other programs",
    "serve": "answer over HTTP, in the form of OpenAI's chat API",
    "init": "write a config to begin with",
    "explain": "explain a setting or an error code",
    "chat": "talk with a model, answer by answer",
    "completion": "print a script that completes words in a shell",
}

# Commands that have a file of their own, which is loaded when they are called.
ELSEWHERE = {
    "resume": "cli_runs",
    "tune": "cli_tune",
    "runs": "cli_runs",
    "report": "cli_runs",
    "models": "cli_machine",
    "doctor": "cli_machine",
    "init": "cli_init",
    "explain": "cli_explain",
    "chat": "cli_chat",
    "serve": "cli_serve",
    "export": "cli_export",
    "ui": "cli_ui",
    "completion": "cli_completion",
}

EXAMPLES = """\
examples:
  finetune demo
  finetune --model gpt2 --data sample:chat --max-steps 100
  finetune train configs/training_config.yaml training.learning_rate=1e-4
  finetune data check train.jsonl
  finetune data preview train.jsonl --model gpt2
  finetune plan --model mistral-7b --on "RTX 4090"
  finetune resume
  finetune generate outputs/final --prompt "How do I reset my password?"
  finetune compare outputs/final
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code; see `errors.py` for what the codes mean."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    return guarded(lambda: _dispatch(_normalised(words)))


def page(arguments: Sequence[str] | None = None) -> int:
    """The command `finetune-demo`: the page in a browser."""
    return main(["ui", *(sys.argv[1:] if arguments is None else arguments)])


def guarded(work: Callable[[], int]) -> int:
    """The exit code of some work, with its errors told as a person wants to read them."""
    from llm_finetune_kit.terminal import drop_closed_streams, folded

    _calm()
    try:
        code = work()
        print(end="", flush=True)
        return code
    except KitError as error:
        print(folded(error), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped; nothing was being trained", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read our output has had enough of it
        return 0
    except OSError as error:
        if error.errno != errno.ENOSPC:
            return _our_bug(error)
        full = MachineError(12, "the disk is full", where=str(error.filename or "output"), fix="free some disk space")
        print(full, file=sys.stderr)
        return full.exit_code
    except Exception as error:  # a fault of ours: say so, and keep the traceback for a report
        return _our_bug(error)
    finally:
        logging.captureWarnings(False)
        drop_closed_streams()


def _our_bug(error: Exception) -> int:
    import tempfile
    import traceback

    with tempfile.NamedTemporaryFile("w", prefix="finetune-bug-", suffix=".log", delete=False, encoding="utf-8") as file:
        traceback.print_exc(file=file)
    print(f"error[BUG-001] {type(error).__name__}: {error}", file=sys.stderr)
    print(f"  why:  this is a fault of finetune, not yours\n  fix:  please report it with {file.name}", file=sys.stderr)
    return OUR_BUG


def _calm() -> None:
    """Letters that the terminal does not know never stop a run; warnings and bars of libraries are not shown.

    A run collects them in its debug.log; `python -W` and PYTHONWARNINGS show them as usual.
    """
    share_the_machine()
    start_quickly()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if not sys.warnoptions:
        logging.captureWarnings(True)
        logging.getLogger("py.warnings").addHandler(logging.NullHandler())
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not (sys.stderr and sys.stderr.isatty()):
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _normalised(words: list[str]) -> list[str]:
    """Flags may be written with underscores, and the command `train` may be left out."""
    words = [dashed(word) for word in words]
    if words[:1] == ["help"]:
        words = [*words[1:], "--help"]
    if not words or words[0] in ("-h", "--help", "--version") or words[0] in COMMANDS:
        return words
    if words[0].startswith("-") or "=" in words[0] or words[0].endswith((".yaml", ".yml")):
        return ["train", *words]
    near = nearest(words[0], list(COMMANDS))
    hint = f"did you mean `finetune {near[0]}`? " if near else ""
    raise UsageError(1, f"there is no command {words[0]}", fix=f"{hint}commands: {', '.join(COMMANDS)}")


def dashed(word: str) -> str:
    """A flag with dashes for its underscores; any other word as it is."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value


def _parser(command: str) -> Parser:
    parser = parser_of(command, COMMANDS[command])
    config_arguments(parser, command)
    if command == "plan":
        parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def config_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    """A config file, flags and `section.key=value`, and what else a command of COMMANDS takes beside them."""
    parser.add_argument("words", nargs="*", metavar="CONFIG.yaml | section.key=value", help="a config file, and any knob of it")
    parser.add_argument("--config", "-c", help="a YAML config file")
    known = knobs()
    for flag, knob in FLAGS.items():
        parser.add_argument(*filter(None, (SHORT.get(flag), flag)), help=known[knob].description, metavar="X", dest=knob)
    if command == "train":
        parser.add_argument("--dry-run", action="store_true", help="show the plan and stop")
        help_text = "at the end, compare base and tuned on held-out rows (default; --no-compare leaves it out)"
        parser.add_argument("--compare", action=argparse.BooleanOptionalAction, help=help_text)
        parser.add_argument("--profile", action="store_true", help=known["training.profile"].description)
        parser.add_argument("--fail-if-worse", action="store_true", help="exit with 6 where the tuned model is shown to be worse")
    if command in ("train", "plan"):
        parser.add_argument("--estimate-time", action="store_true", help="show time and cost and stop (as `finetune plan`)")
        parser.add_argument("--on", metavar="MACHINE", help='plan for another machine: T4, "RTX 4090", H200, "cpu 16GB"…')
        parser.add_argument("--price", type=float, metavar="X", help="what the machine costs an hour, in dollars")
        parser.add_argument("--force", action="store_true", help="start although the plan says that it cannot fit")
    if command == "plan":
        parser.add_argument("--probe", action="store_true", help="run some of its steps here first, to be sure")


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if words[0] == "--version":
        from llm_finetune_kit import __version__

        print(f"finetune {__version__}")
        return 0
    command = words[0]
    if command == "data":
        from llm_finetune_kit.cli_data import data_command

        return data_command(words[1:])
    if command in ELSEWHERE:
        home = import_module(f"llm_finetune_kit.{ELSEWHERE[command]}")
        return int(vars(home)[f"{command}_command"](words[1:]))
    if command in cli_evaluate.COMMANDS:
        return cli_evaluate.evaluate_command(command, words[1:])
    asked = _parser(command).parse_all(words[1:])
    handler: Callable[[argparse.Namespace], int] = globals()[f"_{command}"]
    return handler(asked)


def _overview() -> str:
    lines = [
        "usage: finetune [command] [options]",
        "",
        "Fine-tune open language models, with evidence that it worked.",
        "",
        "commands:",
    ]
    lines += [f"  {name:<11} {text}" for name, text in COMMANDS.items()]
    lines += ["", "`finetune COMMAND --help` tells more. The most used options of train:"]
    known = knobs()
    lines += [_option(flag, known[knob].description) for flag, knob in FLAGS.items()]
    lines += [_option("section.key=value", "any other setting, for example lora.alpha=64"), "", EXAMPLES, "exit codes:"]
    return "\n".join([*lines, *(f"  {code:<3}  {means}" for code, means in EXITS.items())])


def _option(flag: str, text: str) -> str:
    """A flag with its help beside it, or below it where it is long, in 80 columns."""
    first = f"  {flag:<19} " if len(flag) < 20 else f"  {flag}\n{'':22}"
    return first + textwrap.fill(text, 80 - 22, break_on_hyphens=False).replace("\n", "\n" + " " * 22)


def _train(asked: argparse.Namespace) -> int:
    if asked.dry_run or asked.estimate_time or asked.on:
        return _show_plan(asked)
    return start(asked_config(asked), force=asked.force, fail_if_worse=asked.fail_if_worse)


def start(config: RunConfig, *, force: bool = False, fail_if_worse: bool = False) -> int:
    """Run a config with progress in the terminal."""
    from llm_finetune_kit.run import run
    from llm_finetune_kit.terminal import Terminal

    with Terminal() as terminal:
        result = run(config, terminal, force=force)
    if fail_if_worse:
        cli_evaluate.refuse_worse(result.comparison)
    return 0


def _demo(asked: argparse.Namespace) -> int:
    """The first run: short steps on the embedded model, with settings that suit its size."""
    from llm_finetune_kit.config import demo_values

    return start(asked_config(asked, demo_values()))


def _plan(asked: argparse.Namespace) -> int:
    return _show_plan(asked)


def _show_plan(asked: argparse.Namespace) -> int:
    from llm_finetune_kit.events import ignore
    from llm_finetune_kit.planning import plan_run
    from llm_finetune_kit.terminal import Terminal

    as_json = getattr(asked, "json", False)
    listen = ignore if as_json else Terminal()
    probed = getattr(asked, "probe", False)
    plan = plan_run(asked_config(asked), listen, on=asked.on, price=asked.price, force=asked.force, probed=probed)
    if as_json:
        print(json.dumps(plan.to_dict(), indent=2, default=str))
    return 0
