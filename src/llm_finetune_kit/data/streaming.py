"""Data larger than memory: read through once and checked, then read again block by block as training needs it.

The first reading (`survey`) checks every row, counts them, and notes where each block of rows begins. From
then on the examples of a step are a function of the seed and the step alone, as they are for data in memory,
so a resumed run goes on at the right row and needs no state: each epoch takes the blocks in an order of its
own and shuffles the examples inside each block. While the steps of a block run, the next one is read and tokenized.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from llm_finetune_kit.config import DataSection
from llm_finetune_kit.data import cache
from llm_finetune_kit.data.formats import Detected, detect, refuse_untrainable
from llm_finetune_kit.data.formats.examples import Formatted, to_examples
from llm_finetune_kit.data.formats.rows import Example
from llm_finetune_kit.data.masks import Renderer, Tokens, encode
from llm_finetune_kit.data.similar import text_of
from llm_finetune_kit.data.sources import Source
from llm_finetune_kit.data.sources.blocks import Block, BlockFile, open_blocks
from llm_finetune_kit.errors import DataError

HELD_OUT = 512  # examples held out where no eval_file is given; the sample that the plan is made from, too
LARGE = 1 << 30  # bytes from which a file is streamed without being asked to
LARGE_PACKED = 1 << 28  # the same for a gzipped file
MOST_LISTED = 1000  # dropped rows listed one by one in the report


@dataclass
class Survey:
    """What the first reading found out. All rows are numbered from 0 in file order."""

    fingerprint: str
    format: str
    why_format: str
    blocks: list[Block] = field(default_factory=list)
    usable: list[int] = field(default_factory=list)  # examples of each block
    left_out: dict[int, list[int]] = field(default_factory=dict)  # of each block: examples that are not trained
    sample: list[tuple[int, dict[str, Any]]] = field(default_factory=list)  # rows chosen by the seed, with their numbers
    rows: int = 0
    repeated: int = 0  # examples that repeat an earlier one word for word
    copies: int = 0  # examples left out because a held-out one says the same
    dropped: list[dict[str, str]] = field(default_factory=list)
    dropped_count: int = 0

    @property
    def counts(self) -> np.ndarray:
        """Examples that are trained from each block, int64 [blocks]."""
        return np.array([count - len(self.left_out.get(index, ())) for index, count in enumerate(self.usable)], dtype=np.int64)


def is_large(spec: Any) -> bool:
    """Whether a data set is one file that is better not held in memory."""
    if not isinstance(spec, str) or not Path(spec).is_file():
        return False
    return os.path.getsize(spec) > (LARGE_PACKED if spec.endswith(".gz") else LARGE)


def survey(path: str, settings: DataSection, seed: int, *, hold_out: bool) -> Survey:
    """Read a file through once, in little memory. Raises DataError for what cannot be trained.

    Found again in the cache if the same file was surveyed before with the same settings.
    """
    fingerprint = cache.file_fingerprint(Path(path))
    asked = settings.model_dump(include={"format", "columns", "on_bad_rows", "system_prompt", "max_samples"})
    place = cache.entry(fingerprint, asked | {"survey": seed, "hold_out": hold_out}).with_suffix(".survey")
    known = cache.load_json(place)
    if known is not None:
        known["blocks"] = [Block(**block) for block in known["blocks"]]
        known["left_out"] = {int(index): places for index, places in known["left_out"].items()}
        return Survey(**known)
    found = _read_through(path, fingerprint, settings, seed, hold_out)
    cache.store_json(place, asdict(found))
    return found


def _read_through(path: str, fingerprint: str, settings: DataSection, seed: int, hold_out: bool) -> Survey:
    file = open_blocks(path, drop=settings.on_bad_rows == "drop")
    found: Survey | None = None
    detected: Detected | None = None
    hashes: list[np.ndarray] = []
    sample = _Sample(seed)
    for block, source in file.blocks():
        if detected is None:
            detected = detect(source, settings.format, settings.columns)
            refuse_untrainable(detected, source)
            if detected.format.whole:
                fix = "build the threads first: finetune data convert FILE --to messages --out rows.jsonl"
                raise DataError(53, f"{detected.format.name} rows cannot be streamed: threads span the file", where=path, fix=fix)
            found = Survey(fingerprint, detected.format.name, detected.why)
        assert found is not None
        formatted = _formatted(source, detected, settings)
        hashes.append(np.array([_hash(example) for example in formatted.examples], dtype=np.uint64))
        sample.offer(len(found.blocks), block.row, source, formatted)
        found.blocks.append(block)
        found.usable.append(len(formatted.examples))
        found.rows += len(source.rows)
        dropped = [*source.broken.items(), *((source.place(row), why) for row, why in formatted.dropped)]
        found.dropped_count += len(dropped)
        room = MOST_LISTED - len(found.dropped)
        found.dropped += [{"place": where, "reason": why} for where, why in dropped[: max(0, room)]]
    if found is None or not sum(found.usable):
        raise DataError(10, "no row can be used", where=path, fix="look at it with `finetune data check`")
    _choose(found, sample, hashes, settings.max_samples, seed, hold_out)
    return found


def _formatted(source: Source, detected: Detected, settings: DataSection) -> Formatted:
    try:
        return to_examples(source, detected, on_bad_rows=settings.on_bad_rows, system_prompt=settings.system_prompt)
    except DataError as error:
        if error.number != 10:  # a block without a usable row is no fault of the file
            raise
        return Formatted([], [(index, "cannot be used") for index in range(len(source.rows))], [])


def _hash(example: Example) -> int:
    return int.from_bytes(hashlib.blake2b(text_of(example).encode(), digest_size=8).digest(), "little")


class _Sample:
    """The HELD_OUT examples with the smallest random keys: a fair sample of a sequence of unknown length."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.kept: list[tuple[float, int, int, int, dict[str, Any]]] = []  # key, block, example, row, the row itself

    def offer(self, block: int, first_row: int, source: Source, formatted: Formatted) -> None:
        keys = np.random.Generator(np.random.PCG64([self.seed, block, 1 << 30])).random(len(formatted.examples))
        limit = self.kept[-1][0] if len(self.kept) == HELD_OUT else 1.0
        for index in np.flatnonzero(keys < limit):
            row = formatted.examples[index].row
            self.kept.append((float(keys[index]), block, int(index), first_row + row, source.rows[row]))
        self.kept = sorted(self.kept, key=lambda one: one[:3])[:HELD_OUT]


