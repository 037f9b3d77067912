"""Files read block by block: JSON lines (also gzipped) and Parquet, each block as a `Source` with right places."""

from __future__ import annotations

import gzip
import zlib
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from llm_finetune_kit.data.sources import Source
from llm_finetune_kit.data.sources.columnar import plain_rows
from llm_finetune_kit.data.sources.files import LINE_LIMIT
from llm_finetune_kit.data.sources.json_rows import read_json_lines
from llm_finetune_kit.errors import DataError

BLOCK_ROWS = 4096  # rows read, checked and shuffled together
BLOCK_BYTES = 32 << 20  # a block of long rows is closed earlier


@dataclass(frozen=True)
class Block:
    """Some rows that stand together: where the first one is, and how many there are."""

    offset: int  # byte of the unpacked text, or number of the Parquet row group
    row: int
    line: int
    lines: int


class BlockFile(Protocol):
    """A file that gives its rows in blocks."""

    seekable: bool

    def blocks(self) -> Iterator[tuple[Block, Source]]: ...
    def read(self, block: Block) -> Source: ...


def open_blocks(path: str, *, drop: bool = False) -> BlockFile:
    """With `drop`, lines that are no rows are left out and listed. Raises DataError for files that cannot be read in parts."""
    if not Path(path).is_file():
        raise DataError(20, "there is no such file", where=path, fix="name a JSON lines or Parquet file")
    with open(path, "rb") as file:
        magic = file.read(4)
    if magic == b"PAR1":
        return ParquetBlocks(path)
    with _open(path) as opened, _whole_gzip(path):
        start = opened.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
    if not start.startswith(b"{"):
        fix = "write JSON lines or Parquet: finetune data convert FILE --to messages --out rows.jsonl"
        raise DataError(52, "cannot be streamed: only JSON lines and Parquet can be read in parts", where=path, fix=fix)
    return JsonLinesBlocks(path, drop)


def _open(path: str) -> Any:
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if packed else open(path, "rb")


@contextmanager
def _whole_gzip(path: str) -> Iterator[None]:
    try:
        yield
    except (zlib.error, EOFError, gzip.BadGzipFile) as error:
        fix = "copy or download it again, or write it anew with gzip"
        raise DataError(30, f"is a damaged gzip file ({error})", where=path, fix=fix) from None


class JsonLinesBlocks:
    """JSON lines; a gzipped file can only be read onwards, so the place of the last reading is kept."""

    def __init__(self, path: str, drop: bool) -> None:
        self.path, self.drop = path, drop
        self._file = _open(path)
        self.seekable = not isinstance(self._file, gzip.GzipFile)

    def blocks(self) -> Iterator[tuple[Block, Source]]:
        row, line, offset = 0, 1, 0
        self._file.seek(0)
        while raw := self._lines():
            block = Block(offset, row, line, len(raw))
            offset += sum(map(len, raw))
            source = self._source(raw, line)
            if source is not None:
                yield block, source
                row += len(source.rows)
            line += len(raw)

    def _lines(self) -> list[bytes]:
        raw: list[bytes] = []
        size = 0
        while len(raw) < BLOCK_ROWS and size < BLOCK_BYTES and (one := self._line()):
            if len(one) > LINE_LIMIT:
                raise DataError(67, f"has a line of more than {LINE_LIMIT >> 20} MB", where=self.path, fix="split the row")
            raw.append(one)
            size += len(one)
        return raw

    def _line(self) -> bytes:
        with _whole_gzip(self.path):
            line: bytes = self._file.readline(LINE_LIMIT + 1)
        return line

    def _source(self, raw: list[bytes], line: int) -> Source | None:
        try:
            text = b"".join(raw).decode("utf-8-sig" if line == 1 else "utf-8")
        except UnicodeDecodeError as error:
            at = line + b"".join(raw).count(b"\n", 0, error.start)
            raise DataError(28, "is not UTF-8", where=f"{self.path} line {at}", fix="convert it to UTF-8 with iconv") from None
        if not text.strip():
            return None
        broken: dict[int, str] = {}
        rows, lines = read_json_lines(text, self.path, line, broken if self.drop else None)
        left_out = {f"{self.path} line {number}": why for number, why in sorted(broken.items())}
        return Source(self.path, rows, "", kind="jsonl", lines=array("L", lines), broken=left_out)

    def read(self, block: Block) -> Source:
        self._file.seek(block.offset)
        raw = [self._line() for _ in range(block.lines)]
        source = self._source(raw, block.line)
        assert source is not None
        return source


class ParquetBlocks:
    """Parquet by row groups, which are the parts that can be read alone."""

    seekable = True

    def __init__(self, path: str) -> None:
        self.path = path

    def blocks(self) -> Iterator[tuple[Block, Source]]:
        row = 0
        with whole_parquet(self.path) as file:
            counts = [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)]
        for index, count in enumerate(counts):
            block = Block(index, row, row + 1, count)
            if count:
                yield block, self.read(block)
            row += count

    def read(self, block: Block) -> Source:
        with whole_parquet(self.path) as file:
            rows = plain_rows(file.read_row_group(block.offset), self.path)
        return Source(self.path, rows, "", kind="parquet", lines=range(block.row + 1, block.row + 1 + len(rows)))


@contextmanager
def whole_parquet(path: str) -> Iterator[Any]:
    """An open Parquet file; DataError where it is damaged."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            yield file
    except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        said = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        problem = f"is not a complete Parquet file ({said})"
        raise DataError(64, problem, where=path, fix="copy or download it again") from None
