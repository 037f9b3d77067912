"""Two models on the same rows or prompts: an adapter with itself switched off, or one model after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llm_finetune_kit.config import GenerationSection
from llm_finetune_kit.errors import UsageError
from llm_finetune_kit.evaluation.asking import Prompt, how_many, usual_count
from llm_finetune_kit.evaluation.comparison import Row, compared
from llm_finetune_kit.evaluation.metrics import chosen
from llm_finetune_kit.evaluation.sides import Questions, Side, side
from llm_finetune_kit.models.adapters import without_adapter
from llm_finetune_kit.models.locate import locate
from llm_finetune_kit.opening import Opened
from llm_finetune_kit.runs import find_result

ANSWERING = 60.0  # seconds for the answers of both models: who asks for a comparison waits a minute for it

Ask = Callable[[Opened], Questions]
Place = Callable[[int], str]  # names a row as a person finds it


@dataclass(frozen=True)
class Wish:
    """What of two models is to be compared, and how they answer."""

    how: GenerationSection
    metrics: Sequence[Any] | None = None
    rows: int | None = None
    seed: int = 0


def compare_two(base: Callable[[], Opened] | None, tuned: Callable[[], Opened], ask: Ask, wish: Wish, place: Place) -> Row:
    """The comparison of two models, each opened when it is its turn and let go after it; see `comparison`.

    Without a `base` it is the tuned one with its adapter switched off. Raises UsageError where there is no adapter.
    """
    if base is None:
        return _in_place(tuned(), ask, wish, place)
    opened = base()
    name, asked = opened.name, ask(opened)
    prompts, why, metrics = _choose(opened.objective, asked, wish)
    before = side(name, opened.objective, asked, wish.how, prompts=prompts, seed=wish.seed)
    del opened
    opened = tuned()
    theirs = ask(opened)
    by_row = {prompt.row: prompt for prompt in theirs.prompts}
    both = [index for index, prompt in enumerate(prompts) if prompt.row in by_row]
    prompts = [by_row[prompts[index].row] for index in both]
    before = Side(before.name, before.tokenizer, before.losses, before.general, [before.answers[i] for i in both], before.speed)
    after = side(opened.name, opened.objective, theirs, wish.how, prompts=prompts, seed=wish.seed)
    return _compared(before, after, prompts, metrics, wish, why, theirs, place)


def _in_place(opened: Opened, ask: Ask, wish: Wish, place: Place) -> Row:
    if not opened.is_adapter:
        fix = "name its base too: finetune compare BASE TUNED"
        raise UsageError(13, "it is a whole model, which does not know its base", where=opened.name, fix=fix)
    asked = ask(opened)
    with without_adapter(opened.model):
        prompts, why, metrics = _choose(opened.objective, asked, wish)
        name = opened.base.name if opened.base is not None else "base"
        before = side(name, opened.objective, asked, wish.how, prompts=prompts, seed=wish.seed)
    after = side(opened.name, opened.objective, asked, wish.how, prompts=prompts, seed=wish.seed)
    return _compared(before, after, prompts, metrics, wish, why, asked, place)


def _choose(objective: Any, asked: Questions, wish: Wish) -> tuple[list[Prompt], str, list[Any]]:
    """The prompts that both answer, why so many, and what is counted in the answers."""
    metrics = chosen(wish.metrics, [prompt.reference for prompt in asked.prompts])
    usual = usual_count(objective.model, wish.how.max_new_tokens, ANSWERING)
    count, why = how_many(len(asked.prompts), wish.rows, usual)
    return asked.prompts[: count if metrics else 0], why, metrics


def _compared(
    before: Side,
    after: Side,
    prompts: list[Prompt],
    metrics: list[Any],
    wish: Wish,
    why: str,
    asked: Questions,
    place: Place,
) -> Row:
    found = compared(
        before,
        after,
        prompts,
        metrics,
        place=place,
        why=why,
        of=len(asked.prompts),
        decoding=wish.how.model_dump() | {"seed": wish.seed},
        wanted=None if wish.metrics is None else [name for name in wish.metrics if isinstance(name, str)],
        seed=wish.seed,
    )
    return found | {"rows": found["rows"] | {"left_out": asked.left_out}}


def is_its_base(name: str, adapter: Opened) -> bool:
    """Whether a name means the base that an adapter was opened on, so that it need not be loaded a second time."""
    if adapter.base is None:
        return False
    found = find_result(name)
    folder = found if found.is_dir() else locate(name).folder
    return folder.resolve() == adapter.base.folder.resolve()
