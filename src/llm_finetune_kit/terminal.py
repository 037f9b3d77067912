"""How a run looks in a terminal: a listener that turns events into a progress bar, lines and tables.

Plans and results go to stdout, progress to stderr. A terminal that goes away never stops a run.
"""

from __future__ import annotations

import os
import re
import sys
import textwrap
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from llm_finetune_kit import events as said
from llm_finetune_kit.report import compared, words

MOST_LINES, MOST_LETTERS = 8, 500  # of one sample answer; the report holds all of it
WIDE = 120
ANSWER = 90  # letters of an answer that is shown during training
STAGES = {"data": "reading", "answer": "answering", "model": "loading", "best": "going back:", "run": "run folder"}
STAGES |= {"compare": "comparing"}


def show(*things: Any, style: str | None = None) -> None:
    """Print to standard output, as wide as the terminal or, into a file, as WIDE; text is never read as markup.

    Raises OSError where nobody reads any more (rich would end the process).
    """
    from rich.console import Console

    console = Console(file=sys.stdout, width=width(), height=WIDE, markup=False, highlight=False, emoji=False)
    with console.capture() as captured:
        console.print(*things, style=style)
    print(re.sub(r" +$", "", captured.get(), flags=re.MULTILINE), end="", flush=True)


def width(stream: Any = None) -> int:
    """Columns of a stream (standard output if none is named): those of the terminal, or WIDE where it is none."""
    stream = stream or sys.stdout
    try:
        return os.get_terminal_size(stream.fileno()).columns or WIDE
    except (OSError, ValueError, AttributeError):
        return WIDE


def folded(error: object) -> str:
    """An error as it stands, on a terminal with its long lines broken between words."""
    text = str(error)
    if not (sys.stderr and sys.stderr.isatty()):
        return text
    columns = max(40, width(sys.stderr))
    lines = []
    for line in text.split("\n"):
        inside = 8 if line.startswith(("  why:", "  fix:")) else len(line) - len(line.lstrip()) + 2
        how: Any = {"subsequent_indent": " " * inside, "break_on_hyphens": False, "break_long_words": False}
        lines.append(textwrap.fill(line, columns, **how) if len(line) > columns else line)
    return "\n".join(lines)


def print_table(heads: Sequence[str], rows: Sequence[Sequence[Any]], title: str | None = None) -> None:
    """A table that wraps where the terminal is too narrow and cuts nothing off."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, title=title, title_justify="left", title_style="bold")
    names = max((len(str(row[0])) for row in rows), default=0)  # short names are found by eye: they stay in one piece
    for number, head in enumerate(heads):
        table.add_column(Text(head, style="bold"), overflow="fold", no_wrap=number == 0 and 3 * names <= width())
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    show(table)


def print_pairs(pairs: Sequence[tuple[str, str, str]]) -> None:
    """Label, text and a remark on each line; long texts wrap beside their label, not below it."""
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for label, text, remark in pairs:
        grid.add_row(Text(label, style="cyan"), Text(text) + Text(f" ({remark})" if remark else "", style="dim"))
    show(grid)


def print_comparison(comparison: dict[str, Any]) -> None:
    """Base against tuned, a row per metric, and in sentences what it comes to."""
    print_table(compared.HEAD, compared.table(comparison))
    rows = comparison["rows"]
    show(f"answers to {rows['answered']:,} of {rows['of']:,} held-out prompts: {rows['why']}", style="dim")
    show_left_out(rows.get("left_out", 0))
    show()
    show(comparison["sentence"], style="bold")
    show(comparison["general"]["sentence"])


def show_left_out(rows: int) -> None:
    """How many rows could not be measured, if any."""
    if rows:
        show(f"{rows:,} more rows are left out: their prompts alone are longer than the model reads", style="dim")


def drop_closed_streams() -> None:
    """Send to nowhere what can be written no more: a pipe into `head`, a terminal that was closed."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            with suppress(OSError, ValueError, AttributeError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)


