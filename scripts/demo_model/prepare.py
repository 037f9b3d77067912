"""Prepare everything the embedded demo model is trained from: corpus, tokenizer, untrained model.

    python scripts/demo_model/prepare.py --data DIR [--out build/demo_model]

Writes into the output folder:
    train.jsonl              the shuffled mix, one {"messages": [...]} a line
    train_dolly_chat.jsonl   the same rows without the sums, for a second stage
    dev.jsonl                a small mix to watch while training
    heldout_dolly.jsonl      Dolly rows used nowhere else; the model card reports bits per byte on them
    init/                    tokenizer and randomly initialised Llama, a Hugging Face folder
    prepare.json             the totals printed at the end

The same data and seed give the same files.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from corpus import DOLLY, GSM8K, SGD, SOURCES, STORIES, Row, read_all
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

MAX_TOKENS = 512
VOCAB_SIZE = 4096
SIZE_LIMIT = 9_600_000  # bytes: bfloat16 weights plus tokenizer files

BOS, EOS, PAD = "<|begin|>", "<|end|>", "<|pad|>"
ROLES = ("user", "assistant", "system")
SPECIAL_TOKENS = [BOS, EOS, PAD, *(f"<|{role}|>" for role in ROLES)]

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message['role'] not in ['system', 'user', 'assistant'] -%}
        {{- raise_exception('Unknown role: ' ~ message['role']) -}}
    {%- endif -%}
    {{- '<|' ~ message['role'] ~ '|>' ~ (message['content'] | trim) ~ eos_token -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>' -}}
{%- endif -%}
"""

HELDOUT_DOLLY = 500
DEV_ROWS = {DOLLY: 80, SGD: 90, GSM8K: 60, STORIES: 70}
DOLLY_RESERVE = 900  # rows with the lowest keys, kept from training; enough of them fit for held-out and dev
LONG_ANSWER = 40  # characters; a held-out answer this long must not even be part of a training row

Drops = Counter[tuple[str, str]]


# --- rows ---------------------------------------------------------------------------------------


def usable(rows: Iterable[Row], drops: Drops) -> list[Row]:
    """Rows with answers everywhere, each once, without the tokenizer's special tokens in their text."""
    seen: set[str] = set()
    kept = []
    for row in rows:
        if not all(message["content"] for message in row.messages):
            drops[row.source, "empty message"] += 1
        elif row.key in seen:
            drops[row.source, "exact duplicate"] += 1
        elif any(token in message["content"] for message in row.messages for token in SPECIAL_TOKENS):
            drops[row.source, "special token in text"] += 1
        else:
            seen.add(row.key)
            kept.append(row)
    return kept


def message_tokens(tokenizer: PreTrainedTokenizerFast, rows: list[Row]) -> list[list[int]]:
    """For each row the tokens of its messages, each with its role mark and end mark."""
    texts = [message["content"] for row in rows for message in row.messages]
    lengths = iter(len(ids) + 2 for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])
    return [[next(lengths) for _ in row.messages] for row in rows]


def fitting(rows: list[Row], tokenizer: PreTrainedTokenizerFast, drops: Drops) -> list[Row]:
    """Rows of at most MAX_TOKENS; dialogues are cut after the last answer that fits."""
    kept = []
    for row, lengths in zip(rows, message_tokens(tokenizer, rows), strict=True):
        whole = len(row.messages)
        if row.source == SGD:
            while row.messages and 1 + sum(lengths[: len(row.messages)]) > MAX_TOKENS:
                row.messages = row.messages[:-2]
            if len(row.messages) < whole:
                drops[SGD, "cut to fit (rows kept)"] += 1
                drops[SGD, "messages cut off"] += whole - len(row.messages)
        if row.messages and 1 + sum(lengths[: len(row.messages)]) <= MAX_TOKENS:
            kept.append(row)
        else:
            drops[row.source, f"longer than {MAX_TOKENS} tokens"] += 1
    return kept


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def without_leaks(train: list[Row], heldout: list[Row], drops: Drops) -> list[Row]:
    """Training rows that share no answer, no prompt and no context with a held-out row."""
    answers = {_folded(answer) for row in heldout for answer in row.answers}
    prompts = {_folded(row.messages[0]["content"]) for row in heldout}
    contexts = {_folded(row.context) for row in heldout if row.context}
    long_answers = [answer for answer in answers if len(answer) >= LONG_ANSWER]
    kept = []
    for row in train:
        folded = [_folded(message["content"]) for message in row.messages]
        whole = "\n".join(folded)
        if any(_folded(answer) in answers for answer in row.answers):
            drops[row.source, "same answer as a held-out row"] += 1
        elif folded[0] in prompts or (row.context and _folded(row.context) in contexts):
            drops[row.source, "same prompt or context as a held-out row"] += 1
        elif any(answer in whole for answer in long_answers):
            drops[row.source, "holds the answer of a held-out row"] += 1
        else:
            kept.append(row)
    return kept


