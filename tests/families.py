"""Small tokenizers dressed as the families people really use: their special tokens, BOS habits and chat templates."""

from __future__ import annotations

import gzip
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from llm_finetune_kit.catalog import DEFAULT_TEMPLATE
from llm_finetune_kit.data.formats import Example
from llm_finetune_kit.data.masks import Tokens, encode
from llm_finetune_kit.models.tokenizer import ChatTokenizer

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
TEMPLATES = SHARED / "chat_templates"

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
# TRL's own variants, which say with generation marks what is learned; each with the name of the stock template.
TWINS = {f"{name}_training": name for name in ("trl/llama3", "trl/qwen2_5", "trl/qwen3", "trl/gemma", "trl/phi3")}
# They refuse a system prompt, or (Mistral) drop it from a conversation that is answered.
NO_SYSTEM = {"trl/gemma", "axolotl/gemma", "axolotl/mistral_v2v3"}
# It closes only the last answer of a conversation, so it stands apart from the others.
METHARME = Family("axolotl/metharme", (*LLAMA2, "<|system|>", "<|user|>", "<|model|>"), "<s>", "</s>", "</s>", True)
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


def family_of(name: str) -> Family:
    """Also of TRL's variants, which differ from the stock family only in their template."""
    if name in TWINS:
        return replace(FAMILIES[TWINS[name]], template=name)
    return METHARME if name == "metharme" else FAMILIES[name]


@cache
def chat_of(name: str, kind: str = "bytes") -> ChatTokenizer:
    """A small tokenizer dressed as one of the family: its special tokens, its BOS habit, its template."""
    family = family_of(name)
    backend = Tokenizer.from_str(_trained_bpe(kind))
    backend.add_special_tokens([AddedToken(text, normalized=False, rstrip=family.swallows) for text in family.specials])
    if name.startswith("trl/qwen3"):
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


def words(run: str, family: Family) -> str:
    """What is said in a run of learned text, which must be closed by the end token and at most white space after it."""
    said, end, rest = run.rpartition(family.end)
    if end != family.eos and rest.strip() == family.eos:  # Phi-3 puts its end of text behind the last end of turn
        rest = ""
    assert end and not rest.strip()
    return said.strip()


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
