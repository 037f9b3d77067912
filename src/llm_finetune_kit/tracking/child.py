"""The process of a tracker: it reads the run's events line by line and hands them to the tracker's package.

The first line says which run it is. The end of the input is the end of the run, however that came about: a run
that was killed leaves a closed tracker too. On its old standard output it says what the run should know.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time

from llm_finetune_kit.events import Evaluated, Event, Failed, Finished, Resumed, Sampled, Saved, Stepped, from_record
from llm_finetune_kit.tracking.records import Cleaner, numbers
from llm_finetune_kit.tracking.writers import WRITERS, Start, Tell, Writer

MOST_WAITING = 10_000  # lines that wait for the tracker here; more wait in the run
STUCK = 600.0  # seconds without any progress after which the tracker hangs
LONGEST_CLOSE = 90.0  # seconds between the end of the input and the end of this process


def main(name: str) -> None:
    """Run the tracker `name` until the input ends."""
    channel = os.dup(1)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.nice(5)  # training goes first
    cleaned = Cleaner(os.environ)

    def tell(**words: str) -> None:
        line = json.dumps({key: cleaned(" ".join(word.split())[:300]) for key, word in words.items()})
        try:
            os.write(channel, line.encode() + b"\n")
        except OSError:
            pass  # the run is gone

    lines: queue.Queue[str | None] = queue.Queue(MOST_WAITING)
    threading.Thread(target=_read, args=(lines, tell), daemon=True).start()
    try:
        follow(name, lines, tell, cleaned)
    except BaseException as error:
        tell(failed=f"{type(error).__name__}: {error}")
        os._exit(1)
    os._exit(0)  # all is closed; what the package still wants to do at exit might take long


def _read(lines: queue.Queue[str | None], tell: Tell) -> None:
    """Move the input into the queue, so that the end of the run is noticed even while the tracker hangs."""
    try:
        for line in sys.stdin:
            lines.put(line, timeout=STUCK)
        lines.put(None, timeout=STUCK)
        time.sleep(LONGEST_CLOSE)
    except queue.Full:
        tell(failed="it hangs")
    os._exit(1)


def follow(name: str, lines: queue.Queue[str | None], tell: Tell, cleaned: Cleaner) -> None:
    """Hand every event of the queue to the tracker; None ends it. Raises whatever the tracker's package raises."""
    first = lines.get()
    if first is None:
        return
    told = json.loads(first)
    settings = {knob: cleaned(value) if isinstance(value, str) else value for knob, value in told["settings"].items()}
    writer = WRITERS[name](Start(told["name"], told["folder"], settings, told["key"]), tell)
    state, samples = "interrupted", list[Sampled]()
    while (line := lines.get()) is not None:
        record = json.loads(line)
        event = from_record(record)
        if event is not None:
            state = _ended(event, state)
            samples = _hand_on(writer, event, record["time"], samples, cleaned)
    if samples:
        writer.samples(samples)
    writer.close(state)


def _hand_on(writer: Writer, event: Event, when: float, samples: list[Sampled], cleaned: Cleaner) -> list[Sampled]:
    """Give the event to the tracker; answers are collected until something else happens. Returns those that still wait."""
    if isinstance(event, Sampled):
        words = [cleaned(text) for text in (event.prompt, event.answer, event.reference)]
        return [*samples, Sampled(event.step, *words)]
    if samples:
        writer.samples(samples)
    if isinstance(event, Resumed):
        writer.resumed(event.step)
    if isinstance(event, Failed):
        writer.failed(cleaned(f"{event.code}: {event.problem}"))
    if isinstance(event, (Stepped, Evaluated, Saved, Finished)) and (figures := numbers(event)):
        writer.numbers(event.step, figures, when)
    return []


def _ended(event: Event, state: str) -> str:
    """The state in which the run is after an event: a run that says nothing more was interrupted."""
    if isinstance(event, Finished):
        return "finished"
    if isinstance(event, Failed):
        return "interrupted" if event.code.startswith("STOP") else "failed"
    return state
