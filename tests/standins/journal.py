"""What the stand-in trackers have in common: every call is written down, and one of them may go wrong.

`TRACKER_JOURNAL` names the file; `TRACKER_TROUBLE` is `CALL=KIND`, such as `wandb.Run.log=full`.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from typing import Any


def note(call: str, **values: Any) -> None:
    """Write a call down, and go wrong where that is asked for."""
    line = json.dumps({"call": call, "pid": os.getpid(), **values}) + "\n"
    with open(os.environ["TRACKER_JOURNAL"], "ab", buffering=0) as file:  # whole at once: others write and read meanwhile
        file.write(line.encode())
    print(f"{call}: trackers like to print")
    print(f"{call}: and to complain", file=sys.stderr)
    asked, _, kind = os.environ.get("TRACKER_TROUBLE", "").partition("=")
    if asked == call:
        _go_wrong(kind)


def _go_wrong(kind: str) -> None:
    if kind == "raises":
        raise ValueError("a fault of the tracker's own")
    if kind == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if kind == "exits":
        sys.exit(3)
    if kind == "dies":
        os._exit(9)
    if kind == "hangs":
        time.sleep(3600)
    if kind == "tells":
        secrets = [value for name, value in os.environ.items() if name.endswith(("_TOKEN", "_KEY", "_PASSWORD"))]
        raise ConnectionError(f"401 for {' '.join(secrets)} in {os.path.expanduser('~')}/x")
    if kind == "asks":
        input("API key: ")
