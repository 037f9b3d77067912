"""The gate: what would train the wrong thing, or nothing, stops before any weight is loaded."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from families import FAMILIES, KINDS, SHARED, TALKS, TWINS, Talk, chat_of, encoded, own_template, talk
from llm_finetune_kit.config import DataSection
from llm_finetune_kit.data.formats import Example
from llm_finetune_kit.data.gate import MaskFacts, gate, in_short, inspect
from llm_finetune_kit.data.masks import Tokens, encode
from llm_finetune_kit.errors import DataError
from llm_finetune_kit.models.tokenizer import ChatTokenizer, load_tokenizer

pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="the folder with real data is not here")

LONG = talk("why? " * 60, "short")
SHORT = talk("why?", "Because it is so.")


def gated(chat: ChatTokenizer, *talks: Talk, max_length: int = 10_000, **settings: Any) -> tuple[Tokens, MaskFacts, list[str]]:
    asked = DataSection.model_validate(settings)
    tokens = encoded(chat, *talks, loss_on=asked.loss_on)
    return gate(tokens, chat, asked, "rows.jsonl", max_length, place=lambda row: f"line {row + 1}")


def refused(*arguments: Any, **settings: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        gated(*arguments, **settings)
    assert caught.value.exit_code == 3
    assert caught.value.where == "rows.jsonl"
    assert caught.value.fix
    return caught.value


# --- what is right passes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*FAMILIES, *TWINS])
def test_right_masks_pass_and_nothing_is_said(name: str, kind: str) -> None:
    chat = chat_of(name, kind)
    tokens, facts, warnings = gated(chat, *TALKS.values())
    assert (facts.examples, facts.open_ended, facts.double_bos, warnings) == (len(TALKS), 0, 0, [])
    assert tokens.ids.tolist() == encoded(chat, *TALKS.values()).ids.tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_thoughts_and_calls_pass_too(name: str, kind: str) -> None:
    chat = chat_of(name, kind)
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "this"}}}
    tool = {"type": "function", "function": {"name": "look", "description": "Looks", "parameters": {"type": "object"}}}
    called: Talk = [
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "a cat"},
        {"role": "assistant", "content": "A cat."},
    ]
    thought = talk("1 + 1?", "<think>\none and one\n</think>\n\n2", "And 2?", "<think>\ntwo and two\n</think>\n\n4")
    tokens = encode([Example(called, None, 0, tools=[tool]), Example(thought, None, 1)], chat)
    assert gate(tokens, chat, DataSection(), "rows", 10_000)[2] == []


def test_raw_texts_pass_where_they_are_expected() -> None:
    chat = chat_of("trl/llama3")
    tokens = encode([Example(None, "Now is the winter", 0), Example(SHORT, None, 1)], chat)
    assert gate(tokens, chat, DataSection(), "rows", 100, texts=True)[1].examples == 2
    with pytest.raises(DataError, match="learned"):
        gate(tokens, chat, DataSection(), "rows", 100)


def test_a_model_taught_without_thoughts_is_asked_without_them(tmp_path: Path) -> None:
    """Qwen 3's template puts an empty thought before such answers, but asks for a thought unless it is told not to."""
    chat = _with_template(chat_of("trl/qwen3"), chat_of("trl/qwen3").template)
    tokens = encoded(chat, SHORT)
    ids, trained = tokens.example(0)
    prompt = ids[: np.flatnonzero(trained)[0]].tolist()
    assert chat.prompt_ids(SHORT[:-1]) != prompt
    chat.thinking = gate(tokens, chat, DataSection(), "rows", 100)[1].thinking
    assert chat.thinking is False
    assert chat.prompt_ids(SHORT[:-1]) == prompt
    chat.save(tmp_path)
    assert load_tokenizer(tmp_path).prompt_ids(SHORT[:-1]) == prompt

    thoughts = talk("1 + 1?", "<think>\none and one\n</think>\n\n2")
    assert gated(chat, SHORT, thoughts)[1].thinking is None
    assert gated(chat_of("trl/llama3"), SHORT)[1].thinking is None


# --- mutations: each must trip it --------------------------------------------------------------------------


