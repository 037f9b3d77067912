"""The page and the picture of a scaling run, from its points alone."""

from __future__ import annotations

import io
import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from report import NOISY, spread

SETTLED = 20  # steps after which a long run has its usual size
SPEED, MEMORY, INK = "#4c78a8", "#e4572e", "#33373d"
AXES = {"rows": "rows of 128 tokens a step", "length": "tokens of a document", "model": "model", "threads": "threads"}
TITLES = {
    "rows": "GPT-2 124M",
    "length": "SmolLM2-135M, 2,048 tokens a step",
    "model": "Models, 4 rows of 128 tokens a step",
    "threads": "Threads, 4 rows of 128 tokens a step",
}

Panels = dict[str, list[dict[str, Any]]]
Found = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Seen:
    """All repeats of one point."""

    point: dict[str, Any]
    speeds: list[float]  # tokens a second
    peaks: list[float]  # MiB

    @property
    def speed(self) -> float:
        return statistics.median(self.speeds)

    @property
    def peak(self) -> float:
        return statistics.median(self.peaks)

    def label(self, panel: str) -> str:
        """What tells it from the other points of the panel."""
        if panel == "threads":
            return f"{self.point['model']}, {self.point['threads']}"
        return str(self.point[panel])


def seen_of(point: dict[str, Any], found: Found) -> Seen:
    """The repeats of a point, wherever else it stands too."""
    mine = [one for one in found.values() if point.items() <= one.items()]
    return Seen(point, [one["tokens_per_second"] for one in mine], [one["peak_mib"] for one in mine])


def growth(held: list[float], settled: int = SETTLED) -> float:
    """Slope of a straight line through what was held after each step past `settled`, per 100 steps."""
    steps = np.arange(len(held))[settled:]
    return float(100 * np.polyfit(steps, held[settled:], 1)[0])


def page(facts: dict[str, Any], panels: Panels, found: Found) -> str:
    """The Markdown page."""
    lines = ["# How speed and memory go with rows, length, model and threads", "", "![four panels](scaling.svg)", ""]
    for panel, points in panels.items():
        lines += [f"**{TITLES[panel]}**", "", *table(panel, [seen_of(point, found) for point in points]), ""]
    lines += [
        long_run(found["long run"]),
        *(preparation(found[key]) for key in ("preparation", "preparation of many") if key in found),
    ]
    noisy = [key for key, one in found.items() if one["foreign_load"] > NOISY]
    if noisy:
        lines.append(f"- others kept more than {NOISY} cores busy: **not a record**: {', '.join(noisy)}")
    described = facts["machine"]
    lines += [
        "- Every point is a process of its own; its tokens are random and all learned. Medians of all repeats (least..most). "
        "Peak memory counts mapped weight files.",
        f"- Machine: {described['cpu']}, {described['cores']} cores, {', '.join(described['flags'])}, "
        f"{described['memory_gib']} GiB.",
        f"- {facts['date']}: `{facts['command']}`",
    ]
    return "\n".join(lines) + "\n"


def table(panel: str, seen: list[Seen]) -> list[str]:
    """Tokens a second and peak memory of a panel's points."""
    rows = [f"| {one.label(panel)} | {one.speed:,.0f} | {spread(one.speeds, ',.0f')} | {one.peak:,.0f} |" for one in seen]
    return [f"| {AXES[panel]} | tokens/s | repeats | peak memory, MiB |", "|---|---|---|---|", *rows]


def long_run(found: dict[str, Any]) -> str:
    held = found["held_mib"]
    settled = min(SETTLED, len(held) // 2)
    return (
        f"- {len(held)} steps of the demo model on Alpaca, four rows a step: {held[0]:.0f} MiB held after the first step, "
        f"{held[settled]:.0f} after {settled + 1}, {held[-1]:.0f} at the end, {max(held):.0f} at most. A line through the steps "
        f"from {settled + 1} on rises by {growth(held, settled):+.1f} MiB per 100 steps."
    )


def preparation(found: dict[str, Any]) -> str:
    return (
        f"- {found['rows']:,} rows ({found['file_mb']:.0f} MB) read, understood, tokenized, split and checked: "
        f"{found['seconds']:.1f} s, peak {found['peak_mib']:,.0f} MiB, {found['examples']:,} examples."
    )


def picture(panels: Panels, found: Found) -> str:
    """Four panels as SVG: tokens a second on the left, peak memory on the right."""
    figure = Figure(figsize=(11, 7.5), layout="constrained", facecolor="white")
    for axes, (panel, points) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        draw(axes, panel, [seen_of(point, found) for point in points])
    out = io.StringIO()
    with rc_context({"svg.hashsalt": "scaling", "svg.fonttype": "none"}):
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None})
    return out.getvalue()


def draw(axes: Axes, panel: str, seen: list[Seen]) -> None:
    axes.set_title(TITLES[panel], loc="left", color=INK, fontsize=12, pad=10)
    axes.set_xlabel(AXES[panel], color=INK)
    axes.set_xticks(range(len(seen)), [one.label(panel) for one in seen])
    memory = axes.twinx()
    joined = panel in ("rows", "length")
    _series(axes, [one.speeds for one in seen], SPEED, "tokens/s", joined)
    _series(memory, [one.peaks for one in seen], MEMORY, "peak memory, MiB", joined)
    if joined:
        axes.set_ylim(0, 1.15 * axes.get_ylim()[1])
    else:  # models differ a hundredfold
        axes.set_yscale("log")
        for form in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            form(LogFormatter(minor_thresholds=(2, 0.5)))
    memory.set_ylim(0, 1.15 * memory.get_ylim()[1])


def _series(axes: Axes, repeats: list[list[float]], colour: str, name: str, joined: bool) -> None:
    """The median of each point's repeats, with a bar from the least to the most."""
    middle = [statistics.median(values) for values in repeats]
    below = [at - min(values) for at, values in zip(middle, repeats, strict=True)]
    above = [max(values) - at for at, values in zip(middle, repeats, strict=True)]
    style = {"color": colour, "marker": "o", "linestyle": "-" if joined else "none", "capsize": 3}
    axes.errorbar(range(len(repeats)), middle, yerr=[below, above], **style)
    axes.set_ylabel(name, color=colour)
    axes.spines["top"].set_visible(False)
