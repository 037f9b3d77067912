"""The gate: cut to the length limit, then refuse what would train the wrong thing, or nothing.

What it knows about masks it finds in the tokens alone: where the template's prompts end and which tokens end an
answer. Nothing of the code that made the masks is used, so a fault there is caught here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llm_finetune_kit.config import DataSection
from llm_finetune_kit.data.masks import Tokens
from llm_finetune_kit.data.renderer import Renderer
from llm_finetune_kit.data.spans import EMPTY_THOUGHT
from llm_finetune_kit.errors import DataError, ModelError

MOST_CUT = 0.5  # share of learned tokens that may be lost to max_length before training is refused
SAMPLED = 64  # examples whose learned tokens are looked at one by one
# A tokenizer may join the end of a prompt with the start of an answer in some rows; a wrong mask is wrong in all.
MOST_ODD = 0.1

Place = Callable[[int], str]


@dataclass(frozen=True)
class MaskFacts:
    """What the gate knows about a set of tokens."""

    examples: int
    tokens: int
    target_tokens: int
    nothing_learned: np.ndarray  # indices of examples without a single target
    open_ended: int  # answers at the end of an example whose last learned token does not end the turn
    double_bos: int
    thinking: bool | None = None  # False: the template puts an empty thought before answers, and none has another


def inspect(tokens: Tokens, chat: Renderer) -> MaskFacts:
    """Facts about masks that decide whether training may start."""
    targets = tokens.targets
    learned = np.flatnonzero(targets > 0)
    double = 0
    if chat.bos_id is not None and chat.bos_id != chat.eos_id:
        long_enough = np.flatnonzero(tokens.lengths > 1)
        first = tokens.starts[:-1][long_enough]
        double = int(((tokens.ids[first] == chat.bos_id) & (tokens.ids[first + 1] == chat.bos_id)).sum())
    return MaskFacts(
        examples=len(tokens),
        tokens=len(tokens.ids),
        target_tokens=int(targets.sum()),
        nothing_learned=np.flatnonzero(targets == 0),
        open_ended=int((~_closed(tokens, learned, chat)).sum()),
        double_bos=double,
    )


def _closed(tokens: Tokens, learned: np.ndarray, chat: Renderer) -> np.ndarray:
    """Whether the last learned tokens of these examples are an end token and at most white space after it."""
    stops = np.asarray(chat.stop_ids())
    places = np.flatnonzero(tokens.trained)
    last = places[np.searchsorted(places, tokens.starts[1:][learned]) - 1] if len(places) else np.zeros(0, np.int64)
    for _ in range(2):  # templates write one line feed after an end token, which is one token, at most two
        blank = [int(index) for index in np.unique(tokens.ids[last]) if index not in stops and not chat.decode([index]).strip()]
        back = np.isin(tokens.ids[last], blank) & (last > tokens.starts[:-1][learned]) & tokens.trained[np.maximum(last - 1, 0)]
        last = last - back
    return np.isin(tokens.ids[last], stops)


def gate(
    tokens: Tokens,
    chat: Renderer,
    settings: DataSection,
    name: str,
    max_length: int,
    *,
    place: Place | None = None,
    texts: bool = False,
    own_masks: bool = False,
    limit: int | None = None,
    may_leave_out: bool = True,
) -> tuple[Tokens, MaskFacts, list[str]]:
    """Cut to `max_length`, then refuse what would train the wrong thing.

    `place` turns a source row into its file and line. `texts` says that raw texts may be among the examples,
    which are learned from their first token on; `own_masks`, that the rows came with masks of their user's making,
    so that an end that is not learned is told and not refused; `limit`, how much the model can read at all. Where most
    of the answers is cut, data.on_bad_rows=drop leaves out the examples whose answers are, unless the set cannot lose
    any (`may_leave_out` is false for a stream, whose examples are counted before they are cut). Returns the tokens to
    train on, facts about their masks, and warnings. Raises DataError if nothing is learned, a prompt is learned, an
    answer's end is not, BOS stands twice, or too much of the answers is cut.
    """
    whole = inspect(tokens, chat)
    if whole.double_bos:
        raise DataError(
            132, f"{whole.double_bos} examples begin with two BOS tokens", where=name, fix="remove the BOS text from the rows"
        )
    warnings = []
    if settings.loss_on == "answers":
        endless = _endless(_without_texts(tokens) if texts else tokens, chat, name)
        if endless and not own_masks:
            raise endless
        warnings += [endless.problem] if endless else []
        sample = _sample(tokens)
        if not own_masks:
            _look_at(tokens, sample, chat, name, texts)
        warnings += _open_inside(tokens, sample, chat)
        whole = replace(whole, thinking=_thinking(tokens, sample, chat))
    cut, cut_rows, cut_targets = tokens.cut(max_length)
    if cut_targets > MOST_CUT * whole.target_tokens:
        intact = np.flatnonzero((cut.targets == tokens.targets) & (cut.targets > 0)) if may_leave_out else np.zeros(0, np.int64)
        if settings.on_bad_rows == "stop" or not len(intact):
            raise _mostly_cut(tokens, cut_targets / whole.target_tokens, len(intact), name, max_length, limit)
        told = f"{len(tokens) - len(intact):,} of {whole.examples:,} examples are left out"
        warnings.append(f"{told}: their answers go on beyond max_length {max_length}")
        cut, cut_rows, cut_targets = tokens.select(intact).cut(max_length)
    facts = replace(inspect(cut, chat), thinking=whole.thinking)
    if cut_rows:
        warnings.append(
            f"{cut_rows} of {whole.examples} examples are cut at {max_length} tokens; {cut_targets:,} learned tokens are lost"
        )
    if len(facts.nothing_learned):
        longer = _longer(max_length, limit)
        cut, facts = _without_untrainable(cut, facts, chat, settings, name, max_length, longer, place, warnings)
    return cut, facts, warnings


def _mostly_cut(tokens: Tokens, lost: float, intact: int, name: str, max_length: int, limit: int | None) -> DataError:
    """The refusal of a set whose answers are mostly cut, with what helps: more length only where the model can read more."""
    longest = int(tokens.lengths.max())
    reads = f"the longest example has {longest:,} tokens"
    if limit is None or max_length < limit:
        most = "as far as the model can read" if limit is None else f"to at most {limit:,}, which is all that the model can read"
        ways = [f"raise model.max_length {most} ({reads})"]
    else:
        ways = [f"choose a model that reads more than {limit:,} tokens ({reads})"]
    ways.append("shorten or split the rows")
    if intact:
        ways.append(f"train only on the {intact:,} of {len(tokens):,} examples whose answers are whole: data.on_bad_rows=drop")
    return DataError(
        134,
        f"{lost:.0%} of what is to be learned lies beyond max_length {max_length}",
        where=name,
        why="" if limit is None or max_length < limit else "the model can read no more",
        fix=", or ".join(ways),
    )


def _without_texts(tokens: Tokens) -> Tokens:
    """The examples of which not every token is learned."""
    return tokens.select(np.flatnonzero(tokens.targets < tokens.lengths - 1))


def _endless(tokens: Tokens, chat: Renderer, name: str) -> DataError | None:
    facts = inspect(tokens, chat)
    if not facts.open_ended:
        return None
    return DataError(
        133,
        f"the end of {facts.open_ended} of {facts.examples} answers is not learned, so the model would never stop",
        where=name,
        fix="use a chat template that closes each answer with the end-of-turn token, such as data.template=default",
    )


def _without_untrainable(
    tokens: Tokens,
    facts: MaskFacts,
    chat: Renderer,
    settings: DataSection,
    name: str,
    max_length: int,
    longer: str,
    place: Place | None,
    warnings: list[str],
) -> tuple[Tokens, MaskFacts]:
    bad = facts.nothing_learned
    places = [place(int(row)) if place else f"row {row + 1}" for row in tokens.rows[bad[:5]]]
    rows = in_short(places) + (" …" if len(bad) > 5 else "")
    every = len(bad) == facts.examples
    if every or settings.on_bad_rows == "stop":
        raise DataError(
            135,
            f"{len(bad):,} of {facts.examples:,} examples ({len(bad) / facts.examples:.1%}) have no token to learn ({rows})",
            where=name,
            why=f"their prompts alone reach max_length {max_length}, so the answers are cut off entirely",
            fix=longer + ("" if every else ", or train without them: data.on_bad_rows=drop"),
        )
    warnings.append(f"{len(bad):,} examples without a token to learn are left out ({rows})")
    kept = tokens.select(np.setdiff1d(np.arange(len(tokens)), bad))
    return kept, replace(inspect(kept, chat), thinking=facts.thinking)


def _longer(max_length: int, limit: int | None) -> str:
    """What lets a model read more of a row than `max_length`."""
    if limit is None or max_length < limit:
        return f"raise model.max_length above {max_length}"
    return f"shorten these prompts, or choose a model that reads more than {limit:,} tokens"


def in_short(places: list[str]) -> str:
    """Places with commas between them, each file named once: `a.jsonl line 3, line 7`."""
    told, file = [], ""
    for found in places:
        begin, mark, number = found.rpartition(" line ")
        told.append(f"line {number}" if mark and begin == file else found)
        file = begin if mark else ""
    return ", ".join(told)


# --- what is learned, looked at ----------------------------------------------------------------------------


def _sample(tokens: Tokens) -> list[int]:
    """Examples that learn something, from the first to the last."""
    learned = np.flatnonzero(tokens.targets > 0)
    places = np.linspace(0, len(learned) - 1, min(SAMPLED, len(learned))).astype(int)
    return [int(index) for index in learned[np.unique(places)]]


def _look_at(tokens: Tokens, sample: list[int], chat: Renderer, name: str, texts: bool) -> None:
    """Refuse masks whose learned tokens are not answers: after a prompt, up to an end token, and no further."""
    prompts = _prompt_ends(chat)
    faults: dict[str, list[int]] = {"too much": [], "too early": [], "not from": [], "without": []}
    looked_at = 0
    for index in sample:
        ids, trained = tokens.example(index)
        if texts and trained.all():
            continue
        for first, last in _runs(trained):
            looked_at += 1
            if fault := _fault(ids, first, last, prompts, chat):
                faults[fault].append(index)
    meaning = {
        "too much": "a prompt is learned: learned tokens go on after the end of an answer",
        "too early": "a prompt is learned: learned tokens begin before an answer",
        "not from": "learned tokens do not begin where the model begins to answer",
        "without": "the end of answers is left out of what is learned",
    }
    for fault, found in faults.items():
        if len(found) > MOST_ODD * looked_at:
            raise DataError(
                122,
                f"{meaning[fault]} ({len(found)} of {looked_at} answers looked at)",
                where=name,
                why="the mask does not fit the chat template",
                fix="look at it with `finetune data preview`, and use another template: data.template=default",
            )


def _thinking(tokens: Tokens, sample: list[int], chat: Renderer) -> bool | None:
    """False where empty thoughts stand before the last answers and no other thoughts are learned."""
    empty = False
    for index in sample:
        ids, trained = tokens.example(index)
        first, last = _runs(trained)[-1]
        if chat.decode(ids[first : min(last, first + 8)].tolist(), keep_special=True).lstrip().startswith("<think>"):
            return None
        empty = empty or len(_before_empty_thought(ids[:first].tolist(), chat)) < first
    return False if empty else None


def _runs(trained: np.ndarray) -> list[tuple[int, int]]:
    """First and one past the last of each unbroken run of learned tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], trained.astype(np.int8), [0]])))
    return [(int(first), int(last)) for first, last in edges.reshape(-1, 2)]


