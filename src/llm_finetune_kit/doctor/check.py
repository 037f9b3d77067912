"""What an examination finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: `ok`, `warn` (works, with a drawback) or `fail` (runs will fail), and what to do."""

    name: str
    status: Literal["ok", "warn", "fail"]
    finding: str
    fix: str = ""
