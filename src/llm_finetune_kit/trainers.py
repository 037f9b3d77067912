"""The trainers of the Python face: a config in, a run, and what can be done with its result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_finetune_kit.config import ALIASES, GenerationSection, RunConfig, knobs
from llm_finetune_kit.errors import ConfigError, Interrupted, MachineError, nearest
from llm_finetune_kit.events import Event, Listen, Stepped
from llm_finetune_kit.settings import changed


@dataclass(frozen=True)
class PreparedDataset:
    """Rows that were understood and tokenized; `report` says what became of each."""

    rows: list[dict[str, Any]]
    tokens: Any
    report: dict[str, Any]

    def __len__(self) -> int:
        return len(self.tokens)


class ProgressCallback:
    """Calls `show(event)` for every event of a run; subclass or pass a function.

    >>> from llm_finetune_kit.events import Stage
    >>> ProgressCallback(lambda event: print(event.name))(Stage("model"))
    model
    """

    def __init__(self, show: Callable[[Event], None] | None = None) -> None:
        self.show = show

    def __call__(self, event: Event) -> None:
        if self.show is not None:
            self.show(event)


class Trainer:
    """What all trainers share: `train`, and then `ask`, `save` and `loss_history`.

    `listen` is called with every event of the run; without one, progress is shown in the terminal.
    """

    def __init__(self, config: RunConfig, listen: Listen | None = None, model: Any = None) -> None:
        self.config = config
        self.listen = listen
        self.model = self._given = model
        self.result: Any = None

    def train(self) -> Any:
        """Run it; afterwards `model` is the tuned model. Returns the run's `Result`. Raises KitError."""
        self.result = _run(self.config, self.listen, self.model if self._given is not None else None)
        self.model = self.result.model
        return self.result

    @property
    def loss_history(self) -> list[tuple[int, float]]:
        """Step and training loss (nats per target token) of every step that was logged."""
        steps = self._trained("loss_history").folder.replay()
        return [(event.step, event.loss) for event in steps if isinstance(event, Stepped)]

    def ask(self, prompt: str, *, max_new_tokens: int = 128) -> str:
        """The tuned model's answer to one prompt."""
        from llm_finetune_kit.generation import answer

        result = self._trained("ask")
        ids = result.chat.prompt_ids([{"role": "user", "content": prompt}])
        with result.objective.precision():
            return answer(result.model, result.chat, ids, GenerationSection(max_new_tokens=max_new_tokens))

    def save(self, folder: str | Path | None = None) -> Path:
        """Where the tuned model is; with `folder`, a copy of it there. Raises MachineError where it cannot be written."""
        import shutil

        final: Path = self._trained("save").folder.final
        if folder is None:
            return final
        try:
            return Path(shutil.copytree(final, folder))
        except FileExistsError:
            fix = "name a folder that does not exist yet"
            raise MachineError(13, "there is something already", where=str(folder), fix=fix) from None
        except OSError as error:  # shutil.Error is one too
            raise MachineError(13, f"cannot be written: {error}", where=str(folder), fix="name another folder") from None

    def _trained(self, asked: str) -> Any:
        if self.result is None:
            raise ConfigError(11, "nothing is trained yet", where=f"{type(self).__name__}.{asked}", fix="call train() first")
        return self.result


class QuickTrainer(Trainer):
    """Three lines to a tuned model; any knob may be given by its name.

    >>> trainer = QuickTrainer("demo", "sample:chat", max_steps=2, compare=False, listen=lambda event: None)
    >>> result = trainer.train()
    >>> [step for step, loss in trainer.loss_history]
    [1, 2]
    >>> trainer.save().name
    'final'
    """

    def __init__(self, model: str | Path, data: Any, *, listen: Listen | None = None, **settings: Any) -> None:
        super().__init__(changed(RunConfig(), {"model.name": str(model)} | as_knobs(data) | spelled(settings)), listen)


class SimpleTrainer(Trainer):
    """Trains a model that `load_model` returned on data that `prepare_dataset` returned.

    >>> model, tokenizer, _ = load_model("demo")
    >>> prepared = prepare_dataset(load_dataset("sample:chat"), tokenizer)
    >>> trainer = SimpleTrainer(model, tokenizer, prepared, max_steps=100)
    >>> trainer.config.training.max_steps
    100
    """

    def __init__(self, model: Any, tokenizer: Any, dataset: Any, *, listen: Listen | None = None, **settings: Any) -> None:
        values = {"model.name": tokenizer.name_or_path} | as_knobs(dataset) | spelled(settings)
        super().__init__(changed(RunConfig(), values), listen, model)


def loaded(data: Any) -> Any:
    """What a loader of the user's own gives, or the data itself."""
    return data.load() if callable(getattr(data, "load", None)) else data


def as_knobs(data: Any) -> dict[str, Any]:
    """The knobs that stand for data given in Python: a name as it is, anything else as rows."""
    if isinstance(data, (str, Path)):
        return {"data.train_file": str(data)}
    from llm_finetune_kit.data.sources import held_out_beside, read_source

    data = data.rows if isinstance(data, PreparedDataset) else loaded(data)
    beside = held_out_beside(data)
    apart = {} if beside is None else {"data.eval_file": list(read_source(beside).rows)}
    return {"data.train_file": list(read_source(data).rows)} | apart


def spelled(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as Python words them, by names that a config knows; another tool's spelling keeps its meaning."""
    return {name if name in ALIASES else knob_named(name): value for name, value in settings.items()}


def knob_named(name: str) -> str:
    """The dotted path of a knob given by its name alone, its path or a known alias (`max_steps`, `lora_r`…)."""
    known = knobs()
    if name in known:
        return name
    if name in ALIASES:
        return ALIASES[name]
    same = [path for path in known if path.rpartition(".")[2] == name]
    if len(same) == 1:
        return same[0]
    near = nearest(name, [path.rpartition(".")[2] for path in known])
    raise ConfigError(2, f"unknown setting {name}", fix=f"did you mean {near[0]}?" if near else "for example max_steps or lora_r")


def _run(config: RunConfig, listen: Listen | None, model: Any) -> Any:
    from llm_finetune_kit.run import run

    if listen is not None:
        return run(config, listen, loaded=model)
    from llm_finetune_kit.terminal import Terminal

    with Terminal() as terminal:
        try:
            return run(config, terminal, loaded=model)
        except Interrupted as stop:  # no fault: what was saved and how to go on matters, not where it happened
            raise stop.with_traceback(None) from None
