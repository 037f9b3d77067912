"""The four trackers: the same calls, each in the words of its package. Packages are imported when a writer is made."""

from __future__ import annotations

import html
import netrc
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

from llm_finetune_kit.events import Sampled

PROJECT = "llm-finetune-kit"
Tell = Callable[..., None]  # tell(warning=…)


@dataclass(frozen=True)
class Start:
    """The run that is recorded: its name, its folder, its hyperparameters, and its key, which is kept when it is resumed."""

    name: str
    folder: str
    settings: Mapping[str, Any]
    key: str


class Writer(Protocol):
    """What a tracker can be told. Every call may raise anything."""

    def numbers(self, step: int, figures: Mapping[str, float], when: float) -> None:
        """Figures after an optimizer step; `when` is in seconds since 1970."""

    def samples(self, answers: Sequence[Sampled]) -> None:
        """Answers of the model, all after the same step."""

    def resumed(self, step: int) -> None:
        """Training goes on after `step`: what was told of later steps is void."""

    def failed(self, problem: str) -> None:
        """The run stops because of a problem."""

    def close(self, state: str) -> None:
        """The run has ended: `finished`, `failed` or `interrupted`."""


def _as_text(answer: Sampled) -> str:
    expected = f"\n\n**Expected**\n\n{answer.reference}" if answer.reference else ""
    return f"**Prompt**\n\n{answer.prompt}\n\n**Answer**\n\n{answer.answer}{expected}"


class TensorBoard:
    """Event files in the run's folder, written by the `tensorboard` package without torch or tensorflow."""

    def __init__(self, start: Start, tell: Tell) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, types_pb2
        from tensorboard.plugins.text.metadata import create_summary_metadata
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary, self._tensor = event_pb2, summary_pb2, tensor_pb2.TensorProto
        self._text, self._metadata = types_pb2.DT_STRING, create_summary_metadata
        folder = Path(start.folder) / "tensorboard"
        new = not folder.is_dir()
        self._writer = EventFileWriter(str(folder), flush_secs=5)
        if new:
            rows = "".join(f"    {knob}: {value}\n" for knob, value in start.settings.items())
            self._write(0, time.time(), [self._words("hyperparameters", rows)])

    def _words(self, tag: str, text: str) -> Any:
        shape = {"dim": [{"size": 1}]}
        tensor = self._tensor(dtype=self._text, string_val=[text.encode()], tensor_shape=shape)
        return self._summary.Summary.Value(tag=tag, metadata=self._metadata(tag, ""), tensor=tensor)

    def _write(self, step: int, when: float, values: list[Any]) -> None:
        summary = self._summary.Summary(value=values)
        self._writer.add_event(self._event.Event(step=step, wall_time=when, summary=summary))

    def numbers(self, step: int, figures: Mapping[str, float], when: float) -> None:
        values = [self._summary.Summary.Value(tag=name, simple_value=figure) for name, figure in figures.items()]
        self._write(step, when, values)

    def samples(self, answers: Sequence[Sampled]) -> None:
        values = [self._words(f"samples/{number}", _as_text(answer)) for number, answer in enumerate(answers, 1)]
        self._write(answers[0].step, time.time(), values)

    def resumed(self, step: int) -> None:
        began = self._event.SessionLog(status=self._event.SessionLog.START)  # TensorBoard forgets this step and later ones
        self._writer.add_event(self._event.Event(step=step + 1, wall_time=time.time(), session_log=began))

    def failed(self, problem: str) -> None:
        self._write(0, time.time(), [self._words("stopped", problem)])

    def close(self, state: str) -> None:
        self._writer.flush()  # raises what went wrong in the writer's own thread, which `close` would not
        self._writer.close()