class Terminal:
    """Listens to a run. On a terminal it draws a bar; anywhere else it writes plain lines."""

    def __init__(self, *, goes_on: int | None = None) -> None:
        """`goes_on` is the step after which a run goes on whose decisions were shown when it began."""
        self.goes_on = goes_on
        self.live = bool(sys.stderr and sys.stderr.isatty())
        self.bar: Any = None
        self.plan: dict[str, Any] = {}
        self.every = 1
        self.step = 0
        self.tokens, self.seconds = 0, 0.0  # of the steps that were heard
        self.samples: dict[str, list[said.Sampled]] = {}
        self.folder = ""
        self.finished = False
        self.before: float | None = None  # held-out loss of the untrained model
        self.comparison: dict[str, Any] | None = None
        self.training = False
        self.profile: said.Profiled | None = None

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._shut_bar()
        if kind is None and self.finished and self.folder:
            self._safely(self._where_it_is)

    def __call__(self, event: said.Event) -> None:
        tell = getattr(self, f"_{type(event).__name__.lower()}", None)
        if tell is not None:
            self._safely(tell, event)

    def _safely(self, tell: Any, *arguments: Any) -> None:
        try:
            tell(*arguments)
        except OSError:
            drop_closed_streams()

    def line(self, text: str) -> None:
        """One message that does not break the bar; on a terminal it wraps between words."""
        if self.live:
            columns, lines = max(40, width(sys.stderr)), text.split("\n")
            text = "\n".join(textwrap.fill(one, columns, subsequent_indent="  ", break_on_hyphens=False) for one in lines)
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def _stage(self, event: said.Stage) -> None:
        self.training = event.name == "train"
        if event.name == "run":
            self.folder = event.detail
        if event.name == "plan":
            self.line("planning")
        elif event.name != "train":
            self.line(f"{STAGES.get(event.name, event.name)} {event.detail}".rstrip())
        elif self.live:
            self._open_bar()
        else:
            self.line(f"training {event.detail}")

    def _planned(self, event: said.Planned) -> None:
        self.plan = plan = event.plan
        self.every = plan["config"]["training"]["logging_steps"]
        choices = plan["choices"] if self.goes_on is None else []
        pairs = [(choice["knob"], words.value(choice["value"]), choice["reason"]) for choice in choices]
        parts = sorted(plan["memory"].items(), key=lambda part: -part[1])
        memory = ", ".join(f"{name} {words.size(size)}" for name, size in parts if size >= 1e6)
        work = f"{plan['steps']:,} steps of {plan['examples_per_step']} examples"
        need = f"about {words.size(plan['peak_memory'])} of {words.size(plan['available_memory'])} free"
        pairs += [("work", work, f"{plan['trained_parameters']:,} trained weights"), ("memory", need, memory)]
        pairs += _time_and_cost(plan, self.goes_on or 0)
        show(f"Plan for {plan['machine']}", style="bold")
        print_pairs(pairs)

    def _warned(self, event: said.Warned) -> None:
        self.line(f"warning: {event.message}" + (f"\n  fix: {event.fix}" if event.fix else ""))

    def _noted(self, event: said.Noted) -> None:
        self.line(f"note: {event.message}")

    def _resumed(self, event: said.Resumed) -> None:
        self.step = event.step
        self.line(f"going on after step {event.step} from {event.checkpoint}" if event.checkpoint else "beginning again")

    def _stepped(self, event: said.Stepped) -> None:
        self.step = event.step
        self.tokens, self.seconds = self.tokens + event.tokens, self.seconds + event.seconds
        speed = self.tokens / max(self.seconds, 1e-9)  # since training began: what the last line says too
        if self.live:
            self._open_bar()
            self.bar.set_postfix_str(f"loss {event.loss:.3f}, {speed:,.0f} tokens/s", refresh=False)
            self.bar.update(event.step - self.bar.n)
        elif event.step % self.every == 0 or event.step == event.total_steps:
            self.line(
                f"step {event.step}/{event.total_steps}  epoch {event.epoch:.2f}  loss {event.loss:.4f}  "
                f"lr {event.learning_rate:.2e}  grad norm {event.gradient_norm:.3f}  {speed:,.0f} tokens/s"
            )

    def _open_bar(self) -> None:
        if self.bar is None:
            from tqdm import tqdm

            self.bar = tqdm(total=self.plan.get("steps"), initial=self.step, unit="step", dynamic_ncols=True, file=sys.stderr)

    def _shut_bar(self) -> None:
        bar, self.bar = self.bar, None
        if bar is not None:
            self._safely(bar.close)

    def _evaluated(self, event: said.Evaluated) -> None:
        self.before = event.loss if event.step == 0 else self.before
        best = "best so far" if self.before is None or event.loss < self.before else "best of this training, worse than before it"
        mark = f"  {best}" if event.best and event.step else ""
        self.line(
            f"step {event.step}: held-out loss {words.loss(event.loss)}, perplexity {words.perplexity(event.perplexity)}{mark}"
        )

    def _sampled(self, event: said.Sampled) -> None:
        """Answers before and after training are shown at the end; those in between in a line, of the first prompt alone."""
        first = not self.samples or event.prompt == next(iter(self.samples))
        self.samples.setdefault(event.prompt, []).append(event)
        if self.training and first:
            self.line(f"step {event.step} answers: {textwrap.shorten(event.answer, ANSWER, placeholder=' …') or '(nothing)'}")

    def _compared(self, event: said.Compared) -> None:
        self.comparison = event.comparison

    def _profiled(self, event: said.Profiled) -> None:
        self.profile = event

    def _saved(self, event: said.Saved) -> None:
        if event.folder == "final":
            self.line(f"saved final/ ({words.size(event.size_bytes)})")

    def _finished(self, event: said.Finished) -> None:
        self.finished = True
        self._shut_bar()
        summary = event.summary
        asked = self.plan.get("config", {}).get("evaluation", {}).get("prompts")
        pairs = [answers for answers in self.samples.values() if len(answers) > 1]
        for answers in pairs if asked else pairs[:1]:
            _print_sample(answers[0], answers[-1])
        show()
        if self.comparison is not None:
            print_comparison(self.comparison)
            show()
        elif summary.get("loss_after") is not None:
            print_table(
                ("held-out rows", "before", "after"),
                [
                    (name, say(summary[f"{name}_before"]), say(summary[f"{name}_after"]))
                    for name, say in (("loss", words.loss), ("perplexity", words.perplexity))
                ],
            )
            show()
        if self.profile is not None:
            _print_profile(self.profile)
            show()
        speed, planned = summary["tokens_per_second"], (self.plan.get("time") or {}).get("tokens_per_second")
        took = f"{summary['tokens']:,} tokens in {words.duration(summary['seconds'])} of training ({speed:,.0f} tokens/s"
        steps = f"{event.step:,} steps"
        if event.reason == "no improvement":
            steps = (
                f"stopped early at {event.step:,} of {self.plan.get('steps', event.step):,} (training.early_stopping_patience)"
            )
        show(f"{event.reason}: {steps}, {took}{f', planned {planned:,.0f}' if planned else ''})")
        peak = summary.get("measured", {}).get("peak_memory", {})
        if peak.get("predicted"):
            show(f"peak memory {words.size(peak['measured'])}, planned {words.size(peak['predicted'])}")

    def _failed(self, event: said.Failed) -> None:
        self._shut_bar()
        if event.resume and "finetune resume" not in event.fix:  # which says it already
            self.line(f"what was saved can go on: finetune resume {self.folder}")

    def _where_it_is(self) -> None:
        pairs = [("report", f"{self.folder}/report.html", ""), ("model", f"{self.folder}/final", "")]
        print_pairs([*pairs, ("try it", f'finetune generate {self.folder} --prompt "…"', "")])


