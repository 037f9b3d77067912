from __future__ import annotations

import json
import os
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from journal import note

from mlflow.entities import Metric, Param

KEY = "llm_finetune_kit.run"


class MlflowClient:
    def __init__(self, tracking_uri: str | None = None) -> None:
        note("mlflow.client")

    def get_experiment_by_name(self, name: str) -> Any:
        return None

    def create_experiment(self, name: str) -> str:
        note("mlflow.create_experiment", name=name)
        return "7"

    def create_run(self, experiment_id: str, *, tags: dict[str, Any] | None = None, run_name: str | None = None) -> Any:
        (key,) = (tags or {}).values()
        note("mlflow.create_run", experiment_id=experiment_id, run_name=run_name, filter=f"tags.`{KEY}` = '{key}'")
        return SimpleNamespace(info=SimpleNamespace(run_id="c0ffee"))

    def search_runs(self, experiment_ids: list[str], filter_string: str = "") -> list[Any]:
        with open(os.environ["TRACKER_JOURNAL"], encoding="utf-8") as file:
            made = [json.loads(line) for line in file]
        same = any(call.get("filter") == filter_string for call in made if call["call"] == "mlflow.create_run")
        return [SimpleNamespace(info=SimpleNamespace(run_id="c0ffee"))] if same else []

    def update_run(self, run_id: str, status: str | None = None, name: str | None = None) -> None:
        note("mlflow.update_run", run_id=run_id, status=status)

    def log_batch(self, run_id: str, metrics: Sequence[Metric] = (), params: Sequence[Param] = ()) -> None:
        plain = [[metric.step, metric.key, metric.value] for metric in metrics]
        note("mlflow.log_batch", run_id=run_id, metrics=plain, params={param.key: param.value for param in params})

    def log_text(self, run_id: str, text: str, artifact_file: str) -> None:
        note("mlflow.log_text", run_id=run_id, text=text, artifact_file=artifact_file)

    def set_tag(self, run_id: str, key: str, value: Any) -> None:
        note("mlflow.set_tag", run_id=run_id, key=key, value=value)

    def set_terminated(self, run_id: str, status: str | None = None) -> None:
        note("mlflow.set_terminated", run_id=run_id, status=status)
