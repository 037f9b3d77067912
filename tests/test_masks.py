"""What is learned: whole answers and their ends, nothing else, under the chat templates that people really use."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from llm_finetune_kit.catalog import DEFAULT_TEMPLATE
from llm_finetune_kit.config import DataSection
from llm_finetune_kit.data import masks
from llm_finetune_kit.data.formats import Example
from llm_finetune_kit.data.gate import gate
from llm_finetune_kit.data.masks import MaskFacts, Tokens, encode, inspect
from llm_finetune_kit.errors import DataError
from llm_finetune_kit.models.tokenizer import ChatTokenizer, load_tokenizer

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
TEMPLATES = SHARED / "chat_templates"
pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="the folder with real data is not here")

Talk = list[dict[str, Any]]


@dataclass(frozen=True)
class Family:
    """A chat template with what its models' tokenizers have: special tokens, BOS, EOS and who puts the BOS."""

    template: str
    specials: tuple[str, ...]
    bos: str | None
    eos: str
    end: str  # of an answer
    adds_bos: bool
    swallows: bool = False  # special tokens take the white space to their right, as Phi-3's do


LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
GEMMA = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
PHI = ("<unk>", "<s>", "</s>", "<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>")
LLAMA2 = ("<unk>", "<s>", "</s>")
MISTRAL = (*LLAMA2, "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]")
FAMILIES = {
    "default": Family("", LLAMA2, "<s>", "</s>", "</s>", True),
    "trl/llama3": Family("trl/llama3", LLAMA3, LLAMA3[0], "<|eot_id|>", "<|eot_id|>", True),
    "trl/llama3_1": Family("trl/llama3_1", LLAMA3, LLAMA3[0], "<|eot_id|>", "<|eot_id|>", True),
    "trl/llama3_2": Family("trl/llama3_2", LLAMA3, LLAMA3[0], "<|end_of_text|>", "<|eot_id|>", True),
    "trl/qwen2_5": Family("trl/qwen2_5", CHATML, None, "<|im_end|>", "<|im_end|>", False),
    "trl/qwen3": Family("trl/qwen3", CHATML, None, "<|im_end|>", "<|im_end|>", False),
    "trl/gemma": Family("trl/gemma", GEMMA, "<bos>", "<eos>", "<end_of_turn>", True),
    "trl/gemma3": Family("trl/gemma3", GEMMA, "<bos>", "<eos>", "<end_of_turn>", True),
    "trl/phi3": Family("trl/phi3", PHI, "<s>", "<|endoftext|>", "<|end|>", False, swallows=True),
    "trl/phi3_5": Family("trl/phi3_5", PHI, "<s>", "<|endoftext|>", "<|end|>", False, swallows=True),
    "axolotl/chatml": Family("axolotl/chatml", (*LLAMA2, *CHATML), "<s>", "<|im_end|>", "<|im_end|>", True),
    "axolotl/llama3": Family("axolotl/llama3", LLAMA3, LLAMA3[0], "<|end_of_text|>", "<|eot_id|>", True),
    "axolotl/gemma": Family("axolotl/gemma", GEMMA, "<bos>", "<eos>", "<end_of_turn>", True),
    "axolotl/mistral_v1": Family("axolotl/mistral_v1", LLAMA2, "<s>", "</s>", "</s>", True),
    "axolotl/mistral_v2v3": Family("axolotl/mistral_v2v3", MISTRAL, "<s>", "</s>", "</s>", True),
    "axolotl/alpaca": Family("axolotl/alpaca", LLAMA2, "<s>", "</s>", "</s>", True),
    "axolotl/phi_3": Family("axolotl/phi_3", PHI, "<s>", "<|endoftext|>", "<|end|>", True, swallows=True),
    "axolotl/phi_35": Family("axolotl/phi_35", PHI, "<s>", "<|endoftext|>", "<|end|>", False, swallows=True),
    "axolotl/qwen_25": Family("axolotl/qwen_25", CHATML, None, "<|im_end|>", "<|im_end|>", False),
}
# They refuse a system prompt, or (Mistral) drop it from a conversation that is answered.
NO_SYSTEM = {"trl/gemma", "axolotl/gemma", "axolotl/mistral_v2v3"}
KINDS = ("bytes", "words")  # byte-level like GPT-2, Llama 3 and Qwen; marked words with byte fallback like Llama 2


