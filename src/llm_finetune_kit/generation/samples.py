"""What a run asks its model before, during and after training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from llm_finetune_kit.events import Listen, Sampled, Stage, Warned
from llm_finetune_kit.generation import answers
from llm_finetune_kit.hardware import release_memory
from llm_finetune_kit.plan.speed import SAMPLES
from llm_finetune_kit.training.room import is_out_of_memory

Asked = tuple[list[int], str, str]  # ids, text and reference answer (may be empty) of a prompt


def sample_prompts(material: Any) -> list[Asked]:
    """Prompts of a `Material` to answer before, during and after training."""
    chat, asked = material.chat, material.plan.config.evaluation.prompts
    if asked:
        return [(chat.prompt_ids([{"role": "user", "content": text}]), text, "") for text in asked]
    tokens = material.shown
    found = []
    for index in range(min(SAMPLES, len(tokens))):
        ids, trained = tokens.example(index)
        first = int(np.flatnonzero(trained)[0])
        if first == 0:  # raw text: begin with its first words
            first = min(16, len(ids) // 2)
        last = first + int(np.argmin(np.append(trained[first:], False)))  # the end of the first answer
        asked, reference = ids[:first].tolist(), ids[first:last].tolist()
        found.append((asked, chat.decode(asked).strip(), chat.decode(reference).strip()))
    return found


def answer_samples(objective: Any, material: Any, prompts: list[Asked], step: int, say: Listen) -> None:
    """Have the model answer the sample prompts and tell the answers."""
    say(Stage("answer", f"{len(prompts)} sample prompts"))
    _ask(objective, material, prompts, step, say, lambda: False)


class _Left(Exception):
    """The answers were left because the run is to stop."""


def answer_during(
    objective: Any, material: Any, prompts: list[Asked], step: int, say: Listen, asked_to_stop: Callable[[], bool]
) -> bool:
    """The same in the midst of training, which it leaves as it was; whether it came to its end.

    It does not where the run is to stop within a step. That memory is too short for it costs a warning, not the run.
    """
    try:
        _ask(objective, material, prompts, step, say, asked_to_stop)
    except _Left:
        return False
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        release_memory()
        say(Warned(f"the sample answers after step {step} are left out: memory ran out", "evaluation.sample_steps=1000000"))
    return True


def _ask(objective: Any, material: Any, prompts: list[Asked], step: int, say: Listen, asked_to_stop: Callable[[], bool]) -> None:
    def go_on(_: list[int]) -> bool:
        if asked_to_stop():
            raise _Left
        return True

    how = material.plan.config.evaluation.generation
    with objective.precision():
        said = answers(objective.model, material.chat, [ids for ids, _, _ in prompts], how, heard=go_on)
    for (_, text, reference), one in zip(prompts, said, strict=True):
        say(Sampled(step, text, one.text, reference))