def split_reserve(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """(rows kept from training, the rest): by key, so the choice depends on the text alone."""
    reserved: set[str] = set()
    for source, count in {**DEV_ROWS, DOLLY: DOLLY_RESERVE}.items():
        reserved.update(sorted(row.key for row in rows if row.source == source)[:count])
    return [row for row in rows if row.key in reserved], [row for row in rows if row.key not in reserved]


# --- tokenizer ----------------------------------------------------------------------------------


def train_tokenizer(rows: list[Row]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with every digit its own token; nothing is added to a text when encoding it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        min_frequency=10,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (message["content"] for row in rows for message in row.messages)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[f"<|{role}|>" for role in ROLES],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_TOKENS,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def tokenizer_rows(rows: list[Row]) -> list[Row]:
    """What the merges are learnt from: the long dialogues would otherwise outweigh everything else."""
    dialogues = [row for row in rows if row.source == SGD]
    others = [row for row in rows if row.source != SGD and sum(len(m["content"]) for m in row.messages) < 2500]
    return others + dialogues[::3]


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """A tokenizer folder in the words that transformers 4 and 5 both read."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["additional_special_tokens"] = config.pop("extra_special_tokens")
    config.pop("backend", None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path, rows: list[Row]) -> None:
    """Prove what training relies on: lossless text, stable prefixes, one BOS, the same tokenizer when loaded."""
    loaded = AutoTokenizer.from_pretrained(folder)
    assert loaded.all_special_tokens == SPECIAL_TOKENS, loaded.all_special_tokens
    assert loaded.convert_tokens_to_ids(SPECIAL_TOKENS) == list(range(len(SPECIAL_TOKENS)))
    assert len(tokenizer) == len(loaded) == VOCAB_SIZE, (len(tokenizer), len(loaded))
    assert loaded.chat_template == CHAT_TEMPLATE and loaded.model_max_length == MAX_TOKENS
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(tokenizer, name) == getattr(loaded, name) is not None

    odd = [
        "",
        " ",
        "  two  spaces \n\n\tand tab",
        "naïve café 東京 🙂 αβγ",
        "1234 + 5,678 = 3.14!",
        "def f(x):\n    return x",
    ]
    for text in odd + [message["content"] for row in rows for message in row.messages]:
        ids = tokenizer(text)["input_ids"]
        assert ids == loaded(text)["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert loaded.decode(ids) == loaded.decode(ids, skip_special_tokens=True) == text, text

    system = {"role": "system", "content": "  Be brief. "}
    for row, lengths in zip(rows, message_tokens(tokenizer, rows), strict=True):
        ids = loaded.apply_chat_template(row.messages, return_dict=False)
        assert len(ids) == 1 + sum(lengths) and ids.count(loaded.bos_token_id) == 1 and ids[-1] == loaded.eos_token_id
        assert ids == loaded(loaded.apply_chat_template(row.messages, tokenize=False))["input_ids"]
        for messages in (row.messages, [system, *row.messages]):
            full = loaded.apply_chat_template(messages, return_dict=False)
            for k in range(1, len(messages)):
                answering = messages[k]["role"] == "assistant"
                part = loaded.apply_chat_template(messages[:k], add_generation_prompt=answering, return_dict=False)
                assert full[: len(part)] == part


# --- model --------------------------------------------------------------------------------------


def untrained_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=MAX_TOKENS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-5,
        initializer_range=0.02,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():  # the tied matrix is named once
            if weight.dim() == 1:
                weight.fill_(1.0)  # norms
                continue
            into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            scale = 1 / math.sqrt(2 * config.num_hidden_layers) if into_residual else 1.0
            weight.normal_(0.0, config.initializer_range * scale, generator=generator)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


# --- the whole ----------------------------------------------------------------------------------


def write_rows(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(row.as_json() + "\n" for row in rows), encoding="utf-8", newline="\n")


def totals(rows: list[Row], tokenizer: PreTrainedTokenizerFast) -> dict[str, dict[str, float]]:
    """Rows, tokens, answer tokens and characters per token, by source and in all."""
    table: dict[str, Counter[str]] = {source: Counter() for source in (*SOURCES, "all")}
    for row, lengths in zip(rows, message_tokens(tokenizer, rows), strict=True):
        answer_tokens = sum(n - 1 for n, m in zip(lengths, row.messages, strict=True) if m["role"] == "assistant")
        characters = sum(len(message["content"]) for message in row.messages)
        content_tokens = sum(lengths) - 2 * len(lengths)
        for source in (row.source, "all"):
            table[source].update(
                rows=1,
                tokens=1 + sum(lengths),
                answer_tokens=answer_tokens,
                characters=characters,
                content_tokens=content_tokens,
            )
    return {
        source: {
            "rows": count["rows"],
            "tokens": count["tokens"],
            "answer_tokens": count["answer_tokens"],
            "characters_per_token": round(count["characters"] / max(1, count["content_tokens"]), 3),
        }
        for source, count in table.items()
        if count["rows"]
    }


def prepare(data: Path, out: Path, seed: int) -> dict:
    out.mkdir(parents=True, exist_ok=True)
    drops: Drops = Counter()
    rows = usable(read_all(data, seed), drops)
    reserved, train = split_reserve(rows)

    tokenizer = train_tokenizer(tokenizer_rows(train))
    save_tokenizer(tokenizer, out / "init")

    reserved = sorted(fitting(reserved, tokenizer, drops), key=lambda row: row.key)
    dolly = [row for row in reserved if row.source == DOLLY]
    heldout = dolly[:HELDOUT_DOLLY]
    spare = len(dolly) - HELDOUT_DOLLY - DEV_ROWS[DOLLY]
    if spare < 0:
        raise SystemExit("too few reserved Dolly rows fit: raise DOLLY_RESERVE")
    drops[DOLLY, "reserved by key and not needed"] += spare
    dev = [row for row in reserved if row.source != DOLLY] + dolly[HELDOUT_DOLLY : len(dolly) - spare]
    dev = without_leaks(dev, heldout, drops)
    train = without_leaks(fitting(train, tokenizer, drops), heldout, drops)

    random.Random(seed).shuffle(train)
    random.Random(seed).shuffle(dev)
    second_stage = [row for row in train if row.source != GSM8K]
    files = {"train": train, "dev": dev, "heldout_dolly": heldout, "train_dolly_chat": second_stage}
    for name, part in files.items():
        write_rows(out / f"{name}.jsonl", part)

    model = untrained_model(tokenizer, seed)
    model.save_pretrained(out / "init")
    sample = [next(row for row in train if row.source == source) for source in SOURCES] + train[:200] + heldout[:50]
    check_tokenizer(tokenizer, out / "init", sample)

    parameters = sum(weight.numel() for weight in model.parameters())
    tokenizer_bytes = sum(
        (out / "init" / name).stat().st_size for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    )
    return {
        "seed": seed,
        "dropped": {f"{source}: {reason}": count for (source, reason), count in sorted(drops.items()) if count},
        "files": {name: totals(part, tokenizer) for name, part in files.items()},
        "vocabulary": len(tokenizer),
        "parameters": parameters,
        "bfloat16_weight_bytes": 2 * parameters,
        "tokenizer_bytes": tokenizer_bytes,
        "package_bytes": 2 * parameters + tokenizer_bytes,
    }


def show(report: dict) -> None:
    print("Dropped or cut")
    for reason, count in report["dropped"].items():
        print(f"  {reason:<55} {count:>7,}")
    for name, table in report["files"].items():
        print(f"{name}.jsonl")
        for source, row in table.items():
            print(
                f"  {source:<12} {row['rows']:>7,} rows {row['tokens']:>10,} tokens "
                f"{row['answer_tokens']:>10,} answer tokens {row['characters_per_token']:>6.2f} characters/token"
            )
    print(
        f"{report['vocabulary']:,} tokens in the vocabulary, {report['parameters']:,} parameters; "
        f"{report['bfloat16_weight_bytes']:,} bytes in bfloat16 + {report['tokenizer_bytes']:,} of tokenizer "
        f"= {report['package_bytes']:,}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with sft/, dialogue/ and text/")
    parser.add_argument("--out", type=Path, default=Path("build/demo_model"))
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    report = prepare(arguments.data, arguments.out, arguments.seed)
    show(report)
    (arguments.out / "prepare.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if report["package_bytes"] > SIZE_LIMIT:
        raise SystemExit(f"too large to ship: the limit is {SIZE_LIMIT:,} bytes")


if __name__ == "__main__":
    main()
