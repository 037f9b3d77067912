"""`loss_curve.png`, drawn without a screen."""

from __future__ import annotations

import io
import math

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from llm_finetune_kit.report.figures import Figures

TRAIN, HELD_OUT, KEPT, INK = "#4c78a8", "#e4572e", "#2a7f4f", "#33373d"


def loss_curve(found: Figures, title: str) -> bytes:
    """Train and held-out loss over steps as a PNG, with the kept step marked."""
    figure = Figure(figsize=(8, 4.6), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1), facecolor="white")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", color=INK, fontsize=13, pad=12)
    axes.set_xlabel("optimizer step", color=INK)
    axes.set_ylabel("loss (nats per learned token)", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#b5bac1")
    axes.tick_params(colors=INK)
    axes.grid(color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _draw(axes, found)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, labelcolor=INK)
    else:
        axes.text(0.5, 0.5, "no step was recorded", ha="center", color=INK, transform=axes.transAxes)
    out = io.BytesIO()
    FigureCanvasAgg(figure).print_png(out)
    return out.getvalue()


def _draw(axes: Axes, found: Figures) -> None:
    if found.train:
        steps = [point.step for point in found.train]
        mark = "." if len(steps) < 3 else ""
        axes.plot(
            steps,
            [point.loss for point in found.train],
            color=TRAIN,
            alpha=0.35,
            linewidth=1,
            marker=mark,
            label="train, each step",
        )
        axes.plot(steps, [point.loss for point in found.smooth], color=TRAIN, linewidth=2.2, label="train, smoothed")
    held_out = [event for event in found.held_out if math.isfinite(event.loss)]
    if held_out:
        steps = [event.step for event in held_out]
        losses = [event.loss for event in held_out]
        axes.plot(steps, losses, color=HELD_OUT, linewidth=1.6, marker="o", markersize=5, label="held out")
    kept = next((event for event in held_out if event.step == found.shown), None)
    if kept is not None:
        word = "kept" if found.kept is not None else "best so far"
        axes.axvline(kept.step, color=KEPT, linewidth=1.2, linestyle=(0, (4, 3)))
        label = f"{word}: step {kept.step}, held-out loss {kept.loss:.3f}"
        ring = axes.plot([kept.step], [kept.loss], marker="o", linestyle="none", color=KEPT, label=label)[0]
        ring.set(markersize=12, fillstyle="none", markeredgewidth=2)
    axes.margins(x=0.03, y=0.08)