def _prompt_ends(chat: Renderer) -> list[list[int]]:
    """The token sequences with which prompts end, whatever was asked: after a question, and after a function's result."""
    found = [_shared_end([_asked([{"role": "user", "content": text}], chat) for text in ("zq", "b?", "1.", "so\n")])]
    if chat.can.tools:
        call = {"type": "function", "id": "call00000", "function": {"name": "f", "arguments": {}}}
        question: dict[str, Any] = {"role": "user", "content": "a"}
        talk = [question, {"role": "assistant", "content": "", "tool_calls": [call]}]
        results = [{"role": "tool", "content": text, "tool_call_id": "call00000"} for text in ("zq", "b?", "1.")]
        try:
            found.append(_shared_end([_asked([*talk, result], chat) for result in results]))
        except ModelError:  # it wants more of a conversation than this
            pass
    if chat.marks_answers:  # what such a template lets the model write may begin within the prompt
        text, answers = chat.render_answers([{"role": "user", "content": "a"}, {"role": "assistant", "content": "zq"}])
        found.append(list(chat.backend.encode(text[: answers[0][0]], add_special_tokens=False).ids)[-len(found[0]) + 1 :])
    return [ids for ids in found if ids]


def _asked(messages: list[dict[str, Any]], chat: Renderer) -> list[int]:
    return list(chat.backend.encode(chat.render([messages], ask=True)[0], add_special_tokens=False).ids)


