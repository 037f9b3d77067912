"""What can go wrong for a reader to fix, each kind with its exit code.

    KitError
    ├── UsageError, ConfigError   2   what was asked is wrong
    ├── DataError                 3   the training data is wrong
    ├── ModelError                4   model, adapter or checkpoint files are wrong
    ├── MachineError              5   memory, disk, network or a missing package
    ├── TrainingError             6   training went wrong (NaN, out of memory, nothing learned)
    ├── BusyError                 7   another process works here
    └── Interrupted         130/143   stopped by the user, and saved

Faces print a KitError as one block and exit with its code. Anything else is our bug and keeps its traceback.
"""

from __future__ import annotations

import re

OUR_BUG = 70
LONG = re.compile(r"(\S{80})\S{160,}")  # a word that no person wrote, such as a damaged column name
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


class KitError(Exception):
    """A fault the reader can fix: the problem, where it is, why it matters and what to do.

    >>> try:
    ...     load_dataset("nothing.jsonl")
    ... except KitError as error:
    ...     print(error.code, error.exit_code)
    DATA-020 3
    """

    kind = "BUG"
    exit_code = OUR_BUG

    def __init__(self, number: int, problem: str, *, where: str = "", why: str = "", fix: str = "") -> None:
        super().__init__(problem)
        self.number = number
        self.problem = _plain(LONG.sub(r"\1…", problem))
        self.where = _plain(where)
        self.why = _plain(LONG.sub(r"\1…", why))
        self.fix = _plain(LONG.sub(r"\1…", fix))

    @property
    def code(self) -> str:
        """A stable name to search the documentation for, such as `DATA-004`."""
        return f"{self.kind}-{self.number:03d}"

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        lines = [f"error[{self.code}] {place}{self.problem}"]
        lines += [f"  why:  {self.why}"] if self.why else []
        lines += [f"  fix:  {self.fix}"] if self.fix else []
        return "\n".join(lines)


def _plain(text: str) -> str:
    """Control characters, which may come out of the data, as `\\x1b`: they must not steer the reader's terminal."""
    return CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class UsageError(KitError):
    kind, exit_code = "USAGE", 2


class ConfigError(KitError):
    kind, exit_code = "CONFIG", 2


class DataError(KitError):
    kind, exit_code = "DATA", 3


class ModelError(KitError):
    kind, exit_code = "MODEL", 4


class MachineError(KitError):
    kind, exit_code = "MACHINE", 5


class TrainingError(KitError):
    kind, exit_code = "TRAIN", 6


class BusyError(KitError):
    kind, exit_code = "BUSY", 7


class Interrupted(KitError):
    """A signal asked the run to stop; it finished its step and saved."""

    kind = "STOP"

    def __init__(self, signal_number: int, problem: str, *, fix: str) -> None:
        super().__init__(signal_number, problem, fix=fix)
        self.exit_code = 128 + signal_number


def nearest(word: str, known: list[str] | set[str] | tuple[str, ...], count: int = 1) -> list[str]:
    """The known words that `word` was most likely meant to be (may be empty)."""
    from difflib import get_close_matches

    return get_close_matches(word, list(known), n=count, cutoff=0.6)
