"""Stands in for the package wandb: the calls that are used, with its signatures, written into a journal."""

from __future__ import annotations

from typing import Any

from journal import note


class Settings:
    def __init__(self, **values: Any) -> None:
        self.values = values


class Html:
    def __init__(self, data: str, inject: bool = True) -> None:
        self.data = data


class Summary(dict):
    def update(self, values: dict[str, Any]) -> None:  # type: ignore[override]
        note("wandb.Summary.update", values=values)

    def __setitem__(self, name: str, value: Any) -> None:
        note("wandb.Summary.update", values={name: value})


class Run:
    def __init__(self) -> None:
        self.summary = Summary()

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        note("wandb.Run.define_metric", name=name, step_metric=step_metric)

    def log(self, data: dict[str, Any], step: int | None = None, commit: bool | None = None) -> None:
        note("wandb.Run.log", data={name: one.data if isinstance(one, Html) else one for name, one in data.items()})

    def finish(self, exit_code: int | None = None) -> None:
        note("wandb.Run.finish", exit_code=exit_code)


def teardown(exit_code: int | None = None) -> None:
    note("wandb.teardown")


def init(
    *,
    project: str | None = None,
    dir: str | None = None,
    id: str | None = None,
    name: str | None = None,
    config: dict[str, Any] | None = None,
    allow_val_change: bool | None = None,
    mode: str | None = None,
    resume: bool | str | None = None,
    settings: Settings | None = None,
) -> Run:
    note(f"wandb.init.{mode}", project=project, id=id, name=name, config=config, resume=resume)
    return Run()