@cache
def _trained_bpe(kind: str) -> str:
    text = gzip.decompress((SHARED / "text" / "tinyshakespeare.txt.gz").read_bytes()).decode()[:60_000]
    bytes_of_text = [f"<0x{value:02X}>" for value in range(256)]
    if kind == "bytes":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
        tokenizer.train_from_iterator([text], trainer)
        return tokenizer.to_str()
    tokenizer = Tokenizer(models.BPE(unk_token="<0x00>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=bytes_of_text, show_progress=False)
    tokenizer.train_from_iterator(text.split("\n"), trainer)
    plain = Tokenizer(tokenizer.model)  # the bytes are pieces of the model, not special tokens
    plain.pre_tokenizer, plain.decoder = tokenizer.pre_tokenizer, decoders.Sequence(steps)
    return plain.to_str()


@cache
def chat_of(name: str, kind: str = "bytes") -> ChatTokenizer:
    """A small tokenizer dressed as one of the family: its special tokens, its BOS habit, its template."""
    family = FAMILIES[name]
    backend = Tokenizer.from_str(_trained_bpe(kind))
    backend.add_special_tokens([AddedToken(text, normalized=False, rstrip=family.swallows) for text in family.specials])
    if name == "trl/qwen3":
        backend.add_tokens(["<think>", "</think>"])  # added, and not special
    if family.adds_bos:
        first = (str(family.bos), backend.token_to_id(str(family.bos)))
        backend.post_processor = processors.TemplateProcessing(single=f"{first[0]} $A", special_tokens=[first])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=family.bos, eos_token=family.eos)
    tokenizer.chat_template = (TEMPLATES / f"{family.template}.jinja").read_text() if family.template else DEFAULT_TEMPLATE
    chat = ChatTokenizer(tokenizer)
    assert set(chat.specials) == set(family.specials)
    assert chat.adds_bos == family.adds_bos
    return chat


def own_template(template: str) -> ChatTokenizer:
    chat = ChatTokenizer(chat_of("default").tokenizer.__class__(tokenizer_object=chat_of("default").backend))
    chat.tokenizer.bos_token, chat.tokenizer.eos_token, chat.tokenizer.chat_template = "<s>", "</s>", template
    return ChatTokenizer(chat.tokenizer)


def talk(*turns: str, system: str | None = None) -> Talk:
    roles = ("user", "assistant")
    start = [] if system is None else [{"role": "system", "content": system}]
    return start + [{"role": roles[number % 2], "content": text} for number, text in enumerate(turns)]


def encoded(chat: ChatTokenizer, *talks: Talk, loss_on: str = "answers") -> Tokens:
    return encode([Example(messages, None, row) for row, messages in enumerate(talks)], chat, loss_on=loss_on)


def learned(chat: ChatTokenizer, tokens: Tokens, index: int = 0) -> list[str]:
    """The text of each unbroken run of learned tokens."""
    ids, trained = tokens.example(index)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], trained.astype(int), [0]])))
    return [chat.decode(ids[first:last].tolist(), keep_special=True) for first, last in edges.reshape(-1, 2)]


def whole(chat: ChatTokenizer, messages: Talk) -> list[int]:
    """What transformers makes of the conversation, with a BOS where the tokenizer wants one and none stands."""
    ids = chat.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    return chat.with_bos(ids)


TALKS = {
    "one answer": talk("What is thy name?", "My name is Romeo."),
    "three answers": talk("Who art thou?", "A man.", "And then?", "Still a man.\nOf Rome.", "Go.", "I go."),
    "answers that the prompts hold too": talk("Say: I go.", "I go.", "I go.", "I go."),
    "one letter": talk("a", "b", "b", "a"),
    "other scripts": talk("Wie heißt du? 你好 🙂", "Ich heiße Jürgen 🙃 和你", "ok?", "été"),
    "white space outside": talk(" What? \n", "  Nothing.\n ", "\tOh.", "\n\nSo be it.  "),
    "white space inside": talk("a  b\n\n\nc", "1\n\n  2\t3   4", "code?", "def f():\n    return 1\n"),
    "marks of other templates": talk("### Response:\nnot yet", "### Instruction:\ndone", "assistant\n", "user\nmodel"),
    "jinja in words": talk("{{ bos_token }} {% if x %}", "{% generation %}{{ 1 + 1 }}{% endgeneration %}"),
}
SYSTEMS = {"a system prompt": "Speak as a king.", "an empty system prompt": "", "a blank system prompt": " \n"}
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
            if name not in NO_SYSTEM or messages[0]["role"] != "system"
        ],
    )


