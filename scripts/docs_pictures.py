"""Draws every picture of the documentation from real weights, rows and runs of the embedded model.

    python scripts/docs_pictures.py              all of them, in half a minute
    python scripts/docs_pictures.py packing.svg  only this one

Pictures are dark on a light ground, so that they can be read on any page; the site turns the SVG ones over in its dark scheme.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from docs_paper import BLUE, GREEN, GREY, MIDDLE, ORANGE, SOFT, arrow, box, chart, paper
from llm_finetune_kit.api import load_dataset
from llm_finetune_kit.config import DataSection, RunConfig, demo_values
from llm_finetune_kit.data import prepare
from llm_finetune_kit.data.batches import arrange
from llm_finetune_kit.data.xray import token_texts, xray
from llm_finetune_kit.models.locate import demo_folder
from llm_finetune_kit.models.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
LAYER = "model.layers.0.self_attn.q_proj.weight"


@cache
def workplace() -> tempfile.TemporaryDirectory[str]:
    """A folder that goes when the program ends."""
    return tempfile.TemporaryDirectory(prefix="docs-pictures-")


@cache
def demo_run() -> Any:
    """`finetune demo`, run here and now."""
    from llm_finetune_kit.run import run

    return run(RunConfig().with_values(demo_values() | {"output.output_dir": workplace().name}))


@cache
def demo_weight() -> np.ndarray:
    """The query matrix [out, in] of the embedded model's first block."""
    from safetensors.torch import load_file

    return load_file(demo_folder() / "model.safetensors")[LAYER].float().numpy()


def encoded(data: Any) -> Any:
    """A data set as the embedded model's tokens and masks, and the tokenizer."""
    chat, settings = load_tokenizer(demo_folder()), DataSection()
    return prepare.tokenize(prepare.read(data, settings), settings, chat, chat.fingerprint()).tokens, chat


# --- what LoRA is ------------------------------------------------------------------------------------------


def lora() -> Figure:
    """One layer of the embedded model with its adapter of rank 16, drawn to scale."""
    (out, into), rank = demo_weight().shape, 16
    inch = 2.4 / max(out, into)
    figure, axes = paper(7, 4.3)
    axes.add_patch(Rectangle((0.5, 1.0), into * inch, out * inch, color=GREY))
    axes.text(0.5 + into * inch / 2, 2.2, f"W\n{out} × {into}\n{out * into:,} weights\nfrozen", ha="center", va="center")
    axes.text(3.25, 2.2, "+", ha="center", va="center", fontsize=26)
    axes.add_patch(Rectangle((3.75, 1.0), rank * inch, out * inch, color=BLUE))
    axes.text(3.75 + rank * inch / 2, 0.72, f"B  {out} × {rank}", ha="center", va="center", color=BLUE)
    axes.text(4.18, 2.2, "×", ha="center", va="center", fontsize=22)
    axes.add_patch(Rectangle((4.45, 2.2 - rank * inch / 2), into * inch, rank * inch, color=BLUE))
    axes.text(4.45 + into * inch / 2, 2.55, f"A  {rank} × {into}", ha="center", va="center", color=BLUE)
    trained = rank * (out + into)
    note = f"{trained:,} weights learn:\n{trained / (out * into):.1%} of this matrix"
    axes.text(4.45 + into * inch / 2, 1.6, note, ha="center", va="center", color=BLUE)
    axes.text(0.5, 3.85, "A LoRA layer computes  W x + (alpha / r) · B A x", fontsize=13, va="center")
    axes.text(0.5, 0.25, f"Drawn to scale: a query matrix of the demo model, r = {rank}.", fontsize=10, color=SOFT, va="center")
    return figure


def lora_flow() -> Figure:
    """From rows to evidence."""
    figure, axes = paper(8, 3.6)
    steps = ("rows", "tokens\nand mask", "frozen base\n+ adapters", "loss on\nanswers", "base against\ntuned")
    for place, text in enumerate(steps):
        left = 0.3 + place * 1.53
        box(axes, left, 2.0, 1.25, 0.9, text, BLUE if place == 2 else GREY)
        if place < len(steps) - 1:
            arrow(axes, (left + 1.25, 2.45), (left + 1.53, 2.45))
    box(axes, 3.36, 0.55, 1.25, 0.8, "adapter file\n(a few MB)", GREEN)
    arrow(axes, (3.98, 2.0), (3.98, 1.35))
    axes.annotate(
        "", (4.35, 1.98), (5.5, 1.98),
        arrowprops={"arrowstyle": "-|>", "color": BLUE, "linewidth": 1.4, "connectionstyle": "arc3,rad=-0.45"},
    )  # fmt: skip
    axes.text(5.0, 1.4, "gradients move\nonly the adapters", color=BLUE, fontsize=10, va="center")
    axes.text(0.3, 3.2, "Fine-tuning with LoRA, from rows to evidence", fontsize=13, va="center")
    return figure


