"""The Python face: short functions over `run`. Nothing is decided here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_finetune_kit.catalog import MODELS
from llm_finetune_kit.config import ALIASES, DataSection, GenerationSection, RunConfig, knobs
from llm_finetune_kit.errors import ConfigError, MachineError, nearest
from llm_finetune_kit.events import Event, Listen
from llm_finetune_kit.settings import changed


@dataclass(frozen=True)
class LoadedModel:
    """What `load_model` found out: the name it was asked for, where its files are and its number format."""

    name: str
    folder: Path
    dtype: str
    parameters: int


class Dataset(list[dict[str, Any]]):
    """Rows as `load_dataset` read them; `name` says where from."""

    def __init__(self, rows: list[dict[str, Any]], name: str) -> None:
        super().__init__(rows)
        self.name = name

    def __repr__(self) -> str:
        return f"Dataset({self.name!r}, {len(self):,} rows, columns {', '.join(self[0]) if self else 'none'})"


@dataclass(frozen=True)
class PreparedDataset:
    """Rows that were understood and tokenized; `report` says what became of each."""

    rows: list[dict[str, Any]]
    tokens: Any
    report: dict[str, Any]

    def __len__(self) -> int:
        return len(self.tokens)


def get_available_models() -> list[str]:
    """Short names that `load_model` and `--model` know."""
    return list(MODELS)


def estimate_training_time(
    model: str, data: Any = None, *, on: str | None = None, price: float | None = None, **settings: Any
) -> dict[str, Any]:
    """Time, cost and memory of a run, reckoned without starting it: seconds by part, dollars, bytes.

    `on` names another machine ("T4", "RTX 4090", "cpu 16GB"), `price` is in dollars an hour. Without data a usual
    set is assumed. Raises MachineError if the run cannot fit.

    >>> estimate_training_time("mistral-7b", on="RTX 4090")["time"]["total"] > 0
    True
    """
    from llm_finetune_kit.planning import plan_run

    values = {knob_named(name): value for name, value in settings.items()}
    asked = _as_knobs(data) if data is not None else {}
    plan = plan_run(changed(RunConfig(), {"model.name": model} | asked | values), on=on, price=price)
    return {"time": plan.time, "cost": plan.cost, "peak_memory": plan.peak_memory, "memory": plan.memory, "steps": plan.steps}


def load_model(name: str, *, dtype: str | None = None, revision: str | None = None) -> tuple[Any, Any, LoadedModel]:
    """A model and its tokenizer, in the number format that this machine computes fastest, and facts about them.

    `name` is a short name, a hub id or a local folder. Raises ModelError or MachineError.
    """
    from llm_finetune_kit.models.locate import locate

    located = locate(name, revision=revision)
    from llm_finetune_kit.hardware import this_machine
    from llm_finetune_kit.models.loading import load_base
    from llm_finetune_kit.models.tokenizer import load_tokenizer

    machine = this_machine()
    dtype = dtype or ("bfloat16" if machine.bfloat16 else "float32")
    chat = load_tokenizer(located.folder)
    model = load_base(located, dtype, machine.device)
    chat.tokenizer.name_or_path = located.name  # the hub id, not the place of its files: a trainer passes it on
    return model, chat.tokenizer, LoadedModel(name, located.folder, dtype, model.num_parameters())


def load_dataset(data: Any, *, format: str | None = None, columns: dict[str, str] | None = None) -> Dataset:
    """Rows of a data set, checked: a file, a folder, a hub id, `sample:NAME`, `alpaca`, `daily_dialog`, a list, a
    generator, a pandas frame, an object of `datasets`, or a loader with a method `load`.

    `format` and `columns` say what the rows are where detection would not. Raises DataError with place and fix.
    """
    from llm_finetune_kit.data.formats import detect, to_examples
    from llm_finetune_kit.data.ready import is_ready
    from llm_finetune_kit.data.sources import read_source

    source = read_source(_loaded(data))
    if not is_ready(source):
        to_examples(source, detect(source, format, columns), on_bad_rows="stop", system_prompt=None)
    return Dataset(list(source.rows), source.name)


def _loaded(data: Any) -> Any:
    """What a loader of the user's own gives, or the data itself."""
    return data.load() if callable(getattr(data, "load", None)) else data


def load_sample_dataset(name: str = "chat") -> Dataset:
    """A dataset of the package: `chat`, `instruct`, `code`, `summarization` or `translation`."""
    return load_dataset(f"sample:{name.removeprefix('sample:')}")


def get_dataset_stats(
    dataset: Any, *, model: str | None = None, eval_dataset: Any = None, max_length: int | None = None
) -> dict[str, Any]:
    """The quality report of a data set as plain values: counts, lengths and findings (see docs/data.md).

    With `model`, lengths are counted in its tokens too, and with `eval_dataset` leakage between the two is looked for.
    """
    from llm_finetune_kit.checking import check

    held_out = _loaded(eval_dataset)
    return check(_loaded(dataset), RunConfig(), held_out=held_out, model=model, max_length=max_length).report.to_dict()


def prepare_dataset(dataset: Any, tokenizer: Any, *, loss_on: str = "answers") -> PreparedDataset:
    """The dataset as token ids and masks under a tokenizer, with a report. Raises DataError for what cannot be used."""
    from llm_finetune_kit.data import prepare
    from llm_finetune_kit.models.tokenizer import ChatTokenizer

    rows = list(dataset) if isinstance(dataset, list) else list(load_dataset(dataset))
    settings = DataSection.model_validate({"loss_on": loss_on})
    chat = ChatTokenizer(tokenizer)
    encoded = prepare.tokenize(prepare.read(rows, settings), settings, chat, chat.fingerprint())
    return PreparedDataset(rows, encoded.tokens, encoded.report)