def _mutated(tokens: Tokens, change: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Tokens:
    """The same tokens with each example's mask changed."""
    masks = [change(*tokens.example(index)) for index in range(len(tokens))]
    return replace(tokens, trained=np.concatenate(masks).astype(bool))


def _shift(by: int) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    def shifted(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        moved = np.roll(mask, by)
        moved[: max(0, by)] = False
        moved[len(mask) + min(0, by) :] = False
        return moved

    return shifted


def _ends_dropped(chat: ChatTokenizer) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    return lambda ids, mask: mask & ~np.isin(ids, chat.stop_ids())


def _last_end_only(chat: ChatTokenizer) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    def changed(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        ends = np.flatnonzero(mask & np.isin(ids, chat.stop_ids()))
        mask = mask.copy()
        mask[ends[ends < np.flatnonzero(mask)[-1] - 8]] = False
        return mask

    return changed


def _into_the_next_question(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    first = np.flatnonzero(mask)[0]
    return np.arange(len(mask)) >= first


MUTATIONS: dict[str, Callable[[ChatTokenizer], Callable[[np.ndarray, np.ndarray], np.ndarray]]] = {
    "nothing": lambda chat: lambda ids, mask: np.zeros_like(mask),
    "everything": lambda chat: lambda ids, mask: np.ones_like(mask),
    "roles swapped": lambda chat: lambda ids, mask: ~mask,
    "one to the right": lambda chat: _shift(1),
    "one to the left": lambda chat: _shift(-1),
    "ends not learned": _ends_dropped,
    "earlier ends not learned": _last_end_only,
    "all from the first answer on": lambda chat: _into_the_next_question,
}
THREE = [
    talk(f"Who art thou, number {number}?", "A man.", "And then?", "Still a man, of Rome.", "Go now.", "I go, by the river.")
    for number in range(12)
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("name", [*FAMILIES, *TWINS])
def test_a_wrong_mask_trips_the_gate(name: str, mutation: str, kind: str) -> None:
    chat = chat_of(name, kind)
    tokens = encoded(chat, *THREE)
    assert gate(tokens, chat, DataSection(), "rows", 10_000)[2] == []
    wrong = _mutated(tokens, MUTATIONS[mutation](chat))
    with pytest.raises(DataError) as caught:
        gate(wrong, chat, DataSection(), "rows", 10_000)
    assert caught.value.code in ("DATA-133", "DATA-135", "DATA-122")


@pytest.mark.parametrize("name", FAMILIES)
def test_fault_024_a_template_without_its_terminator_trips_the_gate(name: str) -> None:
    """The real template with its end token taken out."""
    chat, family = chat_of(name), FAMILIES[name]
    text = chat.template.replace(family.end, "").replace("+ eos_token", "").replace("eos_token", "''")
    endless = _with_template(chat, text)
    with pytest.raises(DataError) as caught:
        gated(endless, *THREE)
    assert caught.value.code == "DATA-133"


def _with_template(chat: ChatTokenizer, template: str) -> ChatTokenizer:
    tokenizer = deepcopy(chat.tokenizer)
    tokenizer.chat_template = template
    return ChatTokenizer(tokenizer)


# --- single faults -----------------------------------------------------------------------------------------


def test_fault_022_a_row_whose_answer_is_cut_off_entirely_stops_the_run() -> None:
    error = refused(chat_of("trl/llama3"), SHORT, LONG, SHORT, max_length=40)
    assert error.code == "DATA-135"
    assert "1 of 3 examples (33.3%)" in error.problem
    assert "line 2" in error.problem
    assert "40" in error.fix
    assert "data.on_bad_rows=drop" in error.fix


def test_a_limit_of_the_model_is_no_reason_to_raise_max_length() -> None:
    chat = chat_of("trl/llama3")
    tokens, told = encoded(chat, SHORT, LONG, SHORT), []
    for limit in (40, 80, None):
        with pytest.raises(DataError) as caught:
            gate(tokens, chat, DataSection(), "rows.jsonl", 40, limit=limit)
        told.append(caught.value.fix or "")
    assert "model.max_length" not in told[0] and "a model that reads more than 40 tokens" in told[0]
    assert told[1] == told[2] == "raise model.max_length above 40, or train without them: data.on_bad_rows=drop"


def test_places_name_their_file_once() -> None:
    assert in_short(["a b.jsonl line 3", "a b.jsonl line 7", "c.jsonl line 7"]) == "a b.jsonl line 3, line 7, c.jsonl line 7"
    assert in_short(["rows[3]", "rows[4]", "line 2"]) == "rows[3], rows[4], line 2"


def test_fault_022_it_can_be_left_out_and_is_counted() -> None:
    tokens, facts, warnings = gated(chat_of("trl/llama3"), SHORT, LONG, SHORT, max_length=40, on_bad_rows="drop")
    assert tokens.rows.tolist() == [0, 2]
    assert facts.examples == 2
    assert (tokens.targets > 0).all()
    assert any("1 examples without a token to learn" in warning and "line 2" in warning for warning in warnings)


def test_fault_022_nothing_left_to_learn_stops_whatever_was_asked() -> None:
    chat = chat_of("trl/llama3")
    assert refused(chat, LONG, LONG, max_length=40, on_bad_rows="drop").code in ("DATA-134", "DATA-135")
    unlearned = [message | {"train": False} for message in SHORT]
    assert refused(chat, unlearned, on_bad_rows="drop").code == "DATA-135"


def test_fault_024_an_answer_without_an_end_is_refused() -> None:
    endless = own_template("{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}")
    error = refused(endless, SHORT, SHORT)
    assert error.code == "DATA-133"
    assert "2 of 2" in error.problem
    assert gated(endless, SHORT, loss_on="all")[1].examples == 1


def test_fault_024_a_template_that_ends_only_the_last_answer_is_told() -> None:
    chat = chat_of("metharme")
    _, facts, warnings = gated(chat, *THREE)
    assert facts.open_ended == 0
    assert ["closes only the last answer" in warning for warning in warnings] == [True]
    assert "24 of 24" in warnings[0]
    assert gated(chat, SHORT)[2] == []


def test_fault_025_two_bos_are_refused() -> None:
    twice = own_template("{{ bos_token }}{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    error = refused(twice, SHORT, LONG)
    assert error.code == "DATA-132"
    assert "2 examples" in error.problem


@pytest.mark.parametrize("name", FAMILIES)
def test_lengths_shortened_trip_the_gate_and_counts_are_exact(name: str) -> None:
    chat = chat_of(name)
    tokens = encoded(chat, *TALKS.values())
    rng = np.random.default_rng(3)
    for length in rng.integers(2, int(tokens.lengths.max()), 12).tolist():
        kept = [tokens.example(index) for index in range(len(tokens))]
        lost = sum(int(mask[length:].sum()) for _, mask in kept)
        untrainable = sum(not mask[1:length].any() for _, mask in kept)
        share = lost / int(tokens.targets.sum())
        if share > 0.5 or untrainable:
            with pytest.raises(DataError) as caught:
                gate(tokens, chat, DataSection(), "rows", length)
            assert caught.value.code == ("DATA-134" if share > 0.5 else "DATA-135")
        else:
            warning = gate(tokens, chat, DataSection(), "rows", length)[2][0]
            assert f"{int((tokens.lengths > length).sum())} of {len(tokens)} examples are cut" in warning
            assert f"{lost:,} learned tokens are lost" in warning


def test_too_much_cut_is_refused_and_a_little_is_told() -> None:
    chat = chat_of("trl/llama3")
    long_answer = talk("why?", "because " * 60)
    error = refused(chat, SHORT, long_answer, max_length=40)
    assert error.code == "DATA-134"
    assert "%" in error.problem
    longest = int(encoded(chat, long_answer).lengths[0])
    tokens, facts, warnings = gated(chat, SHORT, long_answer, max_length=longest - 5)
    assert int(tokens.lengths.max()) == longest - 5
    assert warnings == [f"1 of 2 examples are cut at {longest - 5} tokens; 5 learned tokens are lost"]
    assert facts.open_ended == 1  # by the cut, which is allowed and told


def test_examples_with_cut_answers_are_left_out_where_that_is_asked_for() -> None:
    chat = chat_of("trl/llama3")
    long_answer = talk("why?", "because " * 60)
    tokens, facts, warnings = gated(chat, SHORT, long_answer, max_length=40, on_bad_rows="drop")
    assert tokens.rows.tolist() == [0] and facts.examples == 1
    assert warnings == ["1 of 2 examples are left out: their answers go on beyond max_length 40"]
    whole = encoded(chat, SHORT, long_answer)
    for limit, told in ((40, "choose a model that reads more than 40 tokens"), (50, "raise model.max_length to at most 50")):
        with pytest.raises(DataError) as caught:
            gate(whole, chat, DataSection(), "rows", 40, limit=limit)
        assert told in str(caught.value.fix) and "the 1 of 2 examples" in str(caught.value.fix)
    dropping = DataSection(on_bad_rows="drop")
    with pytest.raises(DataError) as caught:
        gate(whole, chat, dropping, "rows", 40, may_leave_out=False)
    assert caught.value.code == "DATA-134" and "on_bad_rows" not in str(caught.value.fix)
    assert refused(chat, long_answer, max_length=40, on_bad_rows="drop").code == "DATA-134"


def test_nothing_is_cut_that_fits() -> None:
    chat = chat_of("trl/llama3")
    tokens = encoded(chat, SHORT, LONG)
    kept, _, warnings = gated(chat, SHORT, LONG, max_length=int(tokens.lengths.max()))
    assert kept.ids.tolist() == tokens.ids.tolist()
    assert warnings == []


def test_the_end_is_looked_for_before_the_white_space_that_follows_it() -> None:
    chat = chat_of("trl/qwen2_5")
    tokens = encoded(chat, SHORT, LONG)
    assert inspect(tokens, chat).open_ended == 0
    no_ends = replace(tokens, trained=tokens.trained & ~np.isin(tokens.ids, chat.stop_ids()))
    assert inspect(no_ends, chat).open_ended == 2
