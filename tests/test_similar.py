"""Copies and near copies: all planted ones are found, nothing else is, and large templates cost no more than other rows."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from llm_finetune_kit.data import similar
from llm_finetune_kit.data.formats import Example, detect, to_examples
from llm_finetune_kit.data.quality import copies
from llm_finetune_kit.data.sources import read_source

WORDS = [f"word{index}" for index in range(4000)]


def sentences(count: int, length: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=length)) for _ in range(count)]


def changed(text: str, words: int, rng: random.Random) -> str:
    """The text with some of its words replaced by others."""
    parts = text.split()
    for at in rng.sample(range(len(parts)), words):
        parts[at] = f"new{rng.randrange(10**9)}"
    return " ".join(parts)


def alike(one: str, other: str) -> float:
    return similar.similarity(similar.shingles(one), similar.shingles(other))


def test_words_have_one_spelling() -> None:
    assert similar.words("The ＣＡＴ, (the cat)!") == ["the", "cat", "the", "cat"]
    assert similar.words("Straße 12") == ["strasse", "12"]
    assert similar.words("我喜欢 tea。") == ["我", "喜", "欢", "tea"]
    assert similar.words("7 + 5 = 12") == ["7", "+", "5", "=", "12"]


def test_similarity_is_jaccard_of_word_pairs() -> None:
    assert alike("a b c d", "A  b, c d.") == 1
    assert alike("a b c d", "a b c e") == pytest.approx(2 / 4)
    assert alike("yes", "no") == 0
    assert alike("7 + 5", "7 * 5") == 0
    assert alike("", "   ") == 1
    assert alike("!!!", "???") == 0


def test_estimates_agree_with_the_exact_similarity() -> None:
    rng = random.Random(5)
    texts = []
    for text in sentences(400, 60, seed=4):
        texts += [text, changed(text, rng.randrange(1, 20), rng)]
    sketches = similar.sketch(texts)
    assert sketches.shape == (800, 64) and sketches.dtype == np.uint16
    estimates = (sketches[::2] == sketches[1::2]).mean(axis=1)
    exact = np.array([alike(texts[at], texts[at + 1]) for at in range(0, 800, 2)])
    spread = np.sqrt(exact * (1 - exact) / 64)
    assert abs((estimates - exact).mean()) < 0.01
    assert 0.85 < ((estimates - exact) / spread).std() < 1.15, "64 independent hash functions give just this spread"


def test_a_sketch_depends_on_its_own_text_only() -> None:
    texts = [*sentences(similar.CHUNK + 50, 8, seed=1), "", "one"]
    whole = similar.sketch(texts)
    for row in (0, similar.CHUNK - 1, similar.CHUNK, len(texts) - 2, len(texts) - 1):
        assert np.array_equal(similar.sketch([texts[row]])[0], whole[row])
    assert similar.sketch([]).shape == (0, 64)


def test_sketches_are_the_same_in_every_process() -> None:
    """The split into training and held-out rows rests on them."""
    code = "from llm_finetune_kit.data.similar import sketch; print(sketch(['the quick brown fox', 'über 你好']).tobytes().hex())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == similar.sketch(["the quick brown fox", "über 你好"]).tobytes().hex()
    assert done.stdout.startswith("fb04d4210dd87e54"), "on every machine"


def test_fault_027_exact_duplicates_are_all_found() -> None:
    texts = sentences(3000, 12, seed=2)
    planted = {len(texts) + place: row for place, row in enumerate(random.Random(3).choices(range(3000), k=300))}
    texts += [texts[row].upper().replace(" ", "\n ") for row in planted.values()]
    pairs = similar.exact_duplicates(texts)
    assert {later for _, later in pairs} == set(planted)
    assert all(first == planted[later] for first, later in pairs), "the first of three copies stands for both others"


def test_fault_027_near_duplicates_at_0_8_are_found_without_false_alarms() -> None:
    rng = random.Random(7)
    texts = sentences(4000, 25, seed=6)
    template = "write a short and friendly letter to my dear colleague who would like to know more about"
    texts += [f"{template} {ending}" for ending in sentences(4000, 7, seed=8)]
    sources = rng.sample(range(8000), 800)
    texts += [changed(texts[row], 1, rng) for row in sources]
    planted = {8000 + place for place, row in enumerate(sources) if alike(texts[row], texts[8000 + place]) >= 0.8}
    assert len(planted) > 600
    pairs = copies.near_duplicates(texts)
    found = {later for _, later, _ in pairs}
    assert len(found & planted) >= 0.95 * len(planted)
    assert all(first < later and score == alike(texts[first], texts[later]) >= 0.8 for first, later, score in pairs)
    kept = [text for row, text in enumerate(texts) if row not in found]
    assert copies.near_duplicates(kept) == [], "what is left has none"


def test_another_question_about_the_same_passage_is_no_copy() -> None:
    passage = sentences(1, 80, seed=9)[0]
    texts = [f"Who was it? {passage} Ada", f"When was it? {passage} in 1843", f"So who was it? {passage} Ada"]
    assert [later for _, later, _ in copies.near_duplicates(texts)] == [1, 2]
    assert [pair[:2] for pair in copies.near_duplicates(texts, answers=["Ada", "in 1843", "Ada"])] == [(0, 2)]


def test_groups_hold_copies_together_and_others_apart() -> None:
    rng = random.Random(11)
    texts = sentences(2000, 30, seed=10)
    texts += [changed(text, 1, rng) for text in texts[:500]]
    texts += [texts[0]] * 3
    group = similar.groups(similar.sketch(texts))
    assert group.dtype == np.int32
    assert (group[:2000] == np.arange(2000)).all(), "rows that have nothing in common stay alone"
    assert (group[2000:2500] == np.arange(500)).mean() > 0.98
    assert (group[2500:] == 0).all()
    assert (group[group] == group).all() and (group <= np.arange(len(group))).all()


def test_a_template_shared_by_all_rows_costs_linear_time() -> None:
    """Every row is in the same bucket of nearly every band: comparing all pairs would be 450 million comparisons."""
    template = " ".join(WORDS[:60])
    texts = [f"{template} {ending}" for ending in sentences(30_000, 2, seed=12)]
    sketches = similar.sketch(texts)
    started = time.process_time()
    group = similar.groups(sketches, threshold=0.7)
    assert time.process_time() - started < 10
    assert (group == 0).mean() > 0.99


def test_fault_027_leakage_is_found_on_both_sides_of_a_template() -> None:
    rng = random.Random(13)
    template = "write a short and friendly letter to my dear colleague who would like to know more about"
    train = sentences(3000, 25, seed=14) + [f"{template} {ending}" for ending in sentences(3000, 7, seed=15)]
    leaked = rng.sample(range(6000), 200)
    held_out = [train[row] if place % 2 else changed(train[row], 1, rng) for place, row in enumerate(leaked)]
    planted = {place for place, row in enumerate(leaked) if alike(train[row], held_out[place]) >= 0.8}
    held_out += sentences(500, 25, seed=16) + [f"{template} {ending}" for ending in sentences(500, 7, seed=17)]
    pairs = copies.copies_across(train, held_out)
    found = {row for _, row, _ in pairs}
    assert found <= planted and len(found) >= 0.95 * len(planted)
    assert set(range(1, 200, 2)) <= found, "exact copies always"
    assert all(train[first] and score == alike(train[first], held_out[row]) >= 0.8 for first, row, score in pairs)


def test_text_of_an_example_leaves_out_only_the_system_message() -> None:
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yo"},
    ]
    assert similar.text_of(Example(messages, None, 0)) == "Hi\nYo"
    assert similar.text_of(Example(None, "once upon", 0)) == "once upon"
    worse = [{"role": "assistant", "content": "Nope"}]
    assert similar.text_of(Example(messages, None, 0, rejected=worse)) == "Hi\nYo\nNope"
    assert similar.text_of(Example(messages, None, 0, label=False)) == "Hi\nYo\nbad"
    texts = similar.Texts([Example(None, "a", 0), Example(None, "b", 1)])
    assert (len(texts), texts[1], texts[0:2]) == (2, "b", ["a", "b"])


@pytest.mark.parametrize(
    ("name", "count"),
    [("alpaca_data.json.gz", 0), ("gsm8k_train.jsonl.gz", 0), ("llamafactory/alpaca_en_demo.json", 14)],
)
def test_real_sets_have_the_known_number_of_copies(shared: Path, name: str, count: int) -> None:
    source = read_source(shared / "sft" / name)
    examples = to_examples(source, detect(source, None), on_bad_rows="drop", system_prompt=None).examples
    assert len(similar.exact_duplicates(similar.Texts(examples))) == count
