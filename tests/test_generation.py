"""Answers: batches against one by one, sampling that belongs to its prompt, beams, streams, ends and the clock."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import llm_finetune_kit.generation as generation
from llm_finetune_kit.cli import main
from llm_finetune_kit.config import GenerationSection
from llm_finetune_kit.errors import UsageError
from llm_finetune_kit.generation import Answer, Speed, answer, answers, stop_ids
from llm_finetune_kit.generation.choosing import Chooser, _likeliest, prompt_seed
from llm_finetune_kit.generation.stream import stream
from llm_finetune_kit.models.attention import NAME, register
from llm_finetune_kit.opening import Opened, open_model

SAMPLES = Path(__file__).resolve().parents[1] / "src/llm_finetune_kit/assets/samples"
GREEDY = GenerationSection(max_new_tokens=16)
SAMPLED = GenerationSection(max_new_tokens=16, temperature=0.9, top_p=0.95, top_k=50)


@pytest.fixture(scope="module")
def demo() -> Opened:
    return open_model("demo", dtype="float32")


@pytest.fixture(scope="module")
def prompts(demo: Opened) -> list[list[int]]:
    """64 prompts of 10 to 54 tokens."""
    names = ("instruct", "chat", "summarization", "code")
    rows = [row for name in names for row in json.loads((SAMPLES / f"{name}.json").read_text())]
    texts = [row.get("prompt") or row["instruction"] for row in rows][:64]
    return [demo.chat.prompt_ids([{"role": "user", "content": text}]) for text in texts]


def test_a_batch_says_what_each_prompt_gets_alone_in_any_order(demo: Opened, prompts: list[list[int]]) -> None:
    together = answers(demo.model, demo.chat, prompts[:12], GREEDY)
    assert len({len(ids) for ids in prompts[:12]}) > 3, "rows of unequal length are padded"
    assert together == [answers(demo.model, demo.chat, [ids], GREEDY)[0] for ids in prompts[:12]]
    assert answers(demo.model, demo.chat, prompts[:12][::-1], GREEDY) == together[::-1]


def test_greedy_search_is_that_of_plain_transformers(demo: Opened, prompts: list[list[int]]) -> None:
    for ids in prompts[:3]:
        how = {"max_new_tokens": 16, "do_sample": False, "repetition_penalty": 1.3}
        out = demo.model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), **how)
        asked = GREEDY.model_copy(update={"repetition_penalty": 1.3})
        assert answer(demo.model, demo.chat, ids, asked) == demo.chat.decode(out[0, len(ids) :].tolist()).strip()


def test_beam_search_is_that_of_plain_transformers_in_a_batch_too(demo: Opened, prompts: list[list[int]]) -> None:
    how = GREEDY.model_copy(update={"num_beams": 4, "max_new_tokens": 12})
    plain = []
    for ids in prompts[:4]:
        out = demo.model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=12, num_beams=4)
        plain.append(demo.chat.decode(out[0, len(ids) :].tolist()).strip())
    assert [one.text for one in answers(demo.model, demo.chat, prompts[:4], how)] == plain


def test_a_drawn_answer_depends_on_seed_and_prompt_and_not_on_the_batch(demo: Opened, prompts: list[list[int]]) -> None:
    state = torch.random.get_rng_state()
    first = answers(demo.model, demo.chat, prompts[:6], SAMPLED, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state), "the global random state is left alone"
    assert answers(demo.model, demo.chat, prompts[2:4], SAMPLED, seed=3) == first[2:4]
    other = answers(demo.model, demo.chat, prompts[:6], SAMPLED, seed=4)
    assert [one.text for one in other] != [one.text for one in first]


def test_beams_that_draw_are_seeded_too(demo: Opened, prompts: list[list[int]]) -> None:
    how = GenerationSection(max_new_tokens=8, temperature=0.9, num_beams=2)
    first = answers(demo.model, demo.chat, prompts[:2], how, seed=1)
    assert answers(demo.model, demo.chat, prompts[1:2], how, seed=1) == first[1:]
    assert answers(demo.model, demo.chat, prompts[:2], how, seed=2) != first


def test_draws_have_the_probabilities_of_softmax() -> None:
    how = GenerationSection(temperature=0.5, top_k=4)
    scores = torch.tensor([[1.0, 0.5, 0.0, -0.5, -1.0, -9.0]])
    wanted = _likeliest(scores / 0.5, 4, 1.0).softmax(-1)[0]
    chooser = Chooser(how, [0] * 5000, [prompt_seed(0, [number]) for number in range(5000)])
    taken = chooser(torch.zeros(5000, 1, dtype=torch.int64), scores.expand(5000, -1)).argmax(-1)
    shares = torch.bincount(taken, minlength=6) / 5000
    assert shares[4] == shares[5] == 0
    torch.testing.assert_close(shares, wanted, atol=0.02, rtol=0)


@pytest.mark.parametrize(("top_k", "top_p", "kept"), [(None, 1.0, 4), (2, 1.0, 2), (None, 0.6, 2), (None, 0.01, 1), (9, 0.9, 3)])
def test_only_the_likeliest_stay(top_k: int | None, top_p: float, kept: int) -> None:
    scores = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log()
    found = _likeliest(scores, top_k, top_p)[0]
    assert int(found.isfinite().sum()) == kept and bool(found[1].isfinite())


def test_padding_is_not_taken_for_something_said() -> None:
    chooser = Chooser(GenerationSection(repetition_penalty=2.0), [2, 0], None)
    scores = torch.tensor([[4.0, 3.0, -2.0], [4.0, 3.0, -2.0]])
    found = chooser(torch.tensor([[0, 0, 1, 1], [0, 1, 2, 2]]), scores)
    assert found.tolist() == [[4.0, 1.5, -2.0], [2.0, 1.5, -4.0]]


def test_what_a_models_files_add_to_generation_is_left_out_but_for_its_ends(demo: Opened, prompts: list[list[int]]) -> None:
    plain = answers(demo.model, demo.chat, prompts[:2], GREEDY)
    config, ends = demo.model.generation_config, stop_ids(demo.model, demo.chat)
    config.repetition_penalty, config.eos_token_id = 1.8, [config.eos_token_id, 77]
    try:
        assert answers(demo.model, demo.chat, prompts[:2], GREEDY) == plain
        assert stop_ids(demo.model, demo.chat) == sorted({*ends, 77})
    finally:
        config.repetition_penalty, config.eos_token_id = 1.0, 1
    assert demo.model.generation_config is config


def test_an_answer_says_whether_it_ended_by_itself(demo: Opened) -> None:
    end = demo.chat.eos_id
    say = generation._answer
    hello = demo.chat.tokenizer("hello", add_special_tokens=False)["input_ids"]
    assert say(demo.chat, [*hello, end, end, 5], [end]) == Answer("hello", len(hello) + 1, True)
    assert say(demo.chat, hello, [end]) == Answer("hello", len(hello), False)


def test_a_prompt_that_is_too_long_loses_its_beginning(demo: Opened) -> None:
    ids = list(range(3, 700))
    one = answers(demo.model, demo.chat, [ids], GREEDY)[0]
    assert one == answers(demo.model, demo.chat, [ids[-(512 - 16) :]], GREEDY)[0]
    most = answers(demo.model, demo.chat, [ids[:20]], GenerationSection(max_new_tokens=9000, repetition_penalty=1.2))[0]
    assert most.tokens <= 511


def test_memory_of_the_cache_bounds_a_batch(demo: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [10, 500, 20, 30]
    whole = list(generation._batches(demo.model, lengths, GREEDY))
    assert whole == [[0, 2, 3, 1]]
    monkeypatch.setattr(generation, "CACHE_BYTES", generation._cache_bytes(demo.model) * (500 + 16))
    assert list(generation._batches(demo.model, lengths, GREEDY)) == [[1], [0, 2, 3]]
    drawing_beams = GenerationSection(num_beams=2, temperature=1.0)
    assert list(generation._batches(demo.model, lengths, drawing_beams)) == [[1], [3], [2], [0]]


SMALL = {"vocab_size": 4096, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 2}
SHAPES = {
    "gpt2": {"vocab_size": 4096, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "eos_token_id": 1},
    "llama": SMALL,
    "qwen2": SMALL,
    "mistral": SMALL | {"sliding_window": 8},
    "gemma2": SMALL | {"head_dim": 8, "sliding_window": 8, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    "gpt_neox": {name: value for name, value in SMALL.items() if name != "num_key_value_heads"},
}


@pytest.mark.parametrize("kind", SHAPES)
def test_every_family_says_the_same_in_a_batch_alone_and_with_transformers_own_attention(
    kind: str, demo: Opened, prompts: list[list[int]]
) -> None:
    """Left padding, absolute and rotary positions, shared heads, sliding windows, soft caps; decoded token by token."""
    register()
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SHAPES[kind])).eval()
    for weight in model.parameters():
        weight.data.mul_(4)  # so that attention matters
    model.set_attn_implementation("eager")
    asked = sorted(prompts[:40], key=len)[::8]
    plain = answers(model, demo.chat, asked, GREEDY)
    model.set_attn_implementation(NAME)
    assert answers(model, demo.chat, asked, GREEDY) == plain
    assert [answers(model, demo.chat, [ids], GREEDY)[0] for ids in asked] == plain
    assert len({one.text for one in plain}) == len(asked)


# --- streams -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [GREEDY, SAMPLED])
def test_a_stream_is_the_answer_in_pieces(demo: Opened, prompts: list[list[int]], how: GenerationSection) -> None:
    pieces = list(stream(demo.model, demo.chat, prompts[5], how, seed=1))
    assert len(pieces) > 3
    assert "".join(pieces).strip() == answer(demo.model, demo.chat, prompts[5], how, seed=1)


def test_letters_of_several_tokens_come_whole(demo: Opened) -> None:
    from queue import Queue

    from llm_finetune_kit.generation.stream import _pieces

    text = "naïve ☂ 東京 😀!"
    said: Queue[Any] = Queue()
    for index in demo.chat.tokenizer(text, add_special_tokens=False)["input_ids"]:
        said.put(index)
    said.put(None)
    pieces = list(_pieces(demo.chat, said, set()))
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)


def test_who_stops_listening_stops_the_model(demo: Opened, prompts: list[list[int]]) -> None:
    spent = Speed()
    how = GenerationSection(max_new_tokens=400, repetition_penalty=1.5)
    pieces = stream(demo.model, demo.chat, prompts[0], how, speed=spent)
    next(pieces)
    pieces.close()
    assert 0 <= spent.decoded_tokens < 50


def test_a_fault_of_the_model_reaches_the_listener(demo: Opened, prompts: list[list[int]]) -> None:
    with pytest.raises(IndexError):
        list(stream(demo.model, demo.chat, [10**6], GREEDY))
    with pytest.raises(UsageError, match="beam search cannot be streamed"):
        next(stream(demo.model, demo.chat, prompts[0], GREEDY.model_copy(update={"num_beams": 2})))


# --- speed -------------------------------------------------------------------------------------------------


def test_the_clock_tells_reading_from_writing(demo: Opened, prompts: list[list[int]]) -> None:
    spent, began = Speed(), time.perf_counter()
    said = answers(demo.model, demo.chat, prompts[:8], GREEDY, speed=spent)
    took = time.perf_counter() - began
    assert spent.prompt_tokens == sum(map(len, prompts[:8]))
    assert spent.decoded_tokens == sum(one.tokens - 1 for one in said)
    assert min(spent.prefill_seconds, spent.decode_seconds) > 0
    assert spent.prefill_seconds + spent.decode_seconds < took


def test_64_prompts_together_take_less_than_a_quarter_of_the_time_of_one_by_one(demo: Opened, prompts: list[list[int]]) -> None:
    """Processor time, as other processes may take turns with this one; benchmarks/evaluation_speed.py has both."""
    how = GenerationSection(max_new_tokens=12)
    answers(demo.model, demo.chat, prompts[:2], how)
    started = time.process_time()
    answers(demo.model, demo.chat, prompts, how)
    together = time.process_time() - started
    started = time.process_time()
    for ids in prompts[::8]:
        answers(demo.model, demo.chat, [ids], how)
    assert 8 * (time.process_time() - started) > 4 * together


# --- the terminal ------------------------------------------------------------------------------------------


def test_the_command_answers_files_of_prompts_and_streams(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text("Hello?\n\nWhat is tea?\n")
    short = ["--max-new-tokens", "6"]
    assert main(["generate", "demo", "--prompts", str(tmp_path / "prompts.txt"), "--json", *short]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in rows] == ["Hello?", "What is tea?"]
    assert main(["generate", "demo", "--prompt", "What is tea?", "--stream", *short]) == 0
    assert capsys.readouterr().out.strip() == rows[1]["answer"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--prompt", "a", "--prompts", "b.txt"], "both given"),
        (["--prompt", "a", "--stream", "--json"], "--stream shows one answer"),
        (["--prompts", "nowhere.txt"], "cannot be read"),
        (["--prompt", "a", "--top-p", "0"], "top_p"),
        (["--prompt", "a", "--repetition-penalty", "0"], "repetition_penalty"),
    ],
)
def test_a_wrong_word_is_told_before_anything_is_loaded(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "demo", *words]) in (2, 3)
    assert told in capsys.readouterr().err