def _choose(found: Survey, sample: _Sample, hashes: list[np.ndarray], most: int | None, seed: int, hold_out: bool) -> None:
    """Fix what is held out, what says the same as something held out, and (with `max_samples`) what else is not used."""
    total = sum(found.usable)
    kept = sample.kept[: min(HELD_OUT, max(1, total // 20))]
    found.sample = [(row, content) for _, _, _, row, content in kept]
    everything = np.concatenate(hashes)
    found.repeated = int(total - len(np.unique(everything)))
    out = np.zeros(total, dtype=bool)
    starts = np.concatenate([[0], np.cumsum(found.usable)])
    if hold_out:
        held = np.array([starts[block] + index for _, block, index, _, _ in kept], dtype=np.int64)
        out = np.isin(everything, everything[held])
        found.copies = int(out.sum()) - len(held)
    if most is not None and most < total - out.sum():
        rest = np.flatnonzero(~out)
        out[np.random.Generator(np.random.PCG64([seed, 1 << 29])).permutation(rest)[most:]] = True
    for index in range(len(found.usable)):
        places = np.flatnonzero(out[starts[index] : starts[index + 1]])
        if len(places):
            found.left_out[index] = places.tolist()


class Stream:
    """The training examples of a surveyed file, of which only a few blocks are in memory at any time."""

    def __init__(self, path: str, found: Survey, settings: DataSection, chat: Renderer) -> None:
        self.path, self.survey, self.settings, self.chat = path, found, settings, chat
        self.file: BlockFile = open_blocks(path, drop=settings.on_bad_rows == "drop")
        self._as_it_was = _stamp(path)
        self.max_length: int | None = None
        self.counts = found.counts
        self._recent: OrderedDict[int, Future[Tokens]] = OrderedDict()
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="reader")  # the only one that reads the file

    def __len__(self) -> int:
        return int(self.counts.sum())

    def place(self, row: int) -> str:
        """Where a row stands in the file, as a person finds it."""
        index = int(np.searchsorted([block.row for block in self.survey.blocks], row, "right")) - 1
        block = self.survey.blocks[index]
        return self._reader.submit(self.file.read, block).result().place(row - block.row)

    def sample(self) -> Tokens:
        """The tokens of the surveyed sample, whose `rows` are numbers in the file."""
        rows = [content for _, content in self.survey.sample]
        source = Source(self.path, rows, "")
        formatted = _formatted(source, self._detected, self.settings)
        tokens = self._tokens(formatted.examples, source)
        numbers = np.array([number for number, _ in self.survey.sample], dtype=np.int32)
        return Tokens(tokens.ids, tokens.trained, tokens.starts, numbers[tokens.rows])

    def take(self, per_step: int, seed: int, step: int) -> Tokens:
        """The examples of a step (counted from 0)."""
        epoch, place = divmod(step, -(-len(self) // per_step))
        order = self._block_order(seed, epoch)
        ends = np.cumsum(self.counts[order])
        first, last = place * per_step, min((place + 1) * per_step, len(self))
        parts = []
        while first < last:
            at = int(np.searchsorted(ends, first, "right"))
            begin, end = int(ends[at] - self.counts[order[at]]), min(last, int(ends[at]))
            shuffled = np.random.Generator(np.random.PCG64([seed, epoch, int(order[at])])).permutation(self.counts[order[at]])
            parts.append(self._block(int(order[at])).select(shuffled[first - begin : end - begin]))
            first = end
        if len(parts) == 1 and at + 1 < len(order):
            self._begin(int(order[at + 1]))
        return join(parts)

    def _block_order(self, seed: int, epoch: int) -> np.ndarray:
        """Blocks in a random order where the file allows to jump, else in file order."""
        if not self.file.seekable:
            return np.arange(len(self.counts))
        return np.random.Generator(np.random.PCG64([seed, epoch, 1 << 31])).permutation(len(self.counts))

    def _block(self, index: int) -> Tokens:
        self._begin(index)
        try:
            return self._recent[index].result()
        except Exception:
            del self._recent[index]  # it may have been the disk
            raise

    def _begin(self, index: int) -> None:
        """Have a block read and tokenized, unless it is one of the two that are kept."""
        if index not in self._recent:
            while len(self._recent) > 1:
                self._recent.popitem(last=False)
            self._recent[index] = self._reader.submit(self._encoded, index)
        self._recent.move_to_end(index)

    def _encoded(self, index: int) -> Tokens:
        """The tokens of one block, without what is left out, cut to `max_length`."""
        block = self.survey.blocks[index]
        source = self.file.read(block)
        formatted = _formatted(source, self._detected, self.settings)
        if len(formatted.examples) != self.survey.usable[index] or _stamp(self.path) != self._as_it_was:
            fix = "do not change the file while it is being trained on; start a new run"
            raise DataError(51, "has changed since the run began", where=self.path, fix=fix)
        out = set(self.survey.left_out.get(index, ()))
        examples = [example for place, example in enumerate(formatted.examples) if place not in out]
        tokens = self._tokens(examples, source)
        tokens = Tokens(tokens.ids, tokens.trained, tokens.starts, tokens.rows + np.int32(block.row))
        if self.max_length is not None:
            tokens = tokens.cut(self.max_length)[0]
        self._refuse_untrainable(tokens, source, block)
        return tokens

    def _tokens(self, examples: list[Example], source: Source) -> Tokens:
        """As many items as examples, as their number is known before; one that is refused and dropped is one unlearned token."""
        refused: list[tuple[int, str]] = []
        dropping = self.settings.on_bad_rows == "drop"
        tokens = encode(
            examples, self.chat, loss_on=self.settings.loss_on, place=source.place, refused=refused if dropping else None
        )
        if not refused:
            return tokens
        out = {row for row, _ in refused}
        kept = iter(range(len(tokens)))
        empty = Tokens(np.array([self.chat.eos_id], np.int32), np.zeros(1, bool), np.array([0, 1]), np.zeros(1, np.int32))
        return join([empty if example.row in out else tokens.select(np.array([next(kept)])) for example in examples])

    def _refuse_untrainable(self, tokens: Tokens, source: Source, block: Block) -> None:
        bad = tokens.rows[np.flatnonzero(tokens.targets == 0)]
        if len(bad) and self.settings.on_bad_rows == "stop":
            raise DataError(
                135,
                f"{len(bad)} examples have no token to learn",
                where=f"{self.path} {source.spots([int(row) - block.row for row in bad])}",
                why=f"their prompts alone reach max_length {self.max_length}, so the answers are cut off entirely",
                fix="start again with a larger model.max_length, or without them: data.on_bad_rows=drop",
            )

    @cached_property
    def _detected(self) -> Detected:
        return detect(self.file.read(self.survey.blocks[0]), self.settings.format, self.settings.columns)


def _stamp(path: str) -> tuple[int, int]:
    """Size and time of change: enough to notice a file that is changed while it is trained on."""
    info = os.stat(path)
    return info.st_size, info.st_mtime_ns


def join(parts: list[Tokens]) -> Tokens:
    """Several sets of examples as one, in their order; `rows` are kept as they are."""
    offsets = np.cumsum([0, *(len(part.ids) for part in parts)])
    starts = [part.starts[:-1] + offset for part, offset in zip(parts, offsets, strict=False)]
    return Tokens(
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.trained for part in parts]),
        np.concatenate([*starts, offsets[-1:]]).astype(np.int64),
        np.concatenate([part.rows for part in parts]),
    )


def report(path: str, found: Survey) -> dict[str, Any]:
    """The survey in the form of a data report."""
    return {
        "name": path,
        "fingerprint": found.fingerprint,
        "format": found.format,
        "why_format": found.why_format,
        "rows": found.rows,
        "examples": sum(found.usable),
        "streamed": True,
        "dropped": found.dropped,
        "dropped_count": found.dropped_count,
        "repeated": found.repeated,
        "notes": [],
        "warnings": _warnings(found),
    }


def _warnings(found: Survey) -> list[str]:
    said = []
    if found.dropped_count:
        first = f"; the first: {found.dropped[0]['place']}, {found.dropped[0]['reason']}" if found.dropped else ""
        said.append(f"{found.dropped_count:,} rows are left out{first}")
    if found.repeated:
        said.append(f"{found.repeated:,} examples repeat an earlier one word for word")
    if found.copies:
        said.append(f"{found.copies:,} examples say the same as a held-out one and are not trained")
    return said
