"""`finetune generate`, `eval` and `compare`: ask a model, measure it, or hold it against another. Holds no logic of its own."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llm_finetune_kit.arguments import Parser
from llm_finetune_kit.cli_texts import parser_of
from llm_finetune_kit.config import GenerationSection
from llm_finetune_kit.errors import TrainingError, UsageError

NEW_TOKENS = 128  # of an answer that somebody waits for

COMMANDS = {
    "generate": "answer a prompt with a model, a run or an adapter",
    "eval": "measure a model on held-out data",
    "compare": "hold a tuned model against its base, with intervals",
}


def evaluate_command(command: str, words: Sequence[str]) -> int:
    """Run one of COMMANDS with these words and return its exit code."""
    handler: Callable[[argparse.Namespace], int] = globals()[f"_{command}"]
    return handler(_parser(command).parse_all(list(words)))


def _parser(command: str) -> Parser:
    parser = parser_of(command, COMMANDS[command])
    if command == "compare":
        _compare_arguments(parser)
    else:
        parser.add_argument("model", nargs="?", help="a model name, a run, a folder, or outputs/final")
        parser.add_argument("--model", "--model-path", dest="model_flag", help="the same as a flag")
    if command == "generate":
        parser.add_argument("--prompt", help="what to ask")
        parser.add_argument(
            "--prompts", metavar="FILE", help="a text file with a prompt on each line, or rows such as prompts.jsonl"
        )
        parser.add_argument("--system", help="system message")
        parser.add_argument("--stream", action="store_true", help="show the answer as it is made")
    if command == "eval":
        parser.add_argument("--data", "-d", required=True, help="held-out rows in any format that training reads")
    if command in ("eval", "compare"):
        parser.add_argument("--max-length", type=int, help="longest example in tokens (default: the model's limit)")
    if command == "generate":
        decoding_arguments(parser, str(NEW_TOKENS))
        parser.add_argument("--seed", type=int, default=0, help="seed for sampling")
    if command == "compare":
        decoding_arguments(parser, "as in the run, else 64")
        parser.add_argument("--seed", type=int, help="seed for sampling and for which rows are asked (default: as in the run)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="number format (default: by machine)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def decoding_arguments(parser: argparse.ArgumentParser, usual: str) -> None:
    """The flags that say how answers are produced; see `decoding`. `usual` says how many tokens where none are named."""
    known = GenerationSection.model_fields
    parser.add_argument("--max-new-tokens", type=int, help=f"longest answer in tokens (default {usual})")
    parser.add_argument("--temperature", type=float, help="0 always takes the likeliest token (default)")
    parser.add_argument("--top-p", type=float, help="sample from the likeliest tokens of this share")
    parser.add_argument("--top-k", type=int, help=known["top_k"].description)
    parser.add_argument("--repetition-penalty", type=float, help=known["repetition_penalty"].description)
    parser.add_argument("--num-beams", type=int, help="beam search width")


def _compare_arguments(parser: argparse.ArgumentParser) -> None:
    help_text = "the base and the tuned model; one alone is compared with its own base"
    parser.add_argument("models", nargs="*", metavar="MODEL", help=help_text)
    parser.add_argument("--data", "-d", help="rows that neither was trained on (default: the held-out rows of the run)")
    parser.add_argument("--metrics", help="names with commas between them (default: what suits the reference answers)")
    parser.add_argument("--rows", type=int, help="prompts that both answer (default: as in the run, else by the models' size)")
    parser.add_argument("--out", metavar="FOLDER", help="write comparison.md, eval_results.json and eval_results.csv there")
    parser.add_argument("--fail-if-worse", action="store_true", help="exit with 6 where the tuned model is shown to be worse")


def decoding(asked: argparse.Namespace) -> dict[str, Any]:
    """What the flags of `decoding_arguments` ask for. Raises ConfigError for values that cannot be."""
    from llm_finetune_kit.config import RunConfig
    from llm_finetune_kit.settings import changed

    given = {name: value for name in GenerationSection.model_fields if (value := getattr(asked, name)) is not None}
    changed(RunConfig(), {f"evaluation.generation.{name}": value for name, value in given.items()})
    return given


def _which_model(asked: argparse.Namespace) -> str:
    model = asked.model or asked.model_flag
    if not model:
        raise UsageError(2, "no model is named", fix="for example: finetune generate outputs/final --prompt TEXT")
    return checked_model(model)


def checked_model(name: str) -> str:
    """The name of a model, a run or a folder; one that cannot be is told before torch is imported."""
    from llm_finetune_kit.models.locate import check_name
    from llm_finetune_kit.runs import find_result, run_named

    found = find_result(name)
    if not found.is_dir():
        check_name(name)
        if run := run_named(name):
            print(f"note: {name} is the model of that name; the run is {run}", file=sys.stderr)
    elif found.name.startswith("checkpoint-") and Path(name).name != found.name:
        print(f"note: {name} is not finished: its {found.name} is used", file=sys.stderr)
    elif not Path(name).exists():
        print(f"note: {name} means {found}", file=sys.stderr)
    return name


# --- generate ----------------------------------------------------------------------------------------------


def _generate(asked: argparse.Namespace) -> int:
    if asked.model is None and asked.model_flag is None:
        _which_model(asked)
    if (asked.prompt is None) == (asked.prompts is None):
        if asked.prompts is not None:
            raise UsageError(2, "--prompt and --prompts are both given", fix="keep one of them")
        fix = 'for example: finetune generate outputs/final --prompt "How do I reset my password?"'
        raise UsageError(2, "--prompt is missing", fix=fix)
    if asked.stream and (asked.json or asked.prompts):
        raise UsageError(2, "--stream shows one answer as text", fix="leave out --json and --prompts, or --stream")
    if asked.prompt is not None and not asked.prompt.strip():
        raise UsageError(2, "the prompt is empty", fix='write what to ask: --prompt "How do I reset my password?"')
    model, how = _which_model(asked), GenerationSection(**{"max_new_tokens": NEW_TOKENS} | decoding(asked))
    from llm_finetune_kit.data.questions import questions

    prompts = [[{"role": "user", "content": asked.prompt}]] if asked.prompts is None else questions(asked.prompts)
    from llm_finetune_kit import api

    if asked.stream:
        ends: list[Any] = []
        asks = {"system": asked.system, "how": how, "seed": asked.seed, "dtype": asked.dtype, "ended": ends.append}
        for piece in api.stream(model, asked.prompt, **asks):
            print(piece, end="", flush=True)
        print()
        _tell_cut(ends)
        return 0
    given = api.answer_all(model, prompts, system=asked.system, how=how, seed=asked.seed, dtype=asked.dtype)
    texts = [one.text for one in given]
    if asked.json:
        for messages, text in zip(prompts, texts, strict=True):
            print(json.dumps({"prompt": messages[-1]["content"], "answer": text}, ensure_ascii=False))
    elif asked.prompts is None:
        print(texts[0])
    else:
        _print_answers(prompts, texts)
    _tell_cut(given)
    return 0


def _tell_cut(given: Sequence[Any]) -> None:
    """Say below the answers that some did not come to their end; `given` are of `generation.Answer`."""
    sys.stdout.flush()
    cut = [one.tokens for one in given if not one.stopped]
    if cut:
        which = "" if len(given) == 1 else f"{len(cut)} of {len(given)} answers: "
        print(f"note: {which}... (cut at {max(cut)} tokens; --max-new-tokens allows more)", file=sys.stderr)


def _print_answers(asked: list[list[dict[str, Any]]], texts: list[str]) -> None:
    """Each question with its answer below it, apart from the others."""
    from llm_finetune_kit.terminal import show

    for messages, text in zip(asked, texts, strict=True):
        show("> " + " ".join(str(messages[-1]["content"]).split()), style="bold")
        print(f"{text}\n")


# --- eval --------------------------------------------------------------------------------------------------


def _eval(asked: argparse.Namespace) -> int:
    return show_evaluation(_which_model(asked), asked.data, max_length=asked.max_length, dtype=asked.dtype, as_json=asked.json)


def show_evaluation(model: str, data: str, *, max_length: int | None, dtype: str | None, as_json: bool) -> int:
    """Measure a model on data and print what was found."""
    from llm_finetune_kit.config import DataSection
    from llm_finetune_kit.data.prepare import read

    read(data, DataSection())  # a fault in the data is told before torch is imported
    from llm_finetune_kit.evaluation.perplexity import measure

    found = measure(model, data, max_length=max_length, dtype=dtype)
    if as_json:
        print(json.dumps(found, indent=2))
        return 0
    from llm_finetune_kit.terminal import print_table, show_left_out

    heads = ("model", "loss", "perplexity", "bits per byte", "rows", "target tokens")
    print_table(heads, [(name, *_figures(one)) for name, one in found.items()])
    show_left_out(max(int(one["left_out"]) for one in found.values()))
    return 0


def _figures(one: dict[str, float]) -> tuple[Any, ...]:
    numbers = f"{one['loss']:.4f}", f"{one['perplexity']:.2f}", f"{one['bits_per_byte']:.4f}"
    return (*numbers, one["rows"], one["target_tokens"])


# --- compare -----------------------------------------------------------------------------------------------


def _compare(asked: argparse.Namespace) -> int:
    if not 1 <= len(asked.models) <= 2:
        problem = "no model is named" if not asked.models else f"{len(asked.models)} models are named"
        raise UsageError(2, problem, fix="for example: finetune compare outputs/final, or finetune compare gpt2 outputs/final")
    if asked.data is not None:
        from llm_finetune_kit.config import DataSection
        from llm_finetune_kit.data.prepare import read

        read(asked.data, DataSection())
    out = _out(asked.out)
    models = [checked_model(name) for name in asked.models]
    from llm_finetune_kit.api_evaluate import compare_models

    found = compare_models(
        models[0],
        models[1] if len(models) > 1 else None,
        data=asked.data,
        metrics=asked.metrics.split(",") if asked.metrics else None,
        rows=asked.rows,
        how=decoding(asked),
        max_length=asked.max_length,
        dtype=asked.dtype,
        seed=asked.seed,
    )
    if out is not None:
        from llm_finetune_kit.report.write import write_comparison

        write_comparison(out, found)
    if asked.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        from llm_finetune_kit.terminal import print_comparison

        print_comparison(found)
    if asked.fail_if_worse:
        refuse_worse(found)
    return 0


def _out(name: str | None) -> Path | None:
    """The folder for the files of a comparison. Raises UsageError for one that holds a run, whose own files have these names."""
    from llm_finetune_kit.folder import EVENTS

    if name is None:
        return None
    out = Path(name)
    if out.is_file() or (out / EVENTS).exists():
        problem = "it is a file" if out.is_file() else "it is a run, with files of the same names"
        raise UsageError(26, problem, where=f"--out {name}", fix="name a folder of its own")
    return out


def refuse_worse(comparison: dict[str, Any] | None) -> None:
    """Raise TrainingError where a comparison shows that training did harm; one that was not made shows nothing."""
    if comparison is not None and comparison["outcome"] == "worse":
        fix = "keep the base; look at the worst examples in comparison.md, at the data, and at the learning rate"
        raise TrainingError(3, "the tuned model is worse than its base", why=comparison["sentence"], fix=fix)