@cases()
def test_answers_are_learned_whole_and_nothing_else_is(name: str, kind: str, messages: Talk) -> None:
    chat, family = chat_of(name, kind), FAMILIES[name]
    tokens = encoded(chat, messages)
    ids, trained = tokens.example(0)
    answers = [message["content"].strip() for message in messages if message["role"] == "assistant"]

    assert ids.tolist() == whole(chat, messages)
    runs = [run.removesuffix(family.end) for run in learned(chat, tokens)]
    if name == "trl/qwen3":  # it opens the last answer with an empty thought, which the model has to write too
        runs[-1] = runs[-1].removeprefix("<think>\n\n</think>\n\n")
    assert [run.strip() for run in runs] == answers
    assert all(run.endswith(family.end) for run in learned(chat, tokens))
    assert ids[np.flatnonzero(trained)[-1]] in chat.stop_ids()


@cases()
def test_the_model_is_asked_exactly_as_it_was_taught(name: str, kind: str, messages: Talk) -> None:
    """The prompt's ids begin the example, and from there on everything up to the end of turn is learned."""
    chat = chat_of(name, kind)
    ids, trained = encoded(chat, messages).example(0)
    asked = chat.prompt_ids(messages[:-1])
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
    assert learned(chat, tokens, 0)[-1].removeprefix("<think>\n\n</think>\n\n").strip() == reply + family.end
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


# --- TRL's training templates ------------------------------------------------------------------------------

