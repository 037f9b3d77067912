"""The paper that the pictures of the documentation are drawn on: a light sheet with dark ink, and boxes and arrows for it."""

from __future__ import annotations

from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

INK, SOFT, RULE, GROUND = "#23272f", "#5c6470", "#c9ced6", "#f7f8fa"
BLUE, ORANGE, GREEN, GREY = "#3b6ea8", "#c8552d", "#2a7f4f", "#d7dbe1"
MIDDLE = "#98a2b0"  # grey that is seen on a dark ground, too

matplotlib.rcParams |= {"svg.hashsalt": "finetune", "font.size": 12, "text.color": INK, "axes.edgecolor": RULE}


def paper(width: float, height: float) -> tuple[Figure, Axes]:
    """A light sheet of so many inches, and axes over all of it that count in inches."""
    figure = Figure(figsize=(width, height), facecolor=GROUND)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def chart(width: float, height: float, x: str, y: str) -> tuple[Figure, Axes]:
    """A light sheet with axes that have names."""
    figure = Figure(figsize=(width, height), facecolor=GROUND, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    axes = figure.add_subplot(facecolor=GROUND)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=SOFT)
    return figure, axes


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str, color: str = GREY, **more: Any) -> None:
    """A rounded box with a text in its middle."""
    style = "round,pad=0,rounding_size=0.08"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=color, edgecolor="none"))
    ink = INK if color == GREY else "white"
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", **({"color": ink, "fontsize": 11} | more))


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """A thin arrow."""
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": SOFT, "linewidth": 1.4, "shrinkA": 2, "shrinkB": 2})