def loss_curve() -> Path:
    """The loss curve that `finetune demo` leaves, as it is."""
    return demo_run().folder.path / "loss_curve.png"


# --- what QLoRA is -----------------------------------------------------------------------------------------


def qlora() -> Figure:
    """Real weights, scaled block by block as NF4 scales them, over the 16 values that NF4 has."""
    from bitsandbytes.functional import get_4bit_type

    levels = get_4bit_type("nf4", device="cpu").numpy()
    blocks = demo_weight().reshape(-1, 64)
    scaled = (blocks / np.abs(blocks).max(1, keepdims=True)).ravel()
    figure, axes = chart(7, 3.9, "weight / largest of its 64 neighbours", "weights")
    axes.hist(scaled, bins=121, range=(-1, 1), color=MIDDLE, label=f"{len(scaled):,} weights of the demo model")
    top = axes.get_ylim()[1]
    axes.vlines(levels, 0, top * 0.18, color=ORANGE, linewidth=2, label="the 16 values that NF4 can hold")
    nearest = levels[np.abs(scaled[:, None] - levels).argmin(1)]
    error = np.abs(nearest - scaled).mean()
    axes.set_title(f"16 values hold every weight; rounding moves one by {error:.3f} (mean)", loc="left", fontsize=11.5, pad=10)
    axes.legend(frameon=False, fontsize=10, loc="upper right")
    axes.set_ylim(0, top * 1.3)
    return figure


# --- what is learned ---------------------------------------------------------------------------------------

TALK = [
    {"role": "user", "content": "Is the shop open today?"},
    {"role": "assistant", "content": "Yes, until 6 pm."},
    {"role": "user", "content": "And on Sunday?"},
    {"role": "assistant", "content": "No, we are closed."},
]


def masks() -> Figure:
    """A conversation of two turns, token by token, as the training step computes it."""
    tokens, chat = encoded([{"messages": TALK}])
    shown = xray(tokens, 512, chat, [0])[0].tokens
    width, line = 7.0, 0.42
    places, x, y = [], 0.3, 0
    for token in shown:
        text = token.text.replace("\n", "↵").replace(" ", "␣") or "·"
        wide = 0.16 + 0.098 * len(text)
        if x + wide > width - 0.3:
            x, y = 0.3, y + 1
        places.append((x, y, wide, text, token.state))
        x += wide + 0.05
        if token.text.endswith("\n") or (token.state == "trained" and token.text.startswith("<")):
            x, y = 0.3, y + 1
    height = 1.15 + line * (y + 1)
    figure, axes = paper(width, height)
    axes.text(0.3, height - 0.35, "One row, as the model sees it: every box is a token", fontsize=13, va="center")
    for x, y, wide, text, state in places:
        color = BLUE if state == "trained" else GREY
        box(axes, x, height - 1.0 - line * y, wide, 0.33, text, color, fontsize=10, family="DejaVu Sans Mono")
    learned = sum(token.state == "trained" for token in shown)
    axes.text(
        0.3, 0.3, f"blue: learned ({learned} of {len(shown)} tokens); grey: only read", fontsize=10, color=SOFT, va="center"
    )
    return figure


# --- how rows are packed -----------------------------------------------------------------------------------


def packing() -> Figure:
    """The first 16 rows of data/train.json, padded four by four and packed."""
    tokens, _ = encoded(str(ROOT / "data" / "train.json"))
    lengths = [len(tokens.example(row)[0]) for row in range(16)]
    padded = [lengths[start : start + 4] for start in range(0, 16, 4)]
    longest = [max(batch) for batch in padded]
    budget = 4 * max(longest)
    packed = [[lengths[row] for row in passed] for passed in arrange(lengths, budget)]
    figure, axes = paper(7, 2.0 + 0.38 * (4 + len(packed)))
    height = axes.get_ylim()[1]
    real, computed = sum(lengths), sum(4 * one for one in longest)
    axes.text(0.3, height - 0.3, f"Padded: {computed:,} positions for {real:,} tokens", fontsize=13, va="center")
    scale, top = 6.3 / (4 * max(longest)), height - 0.6
    for batch, length in zip(padded, longest, strict=True):
        for index, own in enumerate(batch):
            axes.add_patch(Rectangle((0.3 + index * length * scale, top - 0.3), length * scale - 0.02, 0.3, color=GREY))
            axes.add_patch(Rectangle((0.3 + index * length * scale, top - 0.3), own * scale - 0.02, 0.3, color=BLUE))
        top -= 0.38
    axes.text(0.3, top - 0.3, f"Packed: {real:,} positions in {len(packed)} passes, rows kept apart", fontsize=13, va="center")
    top -= 0.6
    for passed in packed:
        left = 0.3
        for own in passed:
            axes.add_patch(Rectangle((left, top - 0.3), own * scale - 0.02, 0.3, color=BLUE))
            left += own * scale
        top -= 0.38
    words = "blue: tokens; grey: padding, computed and thrown away. 16 rows of data/train.json."
    axes.text(0.3, top - 0.25, words, fontsize=10, color=SOFT, va="center")
    return figure