class WandB:
    """A wandb run with its files in the run's folder: online if somebody is logged in and the server answers."""

    def __init__(self, start: Start, tell: Tell) -> None:
        import wandb

        self._wandb, self._start = wandb, start
        mode = os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")
        try:
            self._run = self._begin(mode)
        except Exception as error:
            if mode == "offline":
                raise
            tell(warning=f"its server cannot be used, so it records offline for `wandb sync` ({type(error).__name__})")
            wandb.teardown()  # else the failed run keeps the id
            self._run = self._begin("offline")
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")  # a resumed run repeats steps, which wandb's own count refuses

    def _begin(self, mode: str) -> Any:
        """No code, no command line, no machine, no console: those hold names, places and secrets."""
        settings = self._wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            save_code=False,
            symlink=False,
            init_timeout=15,
            login_timeout=15,
            host="",
            x_disable_meta=True,
            x_disable_stats=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
        )
        return self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=self._start.name,
            id=self._start.key,
            resume="allow",
            dir=self._start.folder,
            config=dict(self._start.settings),
            mode=mode,
            settings=settings,
            allow_val_change=True,
        )

    def numbers(self, step: int, figures: Mapping[str, float], when: float) -> None:
        final = {name: figure for name, figure in figures.items() if name.startswith("final/")}
        self._run.summary.update(final) if final else self._run.log({"step": step, **figures})

    def samples(self, answers: Sequence[Sampled]) -> None:
        pages = {
            f"samples/{number}": self._wandb.Html(f"<pre>{html.escape(_as_text(answer))}</pre>", inject=False)
            for number, answer in enumerate(answers, 1)
        }  # not a Table: that is an artifact, which names its file by an absolute path
        self._run.log({"step": answers[0].step, **pages})

    def resumed(self, step: int) -> None:
        self._run.summary["resumed_after"] = step

    def failed(self, problem: str) -> None:
        self._run.summary["problem"] = problem

    def close(self, state: str) -> None:
        self._run.summary["state"] = state
        self._run.finish(exit_code=0 if state == "finished" else 1)
        for logs in Path(self._start.folder, "wandb").glob("*run-*/logs"):
            shutil.rmtree(logs, ignore_errors=True)  # wandb's own debug logs name the places of this machine


def _has_key() -> bool:
    """Whether wandb could log in without asking anybody."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class Trackio:
    """A run in trackio's local store, or where TRACKIO_SPACE_ID or TRACKIO_SERVER_URL say."""

    def __init__(self, start: Start, tell: Tell) -> None:
        if not any(os.environ.get(name) for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")):
            os.environ["HF_HUB_OFFLINE"] = "1"  # else it asks the hub whose token this is
        import trackio

        self._trackio = trackio
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=f"{start.name}-{start.key}",  # names are all that trackio tells runs apart by
            config=dict(start.settings),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def numbers(self, step: int, figures: Mapping[str, float], when: float) -> None:
        self._run.log(dict(figures), step=step)

    def samples(self, answers: Sequence[Sampled]) -> None:
        texts = {f"samples/{number}": self._trackio.Markdown(_as_text(answer)) for number, answer in enumerate(answers, 1)}
        self._run.log(texts, step=answers[0].step)

    def resumed(self, step: int) -> None:
        self._run.log({"resumed_after": step}, step=step)

    def failed(self, problem: str) -> None:
        self._run.log({"problem": self._trackio.Markdown(problem)})

    def close(self, state: str) -> None:
        self._run.finish()


class MLflow:
    """A run of MLflow's client, in MLFLOW_TRACKING_URI or MLflow's own default; the fluent API would store user and code."""

    STATES: Mapping[str, str] = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
    KEY = "llm_finetune_kit.run"  # the tag by which a resumed run finds itself
    EVERY = 1.0  # seconds between calls: each is a transaction or a request

    def __init__(self, start: Start, tell: Tell) -> None:
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._metric, self._client = Metric, MlflowClient()
        self._waiting: list[Any] = []
        self._last = time.monotonic()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        place = experiment.experiment_id if experiment else self._client.create_experiment(name)
        known = self._client.search_runs([place], f"tags.`{self.KEY}` = '{start.key}'")
        if known:
            self._id = known[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
        else:
            self._id = self._client.create_run(place, run_name=start.name, tags={self.KEY: start.key}).info.run_id
            parameters = [Param(knob, str(value)[:500]) for knob, value in start.settings.items() if value != ""]
            self._client.log_batch(self._id, params=parameters)

    def numbers(self, step: int, figures: Mapping[str, float], when: float) -> None:
        self._waiting += [self._metric(name, figure, int(when * 1000), step) for name, figure in figures.items()]
        if time.monotonic() - self._last >= self.EVERY:
            self._flush()

    def _flush(self) -> None:
        for first in range(0, len(self._waiting), 1000):  # the most that one call takes
            self._client.log_batch(self._id, metrics=self._waiting[first : first + 1000])
        self._waiting.clear()
        self._last = time.monotonic()

    def samples(self, answers: Sequence[Sampled]) -> None:
        text = "\n\n---\n\n".join(_as_text(answer) for answer in answers)
        self._client.log_text(self._id, text, f"samples/step-{answers[0].step:06d}.md")

    def resumed(self, step: int) -> None:
        self._client.set_tag(self._id, "resumed_after", step)

    def failed(self, problem: str) -> None:
        self._client.set_tag(self._id, "problem", problem)

    def close(self, state: str) -> None:
        self._flush()
        self._client.set_terminated(self._id, self.STATES[state])


WRITERS: Mapping[str, Callable[[Start, Tell], Writer]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
    "mlflow": MLflow,
}