def _as_knobs(data: Any) -> dict[str, Any]:
    """The knobs that stand for data given in Python: a name as it is, anything else as rows."""
    if isinstance(data, (str, Path)):
        return {"data.train_file": str(data)}
    from llm_finetune_kit.data.sources import held_out_beside, read_source

    data = data.rows if isinstance(data, PreparedDataset) else _loaded(data)
    beside = held_out_beside(data)
    apart = {} if beside is None else {"data.eval_file": list(read_source(beside).rows)}
    return {"data.train_file": list(read_source(data).rows)} | apart


class ProgressCallback:
    """Calls `show(event)` for every event of a run; subclass or pass a function."""

    def __init__(self, show: Callable[[Event], None] | None = None) -> None:
        self.show = show

    def __call__(self, event: Event) -> None:
        if self.show is not None:
            self.show(event)


class QuickTrainer:
    """Three lines to a tuned model.

    >>> trainer = QuickTrainer("demo", "sample:chat", max_steps=2)  # doctest: +SKIP
    >>> trainer.train()  # doctest: +SKIP
    """

    def __init__(self, model: str | Path, data: Any, *, listen: Listen | None = None, **settings: Any) -> None:
        values = {knob_named(name): value for name, value in settings.items()}
        self.config = changed(RunConfig(), {"model.name": str(model)} | _as_knobs(data) | values)
        self.listen = listen
        self.result: Any = None

    def train(self) -> Any:
        """Run it, with progress in the terminal unless a listener was given; returns the run's `Result`."""
        self.result = _run(self.config, self.listen, None)
        return self.result

    def ask(self, prompt: str, *, max_new_tokens: int = 128) -> str:
        """The tuned model's answer. Call `train` first."""
        return _ask(self.result, prompt, max_new_tokens)


class SimpleTrainer:
    """Trains a model that `load_model` returned on data that `prepare_dataset` returned."""

    def __init__(self, model: Any, tokenizer: Any, dataset: Any, *, listen: Listen | None = None, **settings: Any) -> None:
        values = {knob_named(name): value for name, value in settings.items()}
        self.config = changed(RunConfig(), {"model.name": tokenizer.name_or_path} | _as_knobs(dataset) | values)
        self.model = model
        self.listen = listen
        self.result: Any = None

    def train(self) -> Any:
        """Run it; afterwards `model` is the tuned model. Returns the run's `Result`."""
        self.result = _run(self.config, self.listen, self.model)
        self.model = self.result.model
        return self.result

    def save(self, folder: str | Path | None = None) -> Path:
        """Where the tuned model is; with `folder`, a copy of it there."""
        import shutil

        if self.result is None:
            raise ConfigError(11, "nothing is trained yet", where="SimpleTrainer.save", fix="call train() first")
        final: Path = self.result.folder.final
        if folder is None:
            return final
        try:
            return Path(shutil.copytree(final, folder))
        except FileExistsError:
            fix = "name a folder that does not exist yet"
            raise MachineError(13, "there is something already", where=str(folder), fix=fix) from None
        except OSError as error:  # shutil.Error is one too
            raise MachineError(13, f"cannot be written: {error}", where=str(folder), fix="name another folder") from None


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
        return run(config, terminal, loaded=model)


def _ask(result: Any, prompt: str, max_new_tokens: int) -> str:
    from llm_finetune_kit.generation import answer

    if result is None:
        raise ConfigError(11, "nothing is trained yet", fix="call train() first")
    ids = result.chat.prompt_ids([{"role": "user", "content": prompt}])
    with result.objective.precision():
        return answer(result.model, result.chat, ids, GenerationSection(max_new_tokens=max_new_tokens))


def generate(
    model: str,
    prompt: str,
    *,
    system: str | None = None,
    how: GenerationSection | None = None,
    seed: int = 0,
    dtype: str | None = None,
) -> str:
    """The answer of a model, an adapter or a run to one prompt."""
    return generate_all(model, [prompt], system=system, how=how, seed=seed, dtype=dtype)[0]


def generate_all(
    model: str,
    prompts: list[str],
    *,
    system: str | None = None,
    how: GenerationSection | None = None,
    seed: int = 0,
    dtype: str | None = None,
) -> list[str]:
    """The answers to many prompts, computed together."""
    from llm_finetune_kit.generation import answers

    opened = _open(model, dtype)
    ids = [_prompt_ids(opened, prompt, system) for prompt in prompts]
    with opened.objective.precision():
        return [one.text for one in answers(opened.model, opened.chat, ids, how or GenerationSection(), seed=seed)]


def stream(
    model: str,
    prompt: str,
    *,
    system: str | None = None,
    how: GenerationSection | None = None,
    seed: int = 0,
    dtype: str | None = None,
) -> Iterator[str]:
    """The answer to one prompt in pieces, as they are made."""
    from llm_finetune_kit.generation.stream import stream as pieces

    opened = _open(model, dtype)
    asked = _prompt_ids(opened, prompt, system), how or GenerationSection()
    return pieces(opened.model, opened.chat, *asked, seed=seed, precision=opened.objective.precision)


def _open(model: str, dtype: str | None) -> Any:
    from llm_finetune_kit.hardware import this_machine
    from llm_finetune_kit.opening import open_model

    machine = this_machine()
    return open_model(model, dtype=dtype or ("bfloat16" if machine.bfloat16 else "float32"), device=machine.device)


def _prompt_ids(opened: Any, prompt: str, system: str | None) -> Any:
    messages = [{"role": "system", "content": system}] if system else []
    return opened.chat.prompt_ids([*messages, {"role": "user", "content": prompt}])
