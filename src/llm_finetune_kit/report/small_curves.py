"""Learning rate, gradient norm, speed and memory over the steps, as small pictures of one kind."""

from __future__ import annotations

import math
from collections.abc import Callable

from markupsafe import Markup

from llm_finetune_kit.events import Stepped
from llm_finetune_kit.report.curve import ticks

WIDTH, HEIGHT = 300, 150
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 22
MOST_POINTS = 300

GB = 1e9
MEMORY = "Memory (GB)"
Value = Callable[[Stepped], float]
CURVES: tuple[tuple[str, str, Value], ...] = (
    (
        "Learning rate",
        "How far each step moves the weights: it rises during warm-up and falls towards the end, so that the result settles.",
        lambda event: event.learning_rate,
    ),
    (
        "Gradient norm",
        "How strongly the data pull at the weights; single spikes are rows that surprise it, steady growth is a bad sign.",
        lambda event: event.gradient_norm,
    ),
    (
        "Tokens per second",
        "How fast it learns; falling speed means that the machine was busy, hot or short of memory.",
        lambda event: event.tokens / max(event.seconds, 1e-9),
    ),
    (
        MEMORY,
        "What the program held after each step: it should settle, as steady growth ends badly. Dashed: the planned peak, "
        "which is reached inside a step.",
        lambda event: event.memory / GB if event.memory is not None else math.nan,
    ),
)


def small_curves(steps: list[Stepped], planned: float | None = None) -> list[tuple[str, str, Markup]]:
    """Name, explanation and picture of each, none without steps; `planned` is the plan's peak memory in bytes."""
    drawn = []
    for name, meaning, value in CURVES:
        line = planned / GB if planned and name == MEMORY else None
        drawn.append((name, meaning, _svg(name, [(event.step, value(event)) for event in steps], line)))
    return [one for one in drawn if one[2]]


def _svg(name: str, points: list[tuple[int, float]], planned: float | None = None) -> Markup:
    points = [(step, value) for step, value in points if math.isfinite(value)]
    if not points:
        return Markup("")
    first, last = points[0][0], max(points[-1][0], points[0][0] + 1)
    high = max([planned or 0.0, *(value for _, value in points)]) * 1.05 or 1.0

    def place(step: int, value: float) -> str:
        x = LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT)
        y = TOP + (1 - max(value, 0.0) / high) * (HEIGHT - TOP - BOTTOM)
        return f"{x:.1f} {y:.1f}"

    stride = -(-len(points) // MOST_POINTS)
    chosen = [point for index, point in enumerate(points) if index % stride == 0 or index == len(points) - 1]
    bottom = HEIGHT - BOTTOM
    parts = []
    for value in ticks(0, high, 3):
        y = place(first, value).split()[1]
        parts.append(f'<path class="grid" d="M{LEFT} {y}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{float(y) + 4:.1f}" text-anchor="end">{_short(value)}</text>')
    for step, side in ((first, "start"), (last, "end")):
        parts.append(f'<text x="{place(step, 0).split()[0]}" y="{HEIGHT - 6}" text-anchor="{side}">{step}</text>')
    line = "L".join(place(*point) for point in chosen)
    parts.append(f'<path class="axis" d="M{LEFT} {bottom}H{WIDTH - RIGHT}"/><path class="smooth" d="M{line}"/>')
    if planned is not None:
        y = place(first, planned).split()[1]
        parts.append(f'<path class="planned" d="M{LEFT} {y}H{WIDTH - RIGHT}"/>')
    if len(chosen) == 1:
        x, y = place(*chosen[0]).split()
        parts.append(f'<circle class="dot" cx="{x}" cy="{y}" r="3"/>')
    final = _short(points[-1][1])
    label = f"{name} from step {first} to {points[-1][0]}: {_short(points[0][1])} at first, {final} at last"
    label += f", {_short(planned)} planned" if planned is not None else ""
    return Markup(f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>')


def _short(value: float) -> str:
    if value >= 1000:
        return f"{value / 1000:g}k" if value % 100 == 0 else f"{value:,.0f}"
    return f"{value:.3g}" if value == 0 or value >= 0.001 else f"{value:.0e}".replace("e-0", "e-")
