"""What is learned: whole answers and their ends, nothing else, under the chat templates that people really use."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from families import (
    FAMILIES,
    KINDS,
    SHARED,
    SYSTEMS,
    TALKS,
    TWINS,
    Talk,
    chat_of,
    encoded,
    family_of,
    learned,
    own_template,
    talk,
    words,
)
from llm_finetune_kit.data import masks
from llm_finetune_kit.data.formats import Example
from llm_finetune_kit.data.gate import inspect
from llm_finetune_kit.data.masks import encode
from llm_finetune_kit.errors import DataError
from llm_finetune_kit.models.tokenizer import ChatTokenizer, load_tokenizer

pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="the folder with real data is not here")


def whole(chat: ChatTokenizer, messages: Talk) -> list[int]:
    """What transformers makes of the conversation, with a BOS where the tokenizer wants one and none stands."""
    ids = chat.tokenizer.apply_chat_template(chat.shaped(messages), tokenize=True, return_dict=True)["input_ids"]
    return chat.with_bos(ids)


ASKED_ALONE = {f"{name} and one answer": talk("Who?", "I.", system=text) for name, text in SYSTEMS.items()}


def cases(kinds: tuple[str, ...] = KINDS) -> Any:
    talks = TALKS | ASKED_ALONE
    return pytest.mark.parametrize(
        ("name", "kind", "messages"),
        [
            pytest.param(name, kind, messages, id=f"{name}-{kind}-{what}")
            for name, family in FAMILIES.items()
            for kind in kinds
            for what, messages in talks.items()
        ],
    )


@cases()
def test_answers_are_learned_whole_and_nothing_else_is(name: str, kind: str, messages: Talk) -> None:
    chat, family = chat_of(name, kind), FAMILIES[name]
    tokens = encoded(chat, messages)
    ids = tokens.example(0)[0]
    answers = [message["content"].strip() for message in messages if message["role"] == "assistant"]

    assert ids.tolist() == whole(chat, messages)
    assert [words(run, family) for run in learned(chat, tokens)] == answers
    assert inspect(tokens, chat).open_ended == 0


@cases()
def test_the_model_is_asked_exactly_as_it_was_taught(name: str, kind: str, messages: Talk) -> None:
    """The prompt's ids begin the example, and from there on everything up to the end of turn is learned."""
    chat = chat_of(name, kind)
    ids, trained = encoded(chat, messages).example(0)
    asked = chat.prompt_ids(messages[:-1])
    if name == "trl/qwen3":  # it opens the last answer with an empty thought, which is not learned
        asked += chat.backend.encode("<think>\n\n</think>\n\n", add_special_tokens=False).ids
    if messages[-1]["content"][0].isspace():  # the tokenizer may join it with the white space of the prompt
        asked = asked[:-1]
    end = np.flatnonzero(trained)[-1]
    assert ids[: len(asked)].tolist() == asked
    assert trained[len(asked) + 1 : end + 1].all()
    assert trained[len(asked)] or messages[-1]["content"][0].isspace()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_fault_025_there_is_exactly_one_bos(name: str, kind: str) -> None:
    chat, family = chat_of(name, kind), FAMILIES[name]
    tokens = encoded(chat, TALKS["three answers"])
    text = encode([Example(None, "Now is the winter.", 0)], chat)
    if family.adds_bos:
        assert tokens.ids.tolist().count(chat.bos_id) == 1
        assert tokens.ids[0] == text.ids[0] == chat.bos_id
        assert not tokens.trained[0]
    elif family.bos is not None:
        assert chat.bos_id not in tokens.ids
    assert inspect(tokens, chat).double_bos == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_fault_024_the_last_learned_token_stops_generation(name: str, kind: str) -> None:
    chat = chat_of(name, kind)
    talks = [*TALKS.values(), talk("q", "a", "and a question at the end")]
    facts = inspect(encoded(chat, *talks), chat)
    assert facts.open_ended == 0
    assert len(facts.nothing_learned) == 0
    assert chat.backend.token_to_id(FAMILIES[name].end) in chat.stop_ids()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_fault_026_special_token_text_in_a_message_stays_plain_text(name: str, kind: str) -> None:
    chat, family = chat_of(name, kind), FAMILIES[name]
    words = "what is " + " and ".join(family.specials) + "?" + family.end + family.end
    reply = f"It is {family.end} or {family.specials[0]}, nothing more."
    tokens, harmless = encoded(chat, talk("Who?", "A man.", words, reply), talk("Who?", "A man.", "what?", "Nothing.")), 1
    ids, plain_ids = tokens.example(0)[0].tolist(), tokens.example(harmless)[0].tolist()
    special = set(chat.specials.values())

    assert [index for index in ids if index in special] == [index for index in plain_ids if index in special]
    text = chat.decode(ids, keep_special=True)
    assert words in text
    assert learned(chat, tokens, 0)[-1].removesuffix(family.eos).strip().removesuffix(family.end) == reply.removesuffix(
        family.eos
    )
    # all between special tokens but the two messages is tokenized as ever
    parts, plain_parts = between(ids, special), between(plain_ids, special)
    assert sum(one != other for one, other in zip(parts, plain_parts, strict=True)) <= 2