# What TRL's templates train beyond the answer and its end-of-turn token, none of which a stopped model ever writes:
# Qwen 2.5: the line feed after the role, which every prompt already holds; all: the line feed after the end of turn;
# Phi-3: the end-of-text token after the end-of-turn token, at which generation has stopped.
BEFORE = {"trl/qwen2_5": "\n"}
AFTER = {"trl/llama3": "", "trl/qwen2_5": "\n", "trl/qwen3": "\n", "trl/gemma": "\n", "trl/phi3": ""}
LAST = {"trl/phi3": "<|endoftext|>"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", AFTER)
@pytest.mark.parametrize("what", ["one answer", "three answers", "other scripts", "white space inside"])
def test_masks_agree_with_trl_token_for_token(name: str, kind: str, what: str) -> None:
    chat, family, messages = chat_of(name, kind), FAMILIES[name], TALKS[what]
    if name == "trl/qwen3":  # TRL gives every answer a thought, Qwen's own template only the last: compare one answer
        messages = messages[:2]
    template = (TEMPLATES / f"{family.template}_training.jinja").read_text()
    theirs = chat.tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, trained = encoded(chat, messages).example(0)
    wanted = np.array(theirs["assistant_masks"], dtype=bool)
    assert ids.tolist() == theirs["input_ids"]

    assert not (trained & ~wanted).any(), "we learn nothing that TRL does not"
    extra = np.flatnonzero(wanted & ~trained)
    ends = np.flatnonzero(trained & ~np.append(trained[1:], False))
    starts = np.flatnonzero(trained & ~np.insert(trained[:-1], 0, False))
    allowed = {int(start) - 1 for start in starts if BEFORE.get(name)} | {int(end) + 1 for end in ends if AFTER[name]}
    text = [chat.decode([int(index)], keep_special=True) for index in ids]
    if name in LAST:
        allowed.add(len(ids) - 1)
        assert text[-1] == LAST[name]
    assert set(extra.tolist()) <= allowed
    assert {text[index] for index in extra} <= {"\n", *LAST.values()}


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
        assert learned(chat, encoded(chat, marked)) == [kept + "<|im_end|>"]


# --- the gate ----------------------------------------------------------------------------------------------


def gated(chat: ChatTokenizer, *talks: Talk, max_length: int = 10_000, **settings: Any) -> tuple[Tokens, MaskFacts, list[str]]:
    asked = DataSection.model_validate(settings)
    tokens = encoded(chat, *talks, loss_on=asked.loss_on)
    return gate(tokens, chat, asked, "rows.jsonl", max_length)


def refused(*arguments: Any, **settings: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        gated(*arguments, **settings)
    assert caught.value.exit_code == 3
    assert caught.value.where == "rows.jsonl"
    assert caught.value.fix
    return caught.value


LONG = talk("why? " * 60, "short")
SHORT = talk("why?", "Because it is so.")


def test_fault_022_a_row_whose_answer_is_cut_off_entirely_stops_the_run() -> None:
    error = refused(chat_of("trl/llama3"), SHORT, LONG, SHORT, max_length=40)
    assert error.code == "DATA-035"
    assert "1 of 3 examples" in error.problem
    assert "rows 2" in error.problem
    assert "40" in error.fix


def test_fault_022_it_can_be_left_out_and_is_counted() -> None:
    tokens, facts, warnings = gated(chat_of("trl/llama3"), SHORT, LONG, SHORT, max_length=40, on_bad_rows="drop")
    assert tokens.rows.tolist() == [0, 2]
    assert facts.examples == 2
    assert (tokens.targets > 0).all()
    assert any("1 examples without a token to learn" in warning and "rows 2" in warning for warning in warnings)


def test_fault_022_nothing_left_to_learn_stops_whatever_was_asked() -> None:
    chat = chat_of("trl/llama3")
    assert refused(chat, LONG, LONG, max_length=40, on_bad_rows="drop").code in ("DATA-034", "DATA-035")
    unlearned = [message | {"train": False} for message in SHORT]
    assert refused(chat, unlearned, on_bad_rows="drop").code == "DATA-035"


EACH = "{%% for m in messages %%}[{{ m.role }}] %s{{ eos_token }}{%% endfor %%}"
ASK = "{% if add_generation_prompt %}[assistant] {% endif %}"
DOUBLING = EACH % "{{ m.content }} {{ m.content }}" + ASK
HIDING = EACH % "{% if m.role == 'user' %}{{ m.content }}{% endif %}" + ASK
SHORTENING = EACH % "{{ m.content[:-1] }}" + ASK


@pytest.mark.parametrize("template", [DOUBLING, HIDING, SHORTENING])
def test_fault_023_a_template_that_does_not_show_its_answers_is_refused(template: str) -> None:
    chat = own_template(template)
    with pytest.raises(DataError, match="does not show where this answer begins") as caught:
        encoded(chat, SHORT)
    assert caught.value.code == "DATA-031"
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
    """Mistral's template shows a system prompt only as long as the last message is the user's."""
    with pytest.raises(DataError, match="does not show where this answer begins"):
        encoded(chat_of("axolotl/mistral_v2v3"), talk("Who?", "I.", system="Speak as a king."))


def test_fault_024_an_answer_without_an_end_is_refused() -> None:
    endless = own_template("{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}")
    error = refused(endless, SHORT, SHORT)
    assert error.code == "DATA-033"
    assert "2 of 2" in error.problem
    assert gated(endless, SHORT, loss_on="all")[1].examples == 1


def test_fault_025_two_bos_are_refused() -> None:
    twice = own_template("{{ bos_token }}{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    error = refused(twice, SHORT, LONG)
    assert error.code == "DATA-032"
    assert "2 examples" in error.problem


def test_too_much_cut_is_refused_and_a_little_is_told() -> None:
    chat = chat_of("trl/llama3")
    long_answer = talk("why?", "because " * 60)
    error = refused(chat, SHORT, long_answer, max_length=40)
    assert error.code == "DATA-034"
    assert "%" in error.problem
    longest = int(encoded(chat, long_answer).lengths[0])
    tokens, facts, warnings = gated(chat, SHORT, long_answer, max_length=longest - 5)
    assert int(tokens.lengths.max()) == longest - 5
    assert warnings == [f"1 of 2 examples are cut at {longest - 5} tokens; 5 learned tokens are lost"]
    assert facts.open_ended == 1  # by the cut, which is allowed and told


def test_nothing_is_cut_that_fits() -> None:
    chat = chat_of("trl/llama3")
    tokens = encoded(chat, SHORT, LONG)
    kept, _, warnings = gated(chat, SHORT, LONG, max_length=int(tokens.lengths.max()))
    assert kept.ids.tolist() == tokens.ids.tolist()
    assert warnings == []


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
