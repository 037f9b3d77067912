"""Stands in for the package trackio: the calls that are used, with its signatures, written into a journal."""

from __future__ import annotations

from typing import Any

from journal import note


class Markdown:
    def __init__(self, text: str = "") -> None:
        self.text = text


class Run:
    def log(self, metrics: dict[str, Any], step: int | None = None) -> None:
        plain = {name: one.text if isinstance(one, Markdown) else one for name, one in metrics.items()}
        note("trackio.Run.log", metrics=plain, step=step)

    def finish(self) -> None:
        note("trackio.Run.finish")


def init(
    project: str,
    name: str | None = None,
    config: dict[str, Any] | None = None,
    resume: str = "never",
    embed: bool = True,
    auto_log_gpu: bool | None = None,
    auto_log_cpu: bool | None = None,
) -> Run:
    note("trackio.init", project=project, name=name, config=config, resume=resume)
    return Run()
