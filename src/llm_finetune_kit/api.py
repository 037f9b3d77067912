"""The Python face: short functions over `run`. Nothing is decided here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_finetune_kit.catalog import MODELS
from llm_finetune_kit.config import DataSection, GenerationSection, RunConfig
from llm_finetune_kit.settings import changed
from llm_finetune_kit.trainers import PreparedDataset, as_knobs, loaded, spelled

if TYPE_CHECKING:
    from llm_finetune_kit.generation import Answer


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


def get_available_models() -> list[str]:
    """Short names that `load_model` and `--model` know.

    >>> "tinyllama" in get_available_models()
    True
    """
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

    asked = as_knobs(data) if data is not None else {}
    plan = plan_run(changed(RunConfig(), {"model.name": model} | asked | spelled(settings)), on=on, price=price)
    return {"time": plan.time, "cost": plan.cost, "peak_memory": plan.peak_memory, "memory": plan.memory, "steps": plan.steps}


def load_model(name: str, *, dtype: str | None = None, revision: str | None = None) -> tuple[Any, Any, LoadedModel]:
    """A model and its tokenizer, in the number format that this machine computes fastest, and facts about them.

    `name` is a short name, a hub id or a local folder. Raises ModelError or MachineError.

    >>> model, tokenizer, facts = load_model("demo")
    >>> facts.parameters
    4492032
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

    >>> load_dataset([{"prompt": "Say hello.", "response": "Hello."}])
    Dataset('rows', 1 rows, columns prompt, response)
    """
    from llm_finetune_kit.data.formats import detect, to_examples
    from llm_finetune_kit.data.ready import is_ready
    from llm_finetune_kit.data.sources import read_source

    source = read_source(loaded(data))
    if not is_ready(source):
        to_examples(source, detect(source, format, columns), on_bad_rows="stop", system_prompt=None)
    return Dataset(list(source.rows), source.name)


def load_sample_dataset(name: str = "chat") -> Dataset:
    """A dataset of the package: `chat`, `instruct`, `code`, `summarization` or `translation`.

    >>> len(load_sample_dataset("chat"))
    20
    """
    return load_dataset(f"sample:{name.removeprefix('sample:')}")


def get_dataset_stats(
    dataset: Any, *, model: str | None = None, eval_dataset: Any = None, max_length: int | None = None
) -> dict[str, Any]:
    """The quality report of a data set as plain values: counts, lengths and findings (see docs/data.md).

    With `model`, lengths are counted in its tokens too, and with `eval_dataset` leakage between the two is looked for.

    >>> get_dataset_stats("sample:chat")["verdict"]
    'good to train'
    """
    from llm_finetune_kit.checking import check

    held_out = loaded(eval_dataset)
    return check(loaded(dataset), RunConfig(), held_out=held_out, model=model, max_length=max_length).to_dict()


def prepare_dataset(dataset: Any, tokenizer: Any, *, loss_on: str = "answers") -> PreparedDataset:
    """The dataset as token ids and masks under a tokenizer, with a report. Raises DataError for what cannot be used.

    >>> _, tokenizer, _ = load_model("demo")
    >>> len(prepare_dataset(load_dataset("sample:chat"), tokenizer))
    20
    """
    from llm_finetune_kit.data import prepare
    from llm_finetune_kit.models.tokenizer import ChatTokenizer

    rows = list(dataset) if isinstance(dataset, list) else list(load_dataset(dataset))
    settings = DataSection.model_validate({"loss_on": loss_on})
    chat = ChatTokenizer(tokenizer)
    encoded = prepare.tokenize(prepare.read(rows, settings), settings, chat, chat.fingerprint())
    return PreparedDataset(rows, encoded.tokens, encoded.report)


def generate(
    model: str,
    prompt: str,
    *,
    system: str | None = None,
    how: GenerationSection | None = None,
    seed: int = 0,
    dtype: str | None = None,
) -> str:
    """The answer of a model, an adapter or a run to one prompt.

    >>> generate("demo", "How are you?", how=GenerationSection(max_new_tokens=4)) != ""
    True
    """
    return answer_all(model, [prompt], system=system, how=how, seed=seed, dtype=dtype)[0].text


def answer_all(
    model: str,
    prompts: Sequence[str | list[dict[str, Any]]],
    *,
    system: str | None = None,
    how: GenerationSection | None = None,
    seed: int = 0,
    dtype: str | None = None,
) -> list[Answer]:
    """The answers to many prompts, or to conversations that end with a question, computed together: each with its length
    in tokens and whether it ended by itself."""
    from llm_finetune_kit.generation import answers

    opened = _open(model, dtype)
    ids = [_prompt_ids(opened, prompt, system) for prompt in prompts]
    with opened.objective.precision():
        return answers(opened.model, opened.chat, ids, how or GenerationSection(), seed=seed)


def stream(
    model: str,
    prompt: str,
    *,
    system: str | None = None,
    how: GenerationSection | None = None,
    seed: int = 0,
    dtype: str | None = None,
    ended: Callable[[Answer], object] | None = None,
) -> Iterator[str]:
    """The answer to one prompt in pieces, as they are made; `ended` is given the whole of it at its end.

    >>> "".join(stream("demo", "How are you?")) == generate("demo", "How are you?")
    True
    """
    from llm_finetune_kit.generation.stream import stream as pieces

    opened = _open(model, dtype)
    asked = _prompt_ids(opened, prompt, system), how or GenerationSection()
    return pieces(opened.model, opened.chat, *asked, seed=seed, precision=opened.objective.precision, ended=ended)


def _open(model: str, dtype: str | None) -> Any:
    from llm_finetune_kit.opening import open_here

    return open_here(model, dtype)


def _prompt_ids(opened: Any, prompt: str | list[dict[str, Any]], system: str | None) -> Any:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    own = messages[0]["role"] == "system"
    return opened.chat.prompt_ids([{"role": "system", "content": system}, *messages] if system and not own else messages)