def _shared_end(sequences: list[list[int]]) -> list[int]:
    end: list[int] = []
    for column in zip(*map(reversed, sequences), strict=False):
        if len(set(column)) > 1:
            break
        end.append(column[0])
    return end[::-1]


def _fault(ids: np.ndarray, first: int, last: int, prompts: list[list[int]], chat: Renderer) -> str:
    """What is wrong with a run of learned tokens; "" if nothing is."""
    stops, special = set(chat.stop_ids()), set(chat.specials.values())
    run = ids[first:last].tolist()
    ended = next((place for place, index in enumerate(run) if index in stops), None)
    after = [] if ended is None else run[ended + 1 :]
    if any(index in special - stops or chat.decode([index]).strip() for index in after):
        return "too much"
    if ended is None and last < len(ids) and int(ids[last]) in stops:
        return "without"
    before = _before_empty_thought(ids[:first].tolist(), chat)
    if any(_ends_with(before, prompt, chat) for prompt in prompts):
        return ""
    for prompt in prompts:  # the end of the prompt may lie within the learned tokens
        for inside in range(1, min(len(prompt), len(run)) + 1):
            if (before + run[:inside])[-len(prompt) :] == prompt:
                return "too early"
            joined = before[inside - len(prompt) :] == prompt[:-inside] if inside < len(prompt) else False
            if joined and chat.decode(run[:1], keep_special=True).startswith(chat.decode(prompt[-inside:], keep_special=True)):
                return ""  # the tokenizer joins the end of the prompt with the start of the answer
    return "not from"


