"""The Python face of evaluation: ask, measure, compare, time. Nothing is decided here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llm_finetune_kit.config import DataSection, EvaluationSection, GenerationSection
from llm_finetune_kit.errors import UsageError


class Perplexity(float):
    """A perplexity, with the loss (nats per token) and bits per byte that it comes with, and how much was measured."""

    loss: float
    bits_per_byte: float
    rows: int
    target_tokens: int


def calculate_perplexity(model: Any, tokenizer: Any = None, data: Any = None, *, max_length: int | None = None) -> Perplexity:
    """How surprised a model is by data, all target tokens alike: by answers in conversations, by every token of texts.

    `model` is a name, a folder or a loaded model with its tokenizer; `data` is anything that training reads, or a list
    of texts.

    >>> calculate_perplexity("demo", data=["The cat sat on the mat."]) > 1
    True
    """
    from llm_finetune_kit.evaluation.perplexity import figures, rows_for

    settings, opened = DataSection(), _opened(model, tokenizer)
    rows = rows_for(opened, _read(data, settings), settings, max_length=max_length)
    found = figures(opened.objective, rows.tokens, opened.chat)
    perplexity = Perplexity(found.pop("perplexity"))
    vars(perplexity).update(found)
    return perplexity


def evaluate_model(
    model: Any,
    tokenizer: Any = None,
    prompts: Sequence[str] | None = None,
    *,
    references: Sequence[str] | None = None,
    data: Any = None,
    metrics: Sequence[Any] | None = None,
    how: GenerationSection | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """A model's answers to prompts, with metrics over them, and its perplexity on data.

    Gives `responses` (prompt, response, tokens, stopped and the reference, one each), `metrics` by their names, with
    `signatures`; and with `data` also loss, perplexity and bits_per_byte. A metric is a name, a function
    (predictions, references) -> float, or an object with such a `compute_metric`.

    >>> found = evaluate_model("demo", prompts=["Say hello."], references=["Hello."], metrics=["bleu"])
    >>> sorted(found["responses"][0])
    ['prompt', 'reference', 'response', 'stopped', 'tokens']
    """
    from llm_finetune_kit.evaluation.metrics import Said, chosen
    from llm_finetune_kit.evaluation.perplexity import figures, rows_for
    from llm_finetune_kit.generation import answers

    opened, settings = _opened(model, tokenizer), DataSection()
    found: dict[str, Any] = {}
    if data is not None:
        rows = rows_for(opened, _read(data, settings), settings)
        found |= figures(opened.objective, rows.tokens, opened.chat)
    asked, wanted = list(prompts or []), list(references or [])
    if wanted and len(wanted) != len(asked):
        problem = f"{len(asked)} prompts and {len(wanted)} references"
        raise UsageError(14, problem, where="references", fix="give one reference for each prompt")
    ids = [opened.chat.prompt_ids([{"role": "user", "content": text}]) for text in asked]
    with opened.objective.precision():
        said = Said(answers(opened.model, opened.chat, ids, how or GenerationSection(), seed=seed), wanted or [""] * len(asked))
    rows_said = zip(asked, said.answers, said.references, strict=True)
    found["responses"] = [
        {"prompt": text, "response": one.text, "tokens": one.tokens, "stopped": one.stopped, "reference": reference}
        for text, one, reference in rows_said
    ]
    chosen_metrics = chosen(metrics, said.references) if asked else []
    found["metrics"] = {metric.name: metric.value(said) for metric in chosen_metrics}
    found["signatures"] = {metric.name: metric.signature() for metric in chosen_metrics}
    return found


def compare_models(
    base: Any,
    tuned: Any = None,
    data: Any = None,
    *,
    prompts: Sequence[str] | None = None,
    tokenizer: Any = None,
    metrics: Sequence[Any] | None = None,
    rows: int | None = None,
    how: GenerationSection | dict[str, Any] | None = None,
    max_length: int | None = None,
    dtype: str | None = None,
    seed: int | None = None,
) -> dict[str, Any]:
    """Base against tuned on the same rows, with the same decoding: differences with intervals, and one sentence.

    Models are names, run folders, adapters or loaded models (then with their tokenizer). One model alone is compared
    with its own base. Without `data` or `prompts` the held-out rows of the run count, and whatever is not said
    (metrics, rows, seed and what is missing in `how`) is as it was at the run's end. See `evaluation.comparison` for
    what is in the result.

    >>> compare_models("demo", "demo", prompts=["Say hello."])["outcome"]
    'open'
    """
    from llm_finetune_kit.evaluation.sides import Questions
    from llm_finetune_kit.evaluation.two_models import compare_two, is_its_base

    first, second = (None, base) if tuned is None else (base, tuned)
    wish = _wish(second if data is None and prompts is None else None, how, metrics, rows, seed)
    own: list[Any] = [_opened(second, tokenizer, dtype)]
    if isinstance(first, (str, Path)) and is_its_base(str(first), own[0]):
        first = None
    ask, place = _asking(second, data, list(prompts) if prompts is not None else None, max_length, wish.seed, Questions)
    if first is None:
        return compare_two(None, own.pop, ask, wish, place)
    if isinstance(second, (str, Path)):
        own.clear()  # one model in memory at a time

    def open_tuned() -> Any:
        return own.pop() if own else _opened(second, tokenizer, dtype)

    return compare_two(lambda: _opened(first, tokenizer, dtype), open_tuned, ask, wish, place)


def benchmark_speed(
    model: Any,
    tokenizer: Any = None,
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 64,
    batch_size: int = 1,
    repeats: int = 3,
    dtype: str | None = None,
) -> dict[str, Any]:
    """Tokens per second of a model here: reading prompts (prefill) and writing answers (decode), apart.

    >>> benchmark_speed("demo", new_tokens=4, repeats=1)["decode_tokens_per_second"] > 0
    True
    """
    from llm_finetune_kit.evaluation.speed import measured_speed

    how = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "batch_size": batch_size, "repeats": repeats}
    for name, value in how.items():
        if value < 1:
            raise UsageError(15, f"{name} is {value}", where="benchmark_speed", fix="give a number of at least 1")
    return measured_speed(_opened(model, tokenizer, dtype), **how)


def _wish(
    run: Any, how: GenerationSection | dict[str, Any] | None, metrics: Sequence[Any] | None, rows: int | None, seed: int | None
) -> Any:
    """What is to be compared: as asked, then as `run` did at its end (if it is one), then by default."""
    from llm_finetune_kit.beginning import RESOLVED, decided_config
    from llm_finetune_kit.evaluation.two_models import Wish
    from llm_finetune_kit.folder import RunFolder
    from llm_finetune_kit.runs import find_result

    folder = find_result(str(run)).parent if isinstance(run, (str, Path)) else Path()
    then = decided_config(RunFolder(folder)) if run is not None and (folder / RESOLVED).is_file() else None
    usual = then.evaluation if then is not None else EvaluationSection()
    changes = how.model_dump() if isinstance(how, GenerationSection) else how or {}
    decoding = GenerationSection.model_validate(usual.generation.model_dump() | changes)
    began = then.training.seed if then is not None else 0
    return Wish(decoding, usual.metrics if metrics is None else metrics, rows or usual.rows, began if seed is None else seed)


def _opened(model: Any, tokenizer: Any = None, dtype: str | None = None) -> Any:
    from llm_finetune_kit.opening import open_here, opened

    if not isinstance(model, (str, Path)):
        if tokenizer is None:
            fix = "give it beside the model, or name a folder that holds both"
            raise UsageError(16, "a loaded model comes without its tokenizer", where="tokenizer", fix=fix)
        return opened(model, tokenizer)
    return open_here(str(model), dtype)


def _read(data: Any, settings: DataSection) -> Any:
    from llm_finetune_kit.data import prepare

    if data is None:
        raise UsageError(17, "there is no data to measure on", where="data", fix="name a file, rows, or texts")
    if isinstance(data, (list, tuple)) and data and all(isinstance(text, str) for text in data):
        data = [{"text": text} for text in data]
    return prepare.read(str(data) if isinstance(data, Path) else data, settings)


def _asking(
    tuned: Any, data: Any, prompts: list[str] | None, max_length: int | None, seed: int, questions: Any
) -> tuple[Callable[[Any], Any], Callable[[int], str]]:
    """How a model is asked, and what names a row: by prompts, by data, or by the held-out rows of the tuned one's run."""
    from llm_finetune_kit.evaluation.perplexity import rows_for
    from llm_finetune_kit.generation import positions

    if prompts is not None:
        return lambda model: questions.asking(
            prompts, model.chat, positions=positions(model.model)
        ), lambda row: f"prompt {row + 1}"
    if data is None:
        return _of_the_run(tuned, seed, questions)
    settings = DataSection()
    read = _read(data, settings)
    places: list[Callable[[int], str]] = []

    def ask(model: Any) -> Any:
        rows = rows_for(model, read, settings, max_length=max_length)
        places.append(rows.place)
        return questions.of(rows.tokens, model.chat, positions=positions(model.model), seed=seed, left_out=rows.left_out)

    return ask, lambda row: places[-1](row)


def _of_the_run(tuned: Any, seed: int, questions: Any) -> tuple[Callable[[Any], Any], Callable[[int], str]]:
    from llm_finetune_kit.beginning import material_of
    from llm_finetune_kit.folder import EVENTS, RunFolder
    from llm_finetune_kit.runs import find_result

    result = find_result(str(tuned)) if isinstance(tuned, (str, Path)) else Path()
    if not (result.parent / EVENTS).is_file():
        fix = "name rows that neither model was trained on: --data held_out.jsonl"
        raise UsageError(18, "it is no run, so it has no held-out rows of its own", where=str(tuned)[:80], fix=fix)
    material = material_of(RunFolder(result.parent))
    if material.held_out is None:
        raise UsageError(
            18, "the run held out no rows", where=str(tuned), fix="name rows that it was not trained on: --data FILE"
        )

    def ask(model: Any) -> Any:
        if model.chat.fingerprint() != material.chat.fingerprint():
            fix = "name the rows, so that each model can read them in its own way: --data held_out.jsonl"
            raise UsageError(19, "the two models have different tokenizers or templates", where=model.name, fix=fix)
        return questions.of(material.held_out, model.chat, positions=material.model.positions, seed=seed)

    return ask, material.held_out_place