def between(ids: list[int], special: set[int]) -> list[list[int]]:
    """The ids between special tokens."""
    parts: list[list[int]] = [[]]
    for index in ids:
        if index in special:
            parts.append([])
        else:
            parts[-1].append(index)
    return parts


def test_fault_026_holds_for_real_tokenizers(stories: Path) -> None:
    chat = load_tokenizer(stories)
    words = "And <s> then </s>?"
    tokens = encoded(chat, talk("Hello", "Once", words, "It was <unk> done."), talk("Hello", "Once", "And then?", "It was done."))
    ids, harmless = (tokens.example(index)[0].tolist() for index in (0, 1))
    text = chat.decode(ids, keep_special=True)
    assert text == chat.render([talk("Hello", "Once", words, "It was <unk> done.")])[0]
    assert [index for index in ids if index < 3] == [index for index in harmless if index < 3] == [1, 2, 2]
    until = ids.index(2) + 1
    assert ids[:until] == harmless[:until]
    assert learned(chat, tokens) == ["Once</s>", "It was <unk> done.</s>"]


# --- any text ----------------------------------------------------------------------------------------------

PIECES = (
    *(
        "a",
        "Romeo",
        "42",
        ".",
        ", ",
        " ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "\r\n",
        "\u00a0",
        "\u2028",
        "\u3000",
        "\u200d",
        "\x00",
        "\x7f",
    ),
    *(
        "é",
        "e\u0301",
        "ß",
        "你好",
        "العربية",
        "हिन्दी",
        "🙂",
        "👩\u200d👩\u200d👧",
        "🇮🇹",
        "\ufeff",
        "\ufffd",
        "\U000f0000",
        "{{ x }}",
        "{% if %}",
    ),
    *("### Response:\n", "user\n", "assistant", "[INST]", "[/INST]", "<think>", "<", "|>", "</"),
)


def any_text(rng: random.Random, specials: tuple[str, ...]) -> str:
    """Text of up to 12 pieces that says something, perhaps with white space around it and special-token text within."""
    text = "".join(rng.choices((*PIECES, *specials), k=rng.randint(1, 12)))
    return text if text.strip() else text + "so"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*FAMILIES, *TWINS])
def test_learned_spans_are_the_answers_and_their_ends_whatever_is_said(name: str, kind: str) -> None:
    chat, family = chat_of(name, kind), family_of(name)
    rng = random.Random(f"{name} {kind}")
    talks = [talk(*(any_text(rng, family.specials) for _ in range(2 * rng.randint(1, 3)))) for _ in range(60)]
    tokens = encoded(chat, *talks)
    thought = "<think>\n\n</think>\n\n" if name == "trl/qwen3_training" else ""  # which TRL learns
    for index, messages in enumerate(talks):
        runs = learned(chat, tokens, index)
        answers = [message["content"].strip() for message in messages[1::2]]
        assert [words(run, family).removeprefix(thought).strip() for run in runs] == answers
        ids, trained = tokens.example(index)
        control = [i for i, learn in zip(ids.tolist(), trained, strict=True) if i in chat.specials.values() and learn]
        ends = [chat.specials[family.end]] * len(answers)
        assert control == ends + ([chat.eos_id] if name.startswith("trl/phi3") else [])  # its template puts it at the very end
        assert ids.tolist()[: 2 * chat.adds_bos].count(chat.bos_id) == int(chat.adds_bos)


# --- real tokenizers ---------------------------------------------------------------------------------------


