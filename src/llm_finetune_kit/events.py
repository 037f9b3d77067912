"""What a run says. One vocabulary for the terminal, the log file, the browser and the tests.

The engine never prints: it calls a listener with these values. `events.jsonl` in the run folder holds
them one to a line, so whoever reads the file afterwards sees exactly what a live listener saw.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Event:
    """Base of all events; only gives them one type name."""


@dataclass(frozen=True)
class Stage(Event):
    """The run enters a stage: settings, data, plan, model, train, evaluate, report."""

    name: str
    detail: str = ""


@dataclass(frozen=True)
class Planned(Event):
    """What was decided, with a reason for each choice (`Plan.to_dict()`)."""

    plan: dict[str, Any]


@dataclass(frozen=True)
class Resumed(Event):
    """Training goes on after `step`, or begins again (step 0, no checkpoint); what was said after that save is void.

    `evaluated` and `sampled` are the steps of the last evaluation and the last sample answers that the checkpoint knows.
    """

    step: int
    checkpoint: str
    evaluated: int = 0
    sampled: int = 0


@dataclass(frozen=True)
class Stepped(Event):
    """One optimizer step is done. `loss` is the mean over the step's target tokens, in nats.

    `memory` is what the process holds after it, in bytes (see `hardware.held_memory`); None where nobody knows.
    """

    step: int
    total_steps: int
    epoch: float
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    target_tokens: int
    seconds: float
    memory: int | None = None


@dataclass(frozen=True)
class Evaluated(Event):
    """Held-out loss (nats per target token) and perplexity after `step`; step 0 is before training."""

    step: int
    loss: float
    perplexity: float
    rows: int
    target_tokens: int
    seconds: float
    best: bool = False


@dataclass(frozen=True)
class Sampled(Event):
    """An answer of the model to a prompt, after `step`; step 0 is before training."""

    step: int
    prompt: str
    answer: str
    reference: str = ""


@dataclass(frozen=True)
class Compared(Event):
    """Base against tuned on held-out rows, with the weights of `step` (see `evaluation.comparison`)."""

    step: int
    comparison: dict[str, Any]


@dataclass(frozen=True)
class Profiled(Event):
    """Where the time of a step goes: `seconds` of a step by kind of work, as the mean of `steps`; and how many FLOP a
    second its matrix products made."""

    steps: int
    seconds: float
    parts: dict[str, float]
    products_per_second: float


@dataclass(frozen=True)
class Saving(Event):
    """The state of now is on its way into `folder`; what is said after this is not in it. `evaluated` is the step of the
    last evaluation that it knows."""

    step: int
    folder: str
    evaluated: int


@dataclass(frozen=True)
class Saved(Event):
    """A folder was committed: complete, verified, named relative to the run folder.

    Writing took `seconds`, most of them beside the training, which stood still for `held_up` seconds.
    """

    step: int
    folder: str
    size_bytes: int
    seconds: float
    held_up: float = 0.0


@dataclass(frozen=True)
class Noted(Event):
    """Something that was decided or found and is as it should be."""

    message: str


@dataclass(frozen=True)
class Warned(Event):
    """Something that may be wrong; the run goes on."""

    message: str
    fix: str = ""


@dataclass(frozen=True)
class Finished(Event):
    """The run reached its end. `reason` says why it stopped there; `summary` holds its figures."""

    step: int
    reason: str
    summary: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Failed(Event):
    """The run stopped before its end; `resume` is the command that goes on, if there is one."""

    code: str
    problem: str
    fix: str = ""
    resume: str = ""


Listen = Callable[[Event], None]

KINDS: dict[str, type[Event]] = {kind.__name__: kind for kind in Event.__subclasses__()}


def ignore(event: Event) -> None:
    """The listener that does not listen."""


def to_record(event: Event, time: float) -> dict[str, Any]:
    """The event as a line of `events.jsonl`; `time` is in seconds since 1970."""
    return {"event": type(event).__name__, "time": time, **asdict(event)}


def from_record(record: dict[str, Any]) -> Event | None:
    """The event that `to_record` wrote, or None for a kind that this version does not know."""
    kind = KINDS.get(record.get("event", ""))
    if kind is None:
        return None
    return kind(**{name: record[name] for name in kind.__dataclass_fields__ if name in record})
