"""What a run's events add up to: losses over steps, base against tuned, paired answers, and a verdict. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from llm_finetune_kit.events import Compared, Evaluated, Event, Failed, Finished, Resumed, Sampled, Saved, Stepped

FINAL = "final"
FLAT = 0.01  # nats: a smaller change moves perplexity by less than one percent, and nobody would notice
FEW_TARGETS = 1000  # held-out target tokens below which a loss says little
UNREADABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


@dataclass(frozen=True)
class Point:
    """A loss (nats per target token) after a step."""

    step: int
    loss: float


@dataclass(frozen=True)
class Pair:
    """One prompt and its answers by the base and by the tuned model; None where a model was not asked.

    `between` are the answers during training, each with its step.
    """

    prompt: str
    before: str | None
    after: str | None
    reference: str
    between: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True)
class Figures:
    """What the events say, however far the run came; `shown` is the step whose weights are compared with the base."""

    train: list[Point]
    smooth: list[Point]
    held_out: list[Evaluated]
    kept: int | None
    shown: int | None
    compared: dict[str, Any]
    pairs: list[Pair]
    total_steps: int
    tokens: int
    seconds: float
    ended: Finished | Failed | None
    comparison: dict[str, Any] | None = None  # see evaluation.comparison
    steps: tuple[Stepped, ...] = ()

    @property
    def last_step(self) -> int:
        return max([0, *(point.step for point in self.train), *(event.step for event in self.held_out)])


@dataclass(frozen=True)
class Verdict:
    """Did it help? `tone` is good, flat, bad or open (not known); `headline` holds only our own words."""

    tone: str
    headline: str
    detail: str

    @property
    def sentence(self) -> str:
        return f"{self.headline}: {self.detail}"


def figures(events: list[Event]) -> Figures:
    """All figures of a run, finished or not."""
    steps = list({event.step: event for event in events if isinstance(event, Stepped)}.values())
    held_out = evaluations(events)
    kept = kept_step(events)
    best = min((event for event in held_out if event.step > 0), key=lambda event: event.loss, default=None)
    shown = kept if kept is not None else best.step if best else None
    train = [Point(event.step, event.loss) for event in steps]
    return Figures(
        train=train,
        smooth=smoothed(train),
        held_out=held_out,
        kept=kept,
        shown=shown,
        compared=before_and_after(events, shown or 0),
        pairs=pairs(events, kept),
        total_steps=steps[-1].total_steps if steps else 0,
        tokens=sum(event.tokens for event in steps),
        seconds=sum(event.seconds for event in steps),
        ended=ending(events),
        comparison=next((event.comparison for event in reversed(events) if isinstance(event, Compared)), None),
        steps=tuple(steps),
    )


def evaluations(events: list[Event]) -> list[Evaluated]:
    """Held-out results in the order of their steps, the last word on each step."""
    found = {event.step: event for event in events if isinstance(event, Evaluated)}
    return [found[step] for step in sorted(found)]


def kept_step(events: list[Event]) -> int | None:
    """The step whose weights are in `final/`, or None while there are none."""
    found = [event.step for event in events if isinstance(event, Saved) and event.folder == FINAL]
    return found[-1] if found else None


def ending(events: list[Event]) -> Finished | Failed | None:
    """How the run ended, or None if it was killed or still goes on."""
    for event in reversed(events):
        if isinstance(event, (Finished, Failed)):
            return event
        if isinstance(event, (Stepped, Resumed)):
            return None
    return None


def before_and_after(events: list[Event], step: int) -> dict[str, Any]:
    """Held-out loss and perplexity at step 0 and at the step whose weights were kept; only what is known."""
    found = {event.step: event for event in evaluations(events)}
    before, after = found.get(0), found.get(step) if step else None
    known: dict[str, Any] = {}
    if before is not None:
        known |= {"loss_before": before.loss, "perplexity_before": before.perplexity}
    if after is not None:
        known |= {"loss_after": after.loss, "perplexity_after": after.perplexity}
    if before is not None and after is not None:
        known["improvement"] = before.loss - after.loss
    return known


def pairs(events: list[Event], step: int | None) -> list[Pair]:
    """Answers before and after training, prompt by prompt, in the order they were asked.

    Without a `step` the latest answers after training count.
    """
    said = [event for event in events if isinstance(event, Sampled)]
    last = step if step is not None else max((event.step for event in said), default=0)
    before = {(event.prompt, event.reference): event.answer for event in said if event.step == 0}
    after = {(event.prompt, event.reference): event.answer for event in said if event.step == last and last > 0}
    answers = {key: (_legible_or_none(before.get(key)), _legible_or_none(after.get(key))) for key in before | after}
    return [Pair(legible(key[0]), *answers[key], legible(key[1]), _between(said, key, last)) for key in answers]


def _between(said: list[Sampled], key: tuple[str, str], last: int) -> tuple[tuple[int, str], ...]:
    """Answers to a prompt after other steps than the first and the one shown, in the order of the steps."""
    found = {event.step: event.answer for event in said if (event.prompt, event.reference) == key and event.step not in (0, last)}
    return tuple((step, legible(found[step])) for step in sorted(found))


def smoothed(points: list[Point]) -> list[Point]:
    """An exponential mean over about a twentieth of the run, without the pull of its first value."""
    keep = 1 - 1 / max(2.0, len(points) / 20)
    total = weight = 0.0
    found = []
    for point in points:
        total = keep * total + (1 - keep) * point.loss
        weight = keep * weight + (1 - keep)
        found.append(Point(point.step, total / weight))
    return found


def verdict(found: Figures, learned: str = "answers") -> Verdict:
    """Did it help, in one sentence; `learned` is what the loss was measured on."""
    if not isinstance(found.ended, Finished):
        return _open_verdict(found)
    before, after = found.compared.get("loss_before"), found.compared.get("loss_after")
    if before is None or after is None:
        return Verdict("open", "Nothing is proved", "no held-out rows were evaluated, so nobody knows how it does on unseen data")
    unproved = found.comparison is not None and found.comparison["outcome"] == "none"
    if abs(before - after) < FLAT or unproved:
        return Verdict("flat", "No improvement shown", f"held-out loss was {before:.3f} and is {after:.3f}")
    moved = f"from {before:.2f} to {after:.2f}"
    if after < before:
        return Verdict("good", f"Held-out loss fell {moved}", f"the model predicts unseen {learned} better")
    return Verdict("bad", f"Held-out loss rose {moved}", f"the model got worse at unseen {learned}, so keep using the base")


def _open_verdict(found: Figures) -> Verdict:
    of = f" of {found.total_steps}" if found.total_steps else ""
    headline = f"Not finished: step {found.last_step}{of}"
    before, after = found.compared.get("loss_before"), found.compared.get("loss_after")
    detail = "this report shows what is known so far"
    if before is not None and after is not None:
        detail = f"held-out loss was {before:.2f} before training and {after:.2f} at its best so far"
    if isinstance(found.ended, Failed):
        detail = f"{legible(found.ended.problem)}; {detail}"
    return Verdict("open", headline, detail)


def caution(found: Figures) -> str:
    """What a reader should hold against the held-out figures, or nothing."""
    if not found.held_out:
        return ""
    targets, rows = found.held_out[-1].target_tokens, found.held_out[-1].rows
    if targets < FEW_TARGETS:
        return f"Only {rows:,} held-out rows with {targets:,} learned tokens: take the figures as a hint, not as proof."
    return ""


def legible(text: str) -> str:
    """Text without control characters, half characters and marks that turn the reading direction around."""
    return UNREADABLE.sub("\ufffd", text)


def _legible_or_none(text: str | None) -> str | None:
    return None if text is None else legible(text)