# --- what perplexity is ------------------------------------------------------------------------------------


def perplexity() -> Figure:
    """The surprise of base and tuned at each token of the beginning of a held-out answer."""
    import torch

    result = demo_run()
    tokens, chat = encoded(list(load_dataset("sample:chat"))[:1])  # how to reset a password, which the run holds out
    ids, learned = tokens.example(0)
    places = np.flatnonzero(learned)[:16]
    text = [one[0].replace("\n", "↵").strip() or "␣" for one in token_texts(ids[places].tolist(), chat)]
    model = result.model.eval()

    def surprises() -> np.ndarray:
        with torch.no_grad(), result.objective.precision():
            scores = model(input_ids=torch.tensor(ids)[None]).logits[0].float().log_softmax(-1)
        return np.array([-float(scores[place - 1, ids[place]]) for place in places])

    tuned = surprises()
    with model.disable_adapter():
        base = surprises()
    figure, axes = chart(7, 4.2, "", "surprise, nats")
    spots = np.arange(len(places))
    for shift, values, color, name in ((-0.2, base, MIDDLE, "base"), (0.2, tuned, BLUE, "tuned")):
        label = f"{name}: mean {values.mean():.2f}, perplexity {np.exp(values.mean()):.1f}"
        axes.bar(spots + shift, values, width=0.38, color=color, label=label)
    axes.set_xticks(spots, text, rotation=60, ha="right", family="DejaVu Sans Mono", fontsize=10, rotation_mode="anchor")
    axes.set_title("How surprised the demo model is by an answer it was not trained on", loc="left", fontsize=12, pad=10)
    axes.legend(frameon=False, fontsize=11, loc="upper right")
    axes.set_ylim(0, max(*base, *tuned) * 1.3)
    return figure


# --- how it is built ---------------------------------------------------------------------------------------


def house() -> Figure:
    """The floors of CONTRIBUTING.md: a file imports only from floors below it."""
    table = re.findall(r"^\| (\d) (\w+) \| (.+?) \| (.+?) \|$", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.M)
    figure, axes = paper(7, 0.75 * len(table) + 1.0)
    for number, name, files, _ in table:
        bottom = 0.55 + 0.75 * int(number)
        box(axes, 0.3, bottom, 1.5, 0.6, f"{number}  {name}", BLUE)
        names = [found.removesuffix(".py").rstrip("/") for found in re.findall(r"`([\w./]+)`", files)]
        lines, text = [], ""
        for one in names:
            lines, text = ([*lines, text], one) if len(text) + len(one) > 66 else (lines, f"{text}, {one}".lstrip(", "))
        axes.text(1.95, bottom + 0.3, "\n".join([*lines, text]), fontsize=9.5, va="center", linespacing=1.25)
    arrow(axes, (1.05, 0.45), (1.05, 0.05))
    axes.text(1.95, 0.25, "imports go down only; values flow up from floor to floor", fontsize=10, color=SOFT, va="center")
    figure.set_label("; ".join(f"{name}: {files}" for _, name, files, _ in table).replace("`", ""))
    axes.text(0.3, 0.75 * len(table) + 0.8, "Seven floors", fontsize=13, va="center")
    return figure


PICTURES: dict[str, Callable[[], Figure | Path]] = {
    "diagrams/lora_flow.png": lora_flow,
    "diagrams/loss_curve.png": loss_curve,
    "images/lora.svg": lora,
    "images/qlora.svg": qlora,
    "images/masks.svg": masks,
    "images/packing.svg": packing,
    "images/perplexity.svg": perplexity,
    "images/house.svg": house,
}


def draw(name: str, folder: Path) -> Path:
    """One of PICTURES, written under the folder; the path of it."""
    target, found = folder / name, PICTURES[name]()
    target.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(found, Path):
        shutil.copyfile(found, target)
    elif target.suffix == ".svg":
        found.savefig(target, metadata={"Date": None, "Title": found.get_label()})
    else:
        found.savefig(target, dpi=110)
    return target


if __name__ == "__main__":
    for name in PICTURES:
        if not sys.argv[1:] or any(name.endswith(word) for word in sys.argv[1:]):
            print(draw(name, DOCS).relative_to(ROOT))
