"""The loss curve as SVG inside the page: its colours are CSS classes, so it follows the reader's light or dark."""

from __future__ import annotations

import math
from dataclasses import dataclass

from markupsafe import Markup

from llm_finetune_kit.report.figures import Figures, Point

MOST_POINTS = 400  # a line has no more than this; more cannot be seen
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 26, 40


@dataclass(frozen=True)
class Frame:
    """From steps and losses to places in the picture."""

    width: int
    height: int
    steps: tuple[float, float]
    losses: tuple[float, float]

    def x(self, step: float) -> float:
        first, last = self.steps
        return round(LEFT + (step - first) / (last - first) * (self.width - LEFT - RIGHT), 1)

    def y(self, loss: float) -> float:
        low, high = self.losses
        return round(TOP + (high - min(max(loss, low), high)) / (high - low) * (self.height - TOP - BOTTOM), 1)


def loss_svg(found: Figures, width: int, height: int) -> Markup:
    """The curve in a given size, or nothing where no loss was recorded."""
    held_out = [Point(event.step, event.loss) for event in found.held_out if math.isfinite(event.loss)]
    losses = [point.loss for point in [*held_out, *_without_outliers(found.train)] if math.isfinite(point.loss)]
    if not losses:
        return Markup("")
    margin = max(0.06 * (max(losses) - min(losses)), 0.01)
    frame = Frame(width, height, (0, max(1, found.last_step)), (max(0.0, min(losses) - margin), max(losses) + margin))
    parts = [
        *_axes(frame),
        _line(frame, found.train, "each"),
        _line(frame, found.smooth, "smooth"),
        _line(frame, held_out, "held"),
        *(f'<circle class="point" cx="{frame.x(point.step)}" cy="{frame.y(point.loss)}" r="3.5"/>' for point in held_out),
        *_kept(frame, found, held_out),
    ]
    label = f"Loss over {found.last_step} steps, training and held out"
    return Markup(f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>')


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers between two values."""
    rough = (high - low) / max(1, count)
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 10) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _axes(frame: Frame) -> list[str]:
    right, bottom = frame.width - RIGHT, frame.height - BOTTOM
    parts = []
    for loss in ticks(*frame.losses, 5):
        y = frame.y(loss)
        parts.append(
            f'<path class="grid" d="M{LEFT} {y}H{right}"/><text x="{LEFT - 7}" y="{y + 4}" text-anchor="end">{loss:g}</text>'
        )
    for step in ticks(*frame.steps, frame.width // 90):
        if step == int(step):
            parts.append(f'<text x="{frame.x(step)}" y="{bottom + 17}" text-anchor="middle">{int(step)}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {bottom}H{right}"/>')
    parts.append(f'<text class="name" x="{right}" y="{frame.height - 5}" text-anchor="end">optimizer step</text>')
    parts.append('<text class="name" x="4" y="12">loss (nats per learned token)</text>')
    return parts


def _line(frame: Frame, points: list[Point], kind: str) -> str:
    stride = -(-len(points) // MOST_POINTS) if points else 1
    chosen = [point for index, point in enumerate(points) if index % stride == 0 or index == len(points) - 1]
    places = [f"{frame.x(point.step)} {frame.y(point.loss)}" for point in chosen if math.isfinite(point.loss)]
    if len(places) == 1:
        places.append(places[0])  # with round line ends this is a dot
    return f'<path class="{kind}" d="M{"L".join(places)}"/>' if places else ""


def _kept(frame: Frame, found: Figures, held_out: list[Point]) -> list[str]:
    point = next((point for point in held_out if point.step == found.shown), None)
    if point is None:
        return []
    x, y = frame.x(point.step), frame.y(point.loss)
    side, shift = ("end", -8) if x > frame.width / 2 else ("start", 8)
    word = "kept" if found.kept is not None else "best so far"
    return [
        f'<path class="kept" d="M{x} {TOP}V{frame.height - BOTTOM}"/><circle class="kept" cx="{x}" cy="{y}" r="8"/>',
        f'<text class="mark" x="{x + shift}" y="{TOP + 12}" text-anchor="{side}">{word}: step {point.step}</text>',
    ]


def _without_outliers(points: list[Point]) -> list[Point]:
    """Single wild steps must not flatten the rest of the picture; they are drawn at its edge."""
    if len(points) < 50:
        return points
    ordered = sorted(points, key=lambda point: point.loss)
    cut = len(points) // 100
    return ordered[cut : len(ordered) - cut]
