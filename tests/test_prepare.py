"""Splits without leakage, mixtures in their shares, and a cache that survives anything."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llm_finetune_kit.config import DataSection
from llm_finetune_kit.data import cache, prepare, similar
from llm_finetune_kit.data.masks import Tokens
from llm_finetune_kit.data.mixing import mixed
from llm_finetune_kit.data.prepare import limited
from llm_finetune_kit.data.sources import read_source
from llm_finetune_kit.data.sources.hub_rows import Licence
from llm_finetune_kit.data.split import split
from llm_finetune_kit.errors import ConfigError, DataError
from llm_finetune_kit.models.locate import demo_folder
from llm_finetune_kit.models.tokenizer import ChatTokenizer, load_tokenizer

THINGS = ["river", "mountain", "engine", "teacher", "window", "garden", "letter", "bridge", "station"]
THINGS += ["market", "planet", "doctor", "forest", "silver"]


def encoded(texts: list[str], name: str = "rows") -> prepare.Encoded:
    """Each text as an example of one token, whose id is its number."""
    ids = np.arange(len(texts), dtype=np.int32)
    tokens = Tokens(ids, np.ones(len(texts), dtype=bool), np.arange(len(texts) + 1), ids)
    report = {
        "name": name,
        "rows": len(texts),
        "format": "text",
        "why_format": "",
        "repeated": 0,
        "licence": None,
        "dropped": [],
        "notes": [],
        "warnings": [],
        "cached": False,
    }
    return prepare.Encoded(tokens, similar.sketch(texts), name, report, lambda row: f"{name} line {row + 1}")


def sentences(count: int, seed: int = 0) -> list[str]:
    """Sentences that have little in common."""
    generator = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    return [" ".join("".join(generator.choice(letters, 6)) for _ in range(20)) for _ in range(count)]


@pytest.fixture(scope="module")
def chat() -> ChatTokenizer:
    return load_tokenizer(demo_folder())


# --- the split ---------------------------------------------------------------------------------------------


def test_near_copies_stay_on_one_side_of_the_split() -> None:
    base = sentences(300)
    texts = base + [text + " indeed" for text in base[:100]] + base[100:150] * 2
    for seed in range(5):
        sides = split(encoded(texts), DataSection(validation_split=0.2), seed)
        assert sides.held_out is not None and sides.near_copies == 200
        held = {base.index(texts[i].removesuffix(" indeed")) for i in sides.held_out.ids}
        train = {base.index(texts[i].removesuffix(" indeed")) for i in sides.train.ids}
        assert not held & train and held | train == set(range(300))
        assert 0.9 * 100 <= len(sides.held_out) <= 100


def test_a_split_is_a_function_of_its_seed_and_without_copies_takes_exactly_its_share() -> None:
    data = encoded(sentences(1000))
    chosen = [split(data, DataSection(), seed).held_out for seed in (1, 1, 2)]
    assert chosen[0] is not None and chosen[1] is not None and chosen[2] is not None
    assert len(chosen[0]) == 50
    assert np.array_equal(chosen[0].ids, chosen[1].ids) and not np.array_equal(chosen[0].ids, chosen[2].ids)


@pytest.mark.parametrize(
    ("count", "held", "words"), [(1, 0, "only one example"), (2, 0, "would be held out"), (8, 2, ""), (100, 20, "")]
)
def test_fault_028_small_sets_are_split_or_explained(count: int, held: int, words: str) -> None:
    sides = split(encoded(sentences(count)), DataSection(), 42)
    assert (0 if sides.held_out is None else len(sides.held_out)) == held
    assert words in sides.origin
    assert ("rough guide" in sides.origin) == (0 < held < 20)


def test_a_set_of_copies_alone_is_not_split() -> None:
    sides = split(encoded(sentences(1) * 50), DataSection(), 42)
    assert sides.held_out is None and "near copies of each other" in sides.origin and len(sides.train) == 50


def test_fault_027_training_rows_inside_the_eval_set_are_told_with_their_lines() -> None:
    base = sentences(200)
    train, apart = encoded(base, "train.jsonl"), encoded([*sentences(50, seed=9), base[3], base[7] + " indeed"], "eval.jsonl")
    sides = split(train, DataSection(), 42, held_out=apart)
    assert sides.held_out is apart.tokens and len(sides.train) == 200
    (warning,) = sides.warnings
    assert "2 training examples" in warning and "train.jsonl line 4, train.jsonl line 8" in warning


def test_fault_027_identical_rows_are_counted_with_their_lines(tmp_path: Path) -> None:
    rows = [{"prompt": "What is it?", "response": f"It is {thing}."} for thing in (*THINGS, *THINGS[:2])]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = prepare.read(str(path), DataSection()).report
    assert report["repeated"] == 2
    assert "2 rows repeat an earlier one word for word (lines 15, 16)" in report["repeats"][0]


def test_copies_are_told_of_the_rows_that_are_used(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"The {thing} is here."}) + "\n" for thing in (*THINGS, *THINGS[:2])))
    report = prepare.read(str(path), DataSection()).report
    tokens = encoded(["one", "two", "three", "four"]).tokens
    again = replace(tokens, ids=np.array([0, 1, 2, 0], dtype=np.int32))
    assert prepare.repeats(report, tokens, None) == report["repeats"] and report["repeats"]
    assert prepare.repeats(report, tokens, 4) == [], "the copies are among the others"
    assert prepare.repeats(report, again, 4) == ["of the rows that are used, 1 row repeats an earlier one word for word"]


def test_max_samples_are_chosen_before_the_split() -> None:
    sides = split(encoded(sentences(300)), DataSection(max_samples=100), 42)
    assert sides.held_out is not None and len(sides.train) + len(sides.held_out) == 100


# --- mixtures ----------------------------------------------------------------------------------------------


def test_a_mixture_has_its_shares_and_repeats_nothing() -> None:
    first, second = encoded(sentences(300), "a.jsonl"), encoded(sentences(90, 1), "b.jsonl")
    mix = mixed([first, second], [2.0, 1.0], 42)
    assert (mix.tokens.rows < 300).sum() == 180 and (mix.tokens.rows >= 300).sum() == 90
    assert len(set(mix.tokens.rows.tolist())) == 270
    assert mix.place(299) == "a.jsonl line 300" and mix.place(300) == "b.jsonl line 1"
    assert mix.report["notes"] == ["mixed: 180 of 300 from a.jsonl, 90 of 90 from b.jsonl"]
    assert len(mix.sketches) == len(mix.tokens)


def test_both_is_the_two_sets_of_the_framework_in_equal_shares() -> None:
    assert prepare.training_sets(DataSection(train_file="both")) == {"alpaca": 1.0, "daily_dialog": 1.0}


def test_a_file_beside_a_mixture_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"both given"):
        prepare.training_sets(DataSection(train_file="a.jsonl", mix={"b.jsonl": 1}))


# --- the cache ---------------------------------------------------------------------------------------------


def small_file(folder: Path, rows: int = 50) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Question {i}?", "response": f"Answer {i}."}) + "\n" for i in range(rows)))
    return path


def tokens_of(path: str, chat: ChatTokenizer) -> prepare.Encoded:
    settings = DataSection()
    return prepare.tokenize(prepare.read(path, settings), settings, chat, chat.fingerprint())


def test_the_cache_gives_back_what_was_put_in(tmp_path: Path, chat: ChatTokenizer) -> None:
    path = str(small_file(tmp_path))
    first, again = tokens_of(path, chat), tokens_of(path, chat)
    assert not first.report["cached"] and again.report["cached"]
    assert np.array_equal(first.tokens.ids, again.tokens.ids) and np.array_equal(first.tokens.trained, again.tokens.trained)
    assert np.array_equal(first.sketches, again.sketches)
    assert again.place(3).endswith("rows.jsonl line 4")


def test_fault_031_a_damaged_entry_is_built_anew(tmp_path: Path, chat: ChatTokenizer) -> None:
    path = str(small_file(tmp_path, 51))
    first = tokens_of(path, chat)
    entry = next(one for one in cache.entries() if one.data == path)
    for damage in (b"", entry.path.read_bytes()[:-100], b"x" * 1000):
        entry.path.write_bytes(damage)
        again = tokens_of(path, chat)
        assert not again.report["cached"] and np.array_equal(first.tokens.ids, again.tokens.ids)
    assert tokens_of(path, chat).report["cached"]


def test_the_cache_is_listed_and_cleared(tmp_path: Path, chat: ChatTokenizer) -> None:
    path = str(small_file(tmp_path, 53))
    tokens_of(path, chat)
    assert next(one for one in cache.entries() if one.data == path).examples == 53
    removed, size = cache.clear()
    assert removed > 0 and size > 0 and cache.entries() == []
    assert not tokens_of(path, chat).report["cached"]


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(
    tmp_path: Path, chat: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    monkeypatch.setenv("LLM_FINETUNE_KIT_CACHE", str(blocked))
    assert len(tokens_of(str(small_file(tmp_path, 54)), chat).tokens) == 54


def test_no_training_data_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="no training data"):
        prepare.training_sets(DataSection())
    with pytest.raises(DataError):
        prepare.read("nothing_here.jsonl", DataSection())


def test_a_licence_that_restricts_use_is_a_warning_by_its_flag() -> None:
    source = read_source([{"prompt": "a", "response": "b"}])
    assert limited(source) == []
    assert limited(replace(source, licence=Licence("CC BY 4.0", commercial=True))) == []
    assert limited(replace(source, licence=Licence("Some licence", commercial=False))) == [
        "rows: non-commercial licence (Some licence)"
    ]
