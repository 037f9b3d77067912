"""`finetune data …`: check, preview, convert and the cache. Holds no logic of its own."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llm_finetune_kit.arguments import Parser, file_and_config
from llm_finetune_kit.cli_texts import EXAMPLES, parser_of
from llm_finetune_kit.errors import DataError, UsageError, nearest

COMMANDS = {
    "check": "look for what would spoil training: faults, copies, leaks, secrets",
    "preview": "show what the model would see and learn, token by token",
    "convert": "write the rows in another format or kind of file",
    "cache": "list or clear the tokens kept from earlier runs",
}


def data_command(words: Sequence[str]) -> int:
    """Run `finetune data` with these words and return its exit code."""
    if not words or words[0] in ("-h", "--help"):
        print("usage: finetune data COMMAND FILE [options]\n")
        print("check, preview or convert training data; look at the cache\n\ncommands:")
        print("\n".join(f"  {name:<9} {text}" for name, text in COMMANDS.items()))
        print("\n`finetune data COMMAND --help` tells more.\n\nexamples:")
        print("\n".join(f"  {EXAMPLES[f'data {name}'][-1]}" for name in COMMANDS))
        return 0
    command = words[0]
    if command not in COMMANDS:
        near = nearest(command, list(COMMANDS))
        hint = f"did you mean `finetune data {near[0]}`? " if near else ""
        raise UsageError(1, f"there is no command data {command}", fix=f"{hint}commands: {', '.join(COMMANDS)}")
    handler: Callable[[argparse.Namespace], int] = globals()[f"_{command}"]
    return handler(_parser(command).parse_all(list(words[1:])))


def _parser(command: str) -> Parser:
    parser = parser_of(f"data {command}", COMMANDS[command])
    if command == "cache":
        parser.add_argument("action", nargs="?", choices=["list", "clear"], default="list", help="default: list")
        parser.add_argument("--json", action="store_true", help="print JSON")
        return parser
    help_text = "a data set as in --data of train; settings such as data.format=alpaca"
    parser.add_argument("words", nargs="*", metavar="FILE | data.key=value", help=help_text)
    if command in ("check", "preview"):
        needed = command == "preview"
        parser.add_argument("--model", "-m", required=needed, help="the model whose tokenizer and template count")
        parser.add_argument("--max-length", type=int, help="longest example in tokens (default: the longest, at most the limit)")
        parser.add_argument("--html", metavar="OUT", help="write a page to look at in a browser")
        parser.add_argument("--json", action="store_true", help="print JSON")
    if command == "check":
        parser.add_argument("--eval", metavar="FILE", help="held-out rows: look for training rows that repeat them")
        parser.add_argument("--fix", action="store_true", help="write a cleaned copy to --out; the file itself is never touched")
        parser.add_argument("--out", help="where the cleaned copy goes (JSON lines)")
    if command == "preview":
        parser.add_argument("--count", type=int, default=3, help="examples to show (default 3)")
    if command == "convert":
        parser.add_argument(
            "--to", required=True, metavar="SHAPE", help="messages, sharegpt, alpaca, prompt-response, prompt-completion, text"
        )
        parser.add_argument(
            "--out", required=True, metavar="OUT", help="the file to write: .jsonl, .json, .csv, .tsv, .parquet (also .gz)"
        )
        parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    return parser


# --- check -------------------------------------------------------------------------------------------------


def _check(asked: argparse.Namespace) -> int:
    from llm_finetune_kit.checking import check, cleaned

    if asked.fix != bool(asked.out):
        missing, has = ("--out", "--fix") if asked.fix else ("--fix", "--out")
        raise UsageError(2, f"{has} needs {missing}", fix="for example: --fix --out clean.jsonl")
    file, config = file_and_config(asked.words, "check")
    if asked.fix:
        done = cleaned(file, config, out=Path(asked.out), held_out=asked.eval)
        print(json.dumps(done, indent=2) if asked.json else _fixed_in_words(done, asked.out))
        return 0
    found = check(file, config, held_out=asked.eval, model=asked.model, max_length=asked.max_length)
    if asked.html:
        _write_page(asked.html, found.page())
    if asked.json:
        print(json.dumps(found.to_dict(), indent=2, ensure_ascii=False))
    else:
        _show_check(found)
    return DataError.exit_code if any(one.severity == "error" for one in found.report.findings) else 0


def _show_check(found: Any) -> None:
    from llm_finetune_kit.data.quality import table
    from llm_finetune_kit.terminal import print_table, show

    report = found.report
    facts, findings = table(report)
    print_table(("", ""), [*facts[:1], ("read as", f"{found.format}: {found.why_format}"), *facts[1:]])
    show()
    if findings:
        print_table(("", "finding", "rows", "what to do"), findings)
        show()
    for note in report.notes:
        show(f"note: {note}")
    show(report.verdict, style="bold")


def _fixed_in_words(done: dict[str, Any], out: str) -> str:
    lines = [f"{count:>7,}  {reason}" for reason, count in done["removed"].items() if count]
    lines += [f"{count:>7,}  repaired: {reason}" for reason, count in done["repaired"].items() if count]
    lines += [f"         {line}" for line in done["unreadable"]]
    changes = "\n".join(lines) or "      0  nothing to remove or repair"
    return f"{changes}\n{done['written']:,} of {done['rows']:,} rows are in {out}; the original is as it was"


# --- preview -----------------------------------------------------------------------------------------------


def _preview(asked: argparse.Namespace) -> int:
    from llm_finetune_kit.checking import preview

    file, config = file_and_config(asked.words, "preview")
    found = preview(file, config, model=asked.model, max_length=asked.max_length, count=asked.count)
    if asked.html:
        _write_page(asked.html, found.page())
    if asked.json:
        print(json.dumps(found.to_dict(), indent=2, ensure_ascii=False))
        return 0
    _show_preview(found)
    return 0


def _show_preview(found: Any) -> None:
    from llm_finetune_kit.report.xray_views import heading, legend_text, summary, xray_text
    from llm_finetune_kit.terminal import show

    show(legend_text())
    for example, place in zip(found.examples, found.places, strict=True):
        show()
        show(heading(example, place), style="bold")
        show(xray_text(example))
    show()
    show(summary(found.totals), style="bold")
    for warning in found.warnings:
        show(f"warning: {warning}")
    show(found.verdict)


# --- convert and cache -------------------------------------------------------------------------------------


def _convert(asked: argparse.Namespace) -> int:
    from llm_finetune_kit.checking import converted

    file, config = file_and_config(asked.words, "convert")
    count, notes = converted(file, config, to=asked.to, out=Path(asked.out), overwrite=asked.overwrite)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"{count:,} rows written to {asked.out}")
    return 0


def _cache(asked: argparse.Namespace) -> int:
    from llm_finetune_kit.data import cache
    from llm_finetune_kit.report.words import size

    if asked.action == "clear":
        count, total = cache.clear()
        print(json.dumps({"removed": count, "bytes": total}) if asked.json else f"{count} entries removed, {size(total)} freed")
        return 0
    found = cache.entries()
    if asked.json:
        print(json.dumps([vars(entry) | {"path": str(entry.path)} for entry in found], indent=2))
        return 0
    from llm_finetune_kit.terminal import print_table

    if found:
        rows = [(one.data, f"{one.examples:,}" if one.examples else "", size(one.size_bytes), _day(one.used)) for one in found]
        print_table(("data", "examples", "size", "written"), rows)
    print(f"{len(found)} entries, {size(sum(one.size_bytes for one in found))}, in {cache.cache_home()}")
    return 0


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _write_page(out: str, html: str) -> None:
    from llm_finetune_kit.files import write_whole

    write_whole(Path(out), html)
    print(f"written: {out}", file=sys.stderr)