def _time_and_cost(plan: dict[str, Any], done: int) -> list[tuple[str, str, str]]:
    """How long it takes from step `done` on, what it costs, what it writes, and what would make it fit."""
    pairs, share = [], 1.0
    if time := plan.get("time"):
        left = 1 - done / max(1, plan["steps"])
        spent = {"training": left, "evaluation": left, "saving": left, "answers": 0.5 if done else 1.0}
        each = {name: spent.get(name, 1.0) * time[name] for name in ("training", "evaluation", "answers", "saving", "start")}
        share = sum(each.values()) / max(1e-9, time["total"]) if done else 1.0
        told = ", ".join(f"{name} {words.duration(seconds)}" for name, seconds in each.items())
        after = f"{plan['steps'] - done:,} of {plan['steps']:,} steps are left; " if done else ""
        speed = f"training at {time['tokens_per_second']:,.0f} tokens/s, {time['source']}"
        about = f"about {words.duration(share * time['total'])}"
        pairs.append(("time left" if done else "time", about, f"{after}{told}; {speed}"))
    if cost := plan.get("cost"):
        rate = f"{words.duration(3600 * share * cost['hours'])} at ${cost['price_per_hour']:.2f} an hour, {cost['source']}"
        dollars = share * cost["total"]
        pairs.append(("cost", f"about ${dollars:.2f}" if dollars >= 0.01 else "less than $0.01", rate))
    if disk := plan.get("disk"):
        parts = ", ".join(f"{name} {words.size(size)}" for name, size in disk.items())
        pairs.append(("disk", f"up to {words.size(sum(disk.values()))}", parts))
    return pairs + [("to make it fit", edit, "") for edit in plan.get("edits") or ()]


def _print_profile(profile: said.Profiled) -> None:
    parts = sorted(profile.parts.items(), key=lambda part: -part[1])
    rows = [(name, f"{1e3 * part:.1f}", f"{part / profile.seconds:.0%}") for name, part in parts]
    print_table((f"a step, mean of {profile.steps}", "ms", "share"), [*rows, ("all", f"{1e3 * profile.seconds:.1f}", "")])
    rate = f"matrix products made {profile.products_per_second / 1e9:,.0f} GFLOP/s"
    show(f"{rate}; watching costs time, so other steps are faster", style="dim")


def _print_sample(before: said.Sampled, after: said.Sampled) -> None:
    show()
    texts = {"prompt": " ".join(after.prompt.split()), "before": before.answer, "after": after.answer, "wanted": after.reference}
    print_pairs([(label, _clip(text), "") for label, text in texts.items() if text])


def _clip(text: str) -> str:
    lines = [line.rstrip() for line in text.strip().split("\n")]
    short = "\n".join(lines[:MOST_LINES])[:MOST_LETTERS]
    return short if len(short) >= len("\n".join(lines)) else f"{short.rstrip()} …"
