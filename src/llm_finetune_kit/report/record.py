"""A run folder, read: everything that a report is made from, with nothing where the run did not come so far."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llm_finetune_kit.events import Failed, Resumed, Warned
from llm_finetune_kit.files import read_json
from llm_finetune_kit.folder import RunFolder
from llm_finetune_kit.report import words
from llm_finetune_kit.report.figures import Figures, Verdict, figures, verdict


@dataclass(frozen=True)
class Record:
    """What a run was asked, what it decided, what its data is like and what came of it."""

    name: str
    base: str
    asked: dict[str, Any]
    resolved: dict[str, Any]
    plan: dict[str, Any]
    data: dict[str, Any]
    warnings: list[tuple[str, str]]
    figures: Figures
    verdict: Verdict
    resumable: bool
    at_work: bool = False
    base_name: str = ""  # the base as other tools know it: a hub id, `demo`, or the name of a local folder
    interruptions: tuple[Failed | Resumed, ...] = ()

    @property
    def knobs(self) -> dict[str, Any]:
        """All values that the run used, by section."""
        return dict(self.resolved.get("config", {}))

    @property
    def place(self) -> str:
        """The run as one types it in a terminal, never with an absolute path."""
        parent = self.knobs.get("output", {}).get("output_dir", "outputs")
        inside = not parent.startswith(("/", "~")) and ":" not in parent
        return shlex.quote(f"{parent.rstrip('/')}/{self.name}" if inside else self.name)


def read_record(folder: Path) -> Record:
    """The record of a run, finished, stopped or killed midway."""
    run = RunFolder(folder)
    events = run.replay()
    resolved = _json(folder / "resolved.json")
    found = figures(events)
    learned = "text" if resolved.get("config", {}).get("data", {}).get("loss_on") == "all" else "answers"
    warned = {event.message: event.fix for event in events if isinstance(event, Warned)}
    return Record(
        name=folder.resolve().name,
        base=words.name(str(resolved.get("base_model", "the base model"))),
        asked=_yaml(folder / "config.yaml"),
        resolved=resolved,
        plan=_json(folder / "plan.json"),
        data=_json(folder / "data_report.json"),
        warnings=list(warned.items()),
        figures=found,
        verdict=verdict(found, learned),
        resumable=found.kept is None and bool(run.checkpoints()),
        at_work=run.at_work,
        base_name=words.name(str(resolved.get("base_model", ""))),
        interruptions=tuple(event for event in events if isinstance(event, (Failed, Resumed))),
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        tree = read_json(path)
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return tree if isinstance(tree, dict) else {}
