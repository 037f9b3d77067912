"""What the page can do, without the page: look at models and data, plan, start, stop, watch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm_finetune_kit.catalog import MODELS, SHORT_NAMES
from llm_finetune_kit.config import RunConfig
from llm_finetune_kit.errors import UsageError
from llm_finetune_kit.events import Event, Planned
from llm_finetune_kit.files import MANIFEST, read_json
from llm_finetune_kit.ui import form, runs_view, views
from llm_finetune_kit.ui.answers import Answering
from llm_finetune_kit.ui.jobs import Jobs
from llm_finetune_kit.ui.runs_view import RunsView
from llm_finetune_kit.ui.uploads import Limits
from llm_finetune_kit.ui.watch import Recent
from llm_finetune_kit.ui.workspace import Workspace


@dataclass
class Desk:
    """Everything behind the page for one workspace. Holds no state of a training; the folder has it."""

    workspace: Workspace
    limits: Limits = Limits()  # noqa: RUF009
    jobs: Jobs = field(init=False)
    runs: RunsView = field(init=False)
    answering: Answering = field(default_factory=Answering)

    def __post_init__(self) -> None:
        self.jobs = Jobs(self.workspace)
        self.runs = RunsView(self.workspace, self.jobs)
        self._live: Recent[dict[str, str]] = Recent(0.5)
        self._models: Recent[str] = Recent(10)
        self._rows: Recent[list[dict[str, Any]]] = Recent(60)

    # --- live ----------------------------------------------------------------------------------------------

    def live(self, name: str) -> dict[str, str]:
        """The card of a run and the list of all, for whoever watches."""
        return self._live.get(name, lambda: self._seen(name))

    def _seen(self, name: str) -> dict[str, str]:
        name = self.runs.followed(name)
        state, status = self.runs.status(name)
        seen = {"run": name, "state": state, "status": status}
        return seen | {"card": self.runs.card(name), "history": self.runs.history(name)}

    def act(self, verb: str, name: str) -> None:
        """Stop, resume or dismiss a run. Raises UsageError or BusyError."""
        known = {"stop": self.jobs.stop, "resume": self.jobs.resume, "dismiss": self.jobs.dismiss}
        if verb not in known:
            raise UsageError(56, "there is no such action", fix="stop, resume or dismiss")
        known[verb](name)
        self._live.forget()

    # --- model and data ------------------------------------------------------------------------------------

    def config(self, values: Mapping[str, Any]) -> RunConfig:
        """The config of a form whose names all lie in the workspace. Raises ConfigError or UsageError."""
        config = form.config_of(values)
        self.workspace.check(config)
        return config

    def model(self, name: str | None) -> str:
        """What a model is, and whether and why it fits here. Raises UsageError, and what `plan_run` raises."""
        named = self.workspace.model(name)
        short = SHORT_NAMES.get(named.lower(), named.lower())
        if short not in MODELS:  # its config may have to be fetched, and nobody else should wait for that
            return self._model(named, None)
        row = next(row for row in self.model_rows() if row["name"] == short)
        return self._models.get(named, lambda: self._model(named, row))

    def _model(self, named: str, row: dict[str, Any] | None) -> str:
        from llm_finetune_kit.planning import plan_run

        heard: list[Event] = []
        plan_run(RunConfig().with_values({"model.name": named}), heard.append, force=True)
        plan = next(event.plan for event in heard if isinstance(event, Planned))
        return views.model(named, row, plan)

    def model_rows(self) -> list[dict[str, Any]]:
        """All known models with what each takes on this machine."""
        from llm_finetune_kit.hardware import this_machine
        from llm_finetune_kit.models.known import rows

        return self._rows.get("", lambda: rows(this_machine(self.workspace.root)))

    def data_sets(self) -> list[tuple[str, str]]:
        """What can be chosen as data: samples of the package and uploads, as label and name."""
        from llm_finetune_kit.data.sources.files import sample_names

        samples = [(f"sample:{name} (in the package)", f"sample:{name}") for name in sample_names()]
        sent = sorted(self.workspace.uploads.glob("*"), key=lambda path: -path.stat().st_mtime)
        return [*((f"{path.name} (uploaded)", f"uploads/{path.name}") for path in sent if path.is_file()), *samples]

    def check(self, values: Mapping[str, Any]) -> tuple[str, str]:
        """The quality report and the mask X-ray of the chosen data, for the chosen model."""
        from llm_finetune_kit.checking import check

        config = form.config_of(values)
        data = self.workspace.data(config.data.train_file if isinstance(config.data.train_file, str) else None)
        model = self.workspace.model(config.model.name) if config.model.name else None
        self.workspace.check(config.with_values({"model.name": model or "demo"}))
        found = check(data, config, held_out=config.data.eval_file, model=model, max_length=config.model.max_length)
        return views.data_report(found), views.xray(found.previewed)

    # --- training ------------------------------------------------------------------------------------------

    def plan(self, values: Mapping[str, Any]) -> str:
        """What a run of this form would do and need. Raises what `plan_run` raises, but for a run that cannot fit."""
        from llm_finetune_kit.planning import plan_run

        heard: list[Event] = []
        plan_run(self.config(values), heard.append, force=True)
        return views.plan(next(event.plan for event in heard if isinstance(event, Planned)), form.words(values))

    def start(self, values: Mapping[str, Any]) -> str:
        """Start a run, or queue it; its name."""
        name = self.jobs.start(self.config(values))
        self._live.forget()
        return name

    # --- testing -------------------------------------------------------------------------------------------

    def tested(self) -> list[str]:
        """Runs whose model can be asked, the newest first."""
        return [run.path.name for run in self.workspace.runs() if (run.final / MANIFEST).is_file()]

    def comparison(self, name: str) -> str:
        """Base against tuned, of one run."""
        run = self.workspace.run(name)
        return runs_view.comparison(run, _read(run.path / "eval_results.json").get("comparison"))


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = read_json(path)
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}