def _ends_with(before: list[int], prompt: list[int], chat: Renderer) -> bool:
    """Whether the ids end with the prompt's, or read so: a tokenizer may join the prompt's start with a question's end."""
    if before[-len(prompt) :] == prompt:
        return True
    tail = before[-len(prompt) - 2 :]
    return chat.decode(tail, keep_special=True).endswith(chat.decode(prompt, keep_special=True).lstrip())


def _before_empty_thought(ids: list[int], chat: Renderer) -> list[int]:
    """The ids without an empty thought at their end, which a template puts between prompt and answer."""
    tail = ids[-16:]
    if EMPTY_THOUGHT.search(chat.decode(tail, keep_special=True)):
        for start in range(len(tail)):
            if EMPTY_THOUGHT.fullmatch(chat.decode(tail[start:], keep_special=True)):
                return ids[: len(ids) - len(tail) + start]
    return ids


def _open_inside(tokens: Tokens, sample: list[int], chat: Renderer) -> list[str]:
    """A warning where answers before the last have no end token, as with templates that end only the last."""
    stops = chat.stop_ids()
    inner = [(index, run) for index in sample for run in _runs(tokens.example(index)[1])[:-1]]
    open_ended = sum(not np.isin(tokens.example(index)[0][first:last], stops).any() for index, (first, last) in inner)
    if not open_ended:
        return []
    return [
        f"the chat template closes only the last answer of a conversation: {open_ended} of {len(inner)} earlier answers "
        "looked at have no end token, and nothing of when to stop is learned there"
    ]
