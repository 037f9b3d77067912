"""Ten thousand damaged data files: each is either read or refused with its name, place and cure; nothing else happens.

Every case is built from its seed file and number alone: `mutant(SEEDS[name], number)` gives the same bytes again.
"""

from __future__ import annotations

import json
import re
import signal
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from llm_finetune_kit.config import DataSection
from llm_finetune_kit.data.formats import Formatted, detect, to_examples
from llm_finetune_kit.data.prepare import read
from llm_finetune_kit.data.sources import Source, read_source
from llm_finetune_kit.data.streaming import survey
from llm_finetune_kit.errors import KitError
from mutants import SEEDS, mutant

FILES = 10_000
SECONDS = 2.0  # of processor time for one file, so that a busy machine fails nothing
PLACE = re.compile(r"\b(lines?|rows?|byte|offset) \d")
# 10, 11, 52: no row is left, preferences, no streaming; 20 to 32: the file as a whole; 60 to 65: folders, Parquet, Arrow
WHOLE_FILE = {10, 11, 52, *range(20, 33), *range(60, 66)} - {28, 29}
STOP, DROP = DataSection(on_bad_rows="stop"), DataSection(on_bad_rows="drop")

# --- what must hold ----------------------------------------------------------------------------------------


class Hang(BaseException):
    """Not an Exception, so that no code under test can swallow it."""


@contextmanager
def limited_time() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hang(f"more than {SECONDS} s of processor time")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def check_refusal(error: KitError, name: str) -> None:
    said = str(error)
    assert error.exit_code == 3 or error.kind == "MACHINE", said
    assert name in said, f"the file is not named: {said}"
    assert error.fix, f"no fix: {said}"
    whole = error.number in WHOLE_FILE or "text, not UTF-8" in error.problem  # UTF-16 has no faulty line
    assert whole or PLACE.search(said), f"no line or row: {said}"
    said.encode()
    assert len(said) < 4000, f"{len(said)} characters: {said[:500]}"
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", said), f"control characters of the data: {said!r}"


def check_examples(source: Source, formatted: Formatted) -> None:
    count = len(source.rows)
    assert formatted.examples
    for example in formatted.examples:
        assert 0 <= example.row < count and source.place(example.row)
        assert (example.messages is None) != (example.text is None)
        for message in [*(example.messages or []), *(example.rejected or [])]:
            assert message["role"] in ("system", "user", "assistant", "tool")
            message["content"].encode()
        (example.text or "").encode()
    assert all(0 <= row < count and reason for row, reason in formatted.dropped)


def read_whole(path: str, settings: DataSection) -> None:
    with limited_time():
        data = read(path, settings)
    assert data.source is not None and data.formatted is not None
    check_examples(data.source, data.formatted)
    json.dumps(data.report, allow_nan=False)


def read_pairs(path: str, settings: DataSection) -> None:
    """Preference data, which `read` refuses as a whole."""
    with limited_time():
        source = read_source(path)
        formatted = to_examples(source, detect(source, None), on_bad_rows=settings.on_bad_rows, system_prompt=None)
    check_examples(source, formatted)


def read_in_parts(path: str, settings: DataSection) -> None:
    with limited_time():
        found = survey(path, settings, 42, hold_out=True)
    assert found.rows and sum(found.usable) and sum(block.lines for block in found.blocks) >= found.rows


def outcome(path: Path, settings: DataSection, door: Callable[[str, DataSection], None] | None = None) -> str:
    """`read`, `refused`, or what went wrong."""
    door = door or (read_pairs if path.name.startswith(("preference", "kto")) else read_whole)
    try:
        door(str(path), settings)
    except KitError as error:
        try:
            check_refusal(error, path.name)
        except (AssertionError, UnicodeEncodeError) as wrong:
            return f"bad refusal: {wrong}"
        return "refused"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "llm_finetune_kit" in frame.filename]
        place = f"{Path(ours[-1].filename).name} line {ours[-1].lineno}" if ours else "this test"
        return f"{type(error).__name__} escapes from {place}: {error}"
    return "read"


@pytest.mark.parametrize("name", SEEDS)
def test_fault_032_the_seed_files_are_sound(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(SEEDS[name].write(SEEDS[name].rows))
    assert outcome(path, STOP) == "read"


class Tally:
    """What became of many files, and the first of each kind that went wrong."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.wrong: dict[str, str] = {}

    def add(self, result: str, name: str, number: int, path: Path) -> None:
        fine = result in ("read", "refused")
        self.counts[result if fine else "wrong"] += 1
        if not fine:
            case = f"mutant(SEEDS[{name!r}], {number}) = {path.name} {path.read_bytes()[:300]!r}"
            self.wrong.setdefault(result[:40], f"{case}\n{result}")

    def check(self) -> None:
        assert not self.wrong, f"{self.counts}\n\n" + "\n\n".join(list(self.wrong.values())[:5])
        assert min(self.counts["read"], self.counts["refused"]) > 20, f"the damage must reach both ends: {self.counts}"


@pytest.mark.parametrize("name", SEEDS)
def test_fault_032_damaged_files_are_read_or_refused_with_name_place_and_cure(tmp_path: Path, name: str) -> None:
    tally = Tally()
    for number in range(-(-FILES // len(SEEDS))):
        file_name, raw = mutant(SEEDS[name], number)
        path = tmp_path / file_name
        path.write_bytes(raw)
        tally.add(outcome(path, DROP if number % 3 == 0 else STOP), name, number, path)
    tally.check()


@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts.jsonl.gz", "messages.jsonl", "alpaca.parquet"])
def test_fault_032_damaged_files_that_are_streamed_are_judged_as_if_read_whole(tmp_path: Path, name: str) -> None:
    tally = Tally()
    for number in range(500):
        file_name, raw = mutant(SEEDS[name], number)
        path = tmp_path / file_name
        path.write_bytes(raw)
        settings = DROP if number % 3 == 0 else STOP
        result = outcome(path, settings, read_in_parts)
        if settings is STOP and result == "read" and outcome(path, settings) != "read":
            result = f"streamed, but read whole it is {outcome(path, settings)}"
        tally.add(result, name, number, path)
    tally.check()
