"""debug.log: warnings of all libraries and tracebacks, without the places of this machine."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class _Portable(logging.Formatter):
    """Log lines without the places of this machine: a run folder may be handed on."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        for place in (Path(sys.prefix), Path(__file__).parents[1], Path.cwd(), Path.home()):
            text = text.replace(f"{place}/", "")
        return text


class _Quiet(logging.FileHandler):
    """A log that cannot be written says nothing in the terminal: the run has said what it needs."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


@contextmanager
def debug_log(folder: Path, started: str) -> Iterator[logging.Logger]:
    """Warnings of all libraries and tracebacks go to debug.log while a run works."""
    handler = _Quiet(folder / "debug.log", encoding="utf-8")
    handler.setFormatter(_Portable("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    log = logging.getLogger("llm_finetune_kit")
    loggers = [log, logging.getLogger("transformers"), logging.getLogger("py.warnings")]
    logging.captureWarnings(True)
    for one in loggers:
        one.addHandler(handler)
    handler.handle(log.makeRecord(log.name, logging.INFO, __file__, 0, "started: %s", (started,), None))
    try:
        yield log
    finally:
        for one in loggers:
            one.removeHandler(handler)
        logging.captureWarnings(False)
        handler.close()
