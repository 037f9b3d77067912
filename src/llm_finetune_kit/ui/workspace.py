"""The folder that the page works in: where its things lie, and which names mean something inside it."""

# Faults of this module and of uploads.py, as UsageError:
#
#   50  a name of nothing here       51  a path or an address where a name is due
#   52  no room for an upload        53  no file of data

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_finetune_kit.catalog import MODELS, SHORT_NAMES
from llm_finetune_kit.config import RunConfig
from llm_finetune_kit.data.sources.files import KINDS, NAMED_SETS, sample_names
from llm_finetune_kit.data.sources.spec import parse
from llm_finetune_kit.errors import ConfigError, UsageError
from llm_finetune_kit.folder import RunFolder
from llm_finetune_kit.runs import runs

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}")
HERE = "inside the folder where the page was started"
PLAIN = re.compile(r"[\w.@ ()+,#\[\]:%/-]{1,200}")  # what the name of a folder or file in the workspace may hold


@dataclass(frozen=True)
class Workspace:
    """A folder, resolved, in which the process works. Nothing outside it is read or written for the page, but the package
    and the hub's cache."""

    root: Path

    @property
    def outputs(self) -> Path:
        """Where all runs lie, those started in a terminal too."""
        return self.root / "outputs"

    @property
    def uploads(self) -> Path:
        return self.root / "uploads"

    @property
    def own(self) -> Path:
        """The page's own files: the queue and what is being uploaded."""
        return self.root / ".finetune-ui"

    @property
    def incoming(self) -> Path:
        """Where uploads arrive."""
        return self.own / "incoming"

    def runs(self) -> list[RunFolder]:
        """All runs, the last started first; links that lead out of the workspace are none."""
        return [run for run in runs(self.outputs) if self.holds(run.path)]

    def run(self, name: str) -> RunFolder:
        """The run of that name: looked up among those there are, never made into a path. Raises UsageError."""
        for run in self.runs():
            if run.path.name == name:
                return run
        raise UsageError(50, "there is no such run here", fix="choose one of the list")

    def holds(self, path: Path) -> bool:
        """Whether a path lies in the workspace once all links in it are followed."""
        try:
            return path.resolve().is_relative_to(self.root)
        except (OSError, ValueError, RuntimeError):  # too long, a NUL, a circle of links
            return False

    def model(self, text: str | None) -> str:
        """A model that may be named: of the catalog, of the hub, or a folder inside the workspace. Raises UsageError."""
        name = (text or "").strip()
        if not name:
            raise UsageError(50, "no model is chosen", fix="choose one in the tab Model")
        lower = name.lower()
        if SHORT_NAMES.get(lower, lower) in MODELS:
            return name
        folder = self._inside(name)
        if folder is not None and folder.is_dir():
            return str(folder.relative_to(self.root))
        if self._on_hub(name):
            return name
        fix = f"choose a known name, a hub id such as owner/name, or a folder {HERE}"
        raise UsageError(51, "this is no model that can be used here", fix=fix)

    def data(self, text: str | None) -> str:
        """A data set that may be named: of the package, of the hub, or a file or folder of the workspace, with a slice
        behind it if need be. Raises UsageError, and DataError for a name that is no name."""
        name = (text or "").strip()
        if not name:
            raise UsageError(50, "no data is chosen", fix="upload a file or choose a sample in the tab Dataset")
        base = parse(name.removeprefix("sample:"), self._is_here).base
        sample = name.startswith("sample:") and base in sample_names()
        on_hub = self._on_hub(base) and Path(base).suffix not in KINDS
        if sample or base.lower() in NAMED_SETS or self._is_here(base) or on_hub:
            return name
        fix = f"upload a file, or name a sample, a hub id such as owner/name, or a file {HERE}"
        raise UsageError(51, "this is no data set that can be used here", fix=fix)

    def check(self, config: RunConfig) -> None:
        """Refuse a config that names anything outside the workspace. Raises UsageError or ConfigError."""
        self.model(config.model.name)
        needed: list[Any] = list(config.data.mix or [config.data.train_file])
        for given in (*needed, config.data.eval_file or needed[0]):
            if given is not None and not isinstance(given, str):
                raise UsageError(51, "rows cannot be given here", fix="upload them as a file")
            self.data(given)
        template = config.data.template
        if template not in (None, "default") and not self._is_here(str(template)):
            raise ConfigError(18, "data.template names no file that can be used here", fix=f"put the .jinja file {HERE}")
        if config.model.trust_remote_code or config.model.cache_dir or config.output.output_dir != "outputs":
            raise ConfigError(18, "this setting cannot be made in the browser", fix="use the terminal for it")

    def _on_hub(self, name: str) -> bool:
        """Whether a name can only be a hub id: a folder or link of the owner's name would be read in its place."""
        return bool(HUB_ID.fullmatch(name)) and ".." not in name and not os.path.lexists(self.root / name.partition("/")[0])

    def _is_here(self, name: str) -> bool:
        found = self._inside(name)
        return found is not None and found.exists()

    def _inside(self, name: str) -> Path | None:
        """The resolved path of a relative name that stays in the workspace, else None."""
        parts = re.split(r"[/\\]", name)
        hidden = any(part.startswith(".") for part in parts)
        if not PLAIN.fullmatch(name) or name.startswith("/") or hidden or ":" in parts[0][:2]:
            return None
        path = self.root / name
        if not self.holds(path):
            return None
        path = path.resolve()
        links = (one for one in path.rglob("*") if one.is_symlink()) if path.is_dir() else ()
        return path if all(self.holds(link) for link in links) else None
