"""From measured runs and gate verdicts to one table, for the terminal and for Markdown."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from gate import Verdict

NOISY = 0.5  # cores kept busy by others above which a figure is not a record


@dataclass(frozen=True)
class Run:
    """One child process: what it wrote, and the gate's verdict (none when it did not finish)."""

    contender: str
    round: int
    result: dict[str, Any] | None
    verdict: Verdict | None
    foreign_load: float
    error: str = ""

    @property
    def comparable(self) -> bool:
        return self.verdict is not None and not self.verdict.faults

    def per_second(self, tokens: str) -> float:
        assert self.result is not None
        return float(self.result[tokens] / sum(self.result["seconds"]))


def of(runs: list[Run], contender: str) -> list[Run]:
    return [run for run in runs if run.contender == contender]


def comparable(runs: list[Run]) -> bool:
    return bool(runs) and all(run.comparable for run in runs)


def paired_ratios(runs: list[Run], base: str, contender: str) -> list[float]:
    """How many times the real tokens/s of `contender` the base reached, round by round."""
    rounds = {run.round: run.per_second("real_tokens") for run in of(runs, contender)}
    return [run.per_second("real_tokens") / rounds[run.round] for run in of(runs, base)]


HEADER = [
    "contender", "real tok/s", "rounds", "supervised tok/s", "step p50 / p95 s", "positions per token",
    "peak RSS MiB", "first step s", "MFU", "{base} is faster by", "first loss off by", "update cosine",
]  # fmt: skip


def row(runs: list[Run], contender: str, base: str, flops_per_token: float, gemm: float) -> list[str]:
    """One line of the table; a contender that failed the gate gets its reasons and no speed."""
    mine = of(runs, contender)
    if not comparable(mine):
        return [contender, "not comparable", *["-"] * (len(HEADER) - 2)]
    results = [run.result for run in mine if run.result]
    verdicts = [run.verdict for run in mine if run.verdict]
    speeds = [run.per_second("real_tokens") for run in mine]
    seconds = sorted(second for result in results for second in result["seconds"])
    speed = statistics.median(speeds)
    return [
        contender,
        f"{speed:.0f}",
        spread(speeds, ".0f"),
        f"{statistics.median(run.per_second('supervised_tokens') for run in mine):.0f}",
        f"{quantile(seconds, 0.5):.2f} / {quantile(seconds, 0.95):.2f}",
        f"{results[0]['positions'] / results[0]['real_tokens']:.2f}",
        f"{statistics.median(result['peak_rss_mib'] for result in results):.0f}",
        f"{statistics.median(result['time_to_first_step'] for result in results):.1f}",
        f"{speed * flops_per_token / gemm / 1e9:.1%}",
        ratio(runs, base, contender),
        f"{max(verdict.first_loss_error for verdict in verdicts):.1e}",
        f"{min(verdict.cosine for verdict in verdicts):.4f}",
    ]


def ratio(runs: list[Run], base: str, contender: str) -> str:
    if contender == base or not comparable(of(runs, base)):
        return "-"
    ratios = paired_ratios(runs, base, contender)
    return f"{statistics.median(ratios):.2f}x ({spread(ratios, '.2f')})"


def spread(values: list[float], form: str) -> str:
    return f"{min(values):{form}}..{max(values):{form}}"


def quantile(ordered: list[float], share: float) -> float:
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def table(rows: list[list[str]], base: str) -> str:
    """A Markdown table padded so that it also reads well as plain text."""
    header = [cell.format(base=base) for cell in HEADER]
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in [header, *rows]]
    rule = " | ".join("-" * width for width in widths)
    return "\n".join(f"| {line} |" for line in [lines[0], rule, *lines[1:]])


def notes(runs: list[Run]) -> list[str]:
    """Everything a reader must know before trusting the table."""
    found = []
    for run in runs:
        where = f"{run.contender}, round {run.round}"
        if run.verdict is None:
            found.append(f"{where}: did not finish: {run.error}")
        elif run.verdict.faults:
            found.append(f"{where}: not comparable: {'; '.join(run.verdict.faults)}")
        if run.foreign_load > NOISY:
            found.append(f"{where}: others kept {run.foreign_load:.2f} cores busy: **not a record**")
    return found
