"""The report while a run goes on, so that a run which is killed has one too."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from llm_finetune_kit.events import Compared, Evaluated, Event, Listen, Resumed, Sampled, Stage
from llm_finetune_kit.report.page import write_page

SHARE = 0.01  # of the run's time may go into writing the page while it trains
MOMENTS = (Compared, Evaluated, Resumed, Sampled)


class LiveReport:
    """A listener that hands every event on and then, at evaluations and answers, renews `report.html`.

    A page that took t seconds is not written again before t / SHARE seconds have gone by, so it costs a run no more
    than that share. That it cannot be written is noted in the debug log and costs nothing else.
    """

    def __init__(self, folder: Path, listen: Listen) -> None:
        self.folder = folder
        self.listen = listen
        self.next = 0.0  # on the monotonic clock: the first moment is always written

    def __call__(self, event: Event) -> None:
        self.listen(event)
        begins = isinstance(event, Stage) and event.name == "model"  # data, plan and masks are known by then
        if begins or (isinstance(event, MOMENTS) and time.monotonic() >= self.next):
            self.write()

    def write(self) -> None:
        """Write the page now."""
        began = time.monotonic()
        try:
            write_page(self.folder)
        except Exception:
            logging.getLogger("llm_finetune_kit").exception("the report could not be written")
        now = time.monotonic()
        self.next = now + (now - began) / SHARE
