"""How a run looks in a terminal: a listener that turns events into a progress bar, lines and tables."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from llm_finetune_kit import events as said


def print_table(heads: Sequence[str], rows: Sequence[Sequence[Any]], title: str | None = None) -> None:
    """A table that fits the terminal's width."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*heads, title=title, title_justify="left", header_style="bold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    Console().print(table)


class Terminal:
    """Listens to a run. On a terminal it draws a bar; anywhere else it writes plain lines."""

    def __init__(self) -> None:
        self.live = sys.stderr.isatty()
        self.every = 1
        self.bar: Any = None
        self.samples: dict[str, list[said.Sampled]] = {}
        self.first_evaluation: said.Evaluated | None = None
        self.last_evaluations: dict[int, said.Evaluated] = {}
        self.folder = ""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: Any) -> None:
        if self.bar is not None:
            self.bar.close()

    def __call__(self, event: said.Event) -> None:
        show = getattr(self, f"_{type(event).__name__.lower()}", None)
        if show is not None:
            show(event)

    def line(self, text: str) -> None:
        """One line that does not break the bar."""
        if self.bar is not None and self.live:
            self.bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def _stage(self, event: said.Stage) -> None:
        names = {
            "data": "reading",
            "plan": "planning for",
            "model": "loading",
            "train": "training",
            "best": "keeping",
            "run": "run folder",
        }
        self.line(f"{names.get(event.name, event.name)} {event.detail}")

    def _planned(self, event: said.Planned) -> None:
        plan = event.plan
        self.every = plan["config"]["training"]["logging_steps"]
        rows = [(choice["knob"], _short(choice["value"]), choice["reason"]) for choice in plan["choices"]]
        print_table(("setting", "value", "why"), rows, title=f"Plan for {plan['machine']}")
        parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in plan["memory"].items())
        print(
            f"{plan['steps']} steps of {plan['examples_per_step']} examples, {plan['trained_parameters']:,} trained weights\n"
            f"memory: about {plan['peak_memory'] / 1e9:.2f} GB of {plan['available_memory'] / 1e9:.1f} GB free ({parts})",
            flush=True,
        )

    def _warned(self, event: said.Warned) -> None:
        self.line(f"warning: {event.message}" + (f"\n  fix: {event.fix}" if event.fix else ""))

    def _resumed(self, event: said.Resumed) -> None:
        self.line(f"going on after step {event.step} from {event.checkpoint}")

    def _stepped(self, event: said.Stepped) -> None:
        speed = event.tokens / max(event.seconds, 1e-9)
        if self.live:
            self._advance(event, speed)
        elif event.step % self.every == 0 or event.step == event.total_steps:
            print(
                f"step {event.step}/{event.total_steps}  epoch {event.epoch:.2f}  loss {event.loss:.4f}  "
                f"lr {event.learning_rate:.2e}  grad norm {event.gradient_norm:.3f}  {speed:,.0f} tokens/s",
                file=sys.stderr,
                flush=True,
            )

    def _advance(self, event: said.Stepped, speed: float) -> None:
        if self.bar is None:
            from tqdm import tqdm

            self.bar = tqdm(total=event.total_steps, initial=event.step - 1, unit="step", dynamic_ncols=True, leave=True)
        self.bar.set_postfix_str(f"loss {event.loss:.3f}, {speed:,.0f} tokens/s", refresh=False)
        self.bar.update(event.step - self.bar.n)

    def _evaluated(self, event: said.Evaluated) -> None:
        if event.step == 0:
            self.first_evaluation = event
        self.last_evaluations[event.step] = event
        mark = "  best" if event.best and event.step else ""
        self.line(f"step {event.step}: held-out loss {event.loss:.4f}, perplexity {event.perplexity:.2f}{mark}")

    def _sampled(self, event: said.Sampled) -> None:
        self.samples.setdefault(event.prompt, []).append(event)

    def _saved(self, event: said.Saved) -> None:
        if event.folder == "final":
            self.line(f"saved final/ ({event.size_bytes / 1e6:.1f} MB)")

    def _finished(self, event: said.Finished) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        summary = event.summary
        for prompt, answers in self.samples.items():
            if len(answers) > 1:
                _print_pair(prompt, answers[0].answer, answers[-1].answer, answers[-1].reference)
        after = self.last_evaluations.get(summary.get("final_step", event.step))
        if self.first_evaluation is not None and after is not None:
            before = self.first_evaluation
            print_table(
                ("held-out rows", "before", "after"),
                [
                    ("loss", f"{before.loss:.4f}", f"{after.loss:.4f}"),
                    ("perplexity", f"{before.perplexity:.2f}", f"{after.perplexity:.2f}"),
                ],
            )
        print(
            f"{event.reason}: {event.step} steps, {summary['tokens']:,} tokens in {summary['seconds']:.1f} s "
            f"({summary['tokens_per_second']:,.0f} tokens/s)",
            flush=True,
        )


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return text if len(text) <= 48 else text[:45] + "…"


def _print_pair(prompt: str, before: str, after: str, reference: str) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console()
    console.print()
    for label, words, style in (
        ("prompt", prompt, "bold"),
        ("before", before, "dim"),
        ("after", after, ""),
        ("wanted", reference, "italic"),
    ):
        if words:
            console.print(Text(f"{label + ':':<9}", style="cyan") + Text(words.replace("\n", "\n         "), style=style))