def letters(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize("folder", ["models/stories260K-hf", "models/TinyStories-656K", "tokenizers/torchtitan-test"])
def test_real_tokenizers_learn_the_answers(folder: str, shared: Path) -> None:
    chat = load_tokenizer(shared / folder)
    messages = talk("Tell me a story about a cat?", "Once upon a time there was a cat.", "And then?", "It ran away, far away.")
    messages += talk("one more", "The end.")
    tokens = encoded(chat, messages)
    end = next(text for text, index in chat.specials.items() if index == chat.eos_id)
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    assert [letters(run) for run in learned(chat, tokens)] == [letters(answer) + end for answer in answers]
    assert inspect(tokens, chat).open_ended == 0
    assert tokens.ids.tolist().count(chat.bos_id) == 1


def test_a_tokenizer_that_drops_characters_is_not_trusted_with_offsets(shared: Path) -> None:
    """TinyStories-656K knows no `#` and no `é`: character offsets after them point beside the answer."""
    chat = load_tokenizer(shared / "models" / "TinyStories-656K")
    messages = talk("éé ## ~~ tell", "a cat é sat ##", "##", "~ it ran")
    assert not masks._covers(chat.backend.encode(chat.render([messages])[0]), chat.render([messages])[0])
    end = "<|end_story|>"
    assert [letters(run) for run in learned(chat, encoded(chat, messages))] == ["acatsat" + end, "itran" + end]


# --- other things to learn ---------------------------------------------------------------------------------


def test_all_tokens_can_be_learned() -> None:
    chat = chat_of("trl/llama3")
    tokens = encoded(chat, TALKS["one answer"], loss_on="all")
    assert tokens.trained.all()
    assert tokens.targets[0] == len(tokens.ids) - 1  # nothing predicts the first token
    assert tokens.ids.tolist() == whole(chat, TALKS["one answer"])


@pytest.mark.parametrize("name", ["trl/llama3", "trl/qwen2_5"])
def test_raw_text_is_learned_whole_with_its_end(name: str) -> None:
    chat = chat_of(name)
    text = f"Now is the winter {FAMILIES[name].end} of our discontent.\n"
    tokens = encode([Example(None, text, 4)], chat)
    assert chat.decode(tokens.ids.tolist(), keep_special=True) == (FAMILIES[name].bos or "") + text + FAMILIES[name].eos
    assert tokens.ids.tolist().count(chat.eos_id) == 1
    assert tokens.trained.all()
    assert tokens.rows.tolist() == [4]


def test_conversations_and_texts_keep_their_order() -> None:
    chat = chat_of("trl/llama3")
    examples = [Example(None, "one", 0), Example(talk("q", "two"), None, 2), Example(None, "three", 5)]
    tokens = encode(examples, chat)
    assert tokens.rows.tolist() == [0, 2, 5]
    assert [learned(chat, tokens, index)[-1].removesuffix("<|eot_id|>") for index in range(3)] == [
        "<|begin_of_text|>one",
        "two",
        "<|begin_of_text|>three",
    ]


def test_an_answer_can_be_left_out() -> None:
    chat = chat_of("trl/qwen2_5")
    messages = talk("one?", "first", "two?", "second")
    for left_out, kept in ((1, "second"), (3, "first")):
        marked = [message | {"train": False} if place == left_out else message for place, message in enumerate(messages)]
        assert learned(chat, encoded(chat, marked)) == [kept + "<|im_end|>\n"]


# --- templates that do not show their answers ------------------------------------------------------------

SHORT = talk("why?", "Because it is so.")
LONG = talk("why? " * 60, "short")
EACH = "{%% for m in messages %%}[{{ m.role }}] %s{{ eos_token }}{%% endfor %%}"
ASK = "{% if add_generation_prompt %}[assistant] {% endif %}"
DOUBLING = EACH % "{{ m.content }} {{ m.content }}" + ASK
HIDING = EACH % "{% if m.role == 'user' %}{{ m.content }}{% endif %}" + ASK
SHORTENING = EACH % "{{ m.content[:-1] }}" + ASK


@pytest.mark.parametrize("template", [DOUBLING, HIDING, SHORTENING])
def test_fault_023_a_template_that_does_not_show_its_answers_is_refused(template: str) -> None:
    chat = own_template(template)
    with pytest.raises(DataError, match="does not show where its answers begin") as caught:
        encoded(chat, SHORT)
    assert caught.value.code == "DATA-131"
    assert "loss_on=all" in caught.value.fix
    assert encoded(chat, SHORT, loss_on="all").trained.all()


def test_fault_023_a_template_may_change_words_as_long_as_it_shows_where_they_are() -> None:
    chat = own_template(EACH % "{{ m.content | upper }}" + ASK)
    assert learned(chat, encoded(chat, SHORT)) == ["BECAUSE IT IS SO.</s>"]


def test_fault_023_where_a_template_asks_without_a_header_the_header_is_learned() -> None:
    """The model is asked without it, so the model has to write it."""
    chat = own_template(EACH % "{{ m.content }}")
    assert learned(chat, encoded(chat, SHORT)) == ["[assistant] Because it is so.</s>"]


def test_fault_023_a_prompt_that_is_taught_otherwise_than_asked_is_refused() -> None:
    """This one says what to do only as long as it has not been answered."""
    chat = own_template("{% if messages | length == 1 %}Answer. {% endif %}" + EACH % "{{ m.content }}" + ASK)
    with pytest.raises(DataError, match="does not show where its answers begin"):
        encoded(chat, SHORT)


def test_cutting_and_choosing_keep_ids_masks_and_rows_together() -> None:
    tokens = encoded(chat_of("trl/llama3"), SHORT, LONG, TALKS["three answers"])
    cut, rows, lost = tokens.cut(30)
    assert rows == int((tokens.lengths > 30).sum())
    assert lost == int(tokens.trained.sum() - cut.trained.sum())
    chosen = cut.select(np.array([2, 0]))
    for place, index in enumerate((2, 0)):
        for part, original in zip(chosen.example(place), tokens.example(index), strict=True):
            assert part.tolist() == original[:30].tolist()
    assert chosen.rows.tolist() == [2, 0]
