"""What is wrong with this machine, and how to mend it. Nothing here imports torch, and nothing uses the network unasked."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from llm_finetune_kit.doctor import machine, places, software
from llm_finetune_kit.doctor.check import Check

LOOKS: tuple[Callable[[], Check], ...] = (
    software.python,
    software.packages,
    machine.gpu,
    machine.bfloat16,
    machine.threads,
    machine.memory,
    machine.shared_memory,
    machine.file_handles,
    machine.encoding,
    places.home,
    places.temporary,
    places.hub_cache,
    places.own_cache,
)
PLACES: tuple[Callable[[Path], Check], ...] = (places.output, places.disk, places.file_system)


def examine(folder: Path, *, online: bool = False, deep: bool = False) -> list[Check]:
    """Look at everything that runs have failed by; `folder` is where output will go. Never raises.

    With `online` the hub is asked for an answer; without, no connection is made. Of compiled packages the main library is
    loaded in a child process; with `deep`, or where that fails, they are imported there, which takes some seconds.
    """
    trial = software.start_trial(deep=deep)
    found = [_look(look.__name__, look) for look in LOOKS]
    found += [_look(look.__name__, partial(look, folder)) for look in PLACES]
    found.append(_look("hub", partial(places.hub, online)))
    return found + software.compiled(trial, deep=deep)


def _look(name: str, look: Callable[[], Check]) -> Check:
    try:
        return look()
    except Exception as error:  # a doctor must not fall ill: the next finding may explain this one
        return Check(name.replace("_", " "), "warn", f"could not be examined: {type(error).__name__}: {error}")
