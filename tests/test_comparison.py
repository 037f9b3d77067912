"""Did it help? Zero adapters, tasks that can be learned, shuffled answers, and what a comparison leaves behind."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm_finetune_kit import compare_models
from llm_finetune_kit.arguments import asked_config
from llm_finetune_kit.cli import _parser, main
from llm_finetune_kit.config import DataSection, GenerationSection, RunConfig
from llm_finetune_kit.data import prepare
from llm_finetune_kit.data.batches import evaluation_passes
from llm_finetune_kit.errors import ConfigError, DataError, UsageError
from llm_finetune_kit.evaluation.asking import general_tokens, how_many, prompts_of, usual_count
from llm_finetune_kit.evaluation.comparison import _drift, _sentence
from llm_finetune_kit.evaluation.losses import RowLosses, row_losses
from llm_finetune_kit.evaluation.perplexity import measure, rows_for
from llm_finetune_kit.events import Compared, Event, Warned
from llm_finetune_kit.models.adapters import add_lora
from llm_finetune_kit.opening import Opened, open_model, opened
from llm_finetune_kit.run import Result, run
from llm_finetune_kit.settings import changed
from llm_finetune_kit.training.step import mean_loss

FRUITS = {"red": "cherry", "yellow": "banana", "green": "lime", "orange": "carrot", "blue": "plum", "white": "garlic"}
ASKING = ["What food is {}?", "Name a {} food.", "Which food has a {} skin?", "I want to eat something {}.", "Give me a {} food."]
SHORT = GenerationSection(max_new_tokens=8)


def rows(names: dict[str, str], ways: list[str]) -> list[dict[str, str]]:
    return [{"prompt": way.format(c), "response": f"The {c} one is the {f}."} for way in ways for c, f in names.items()]


def shuffled() -> dict[str, str]:
    """Every colour with the food of another one."""
    foods = list(FRUITS.values())
    return dict(zip(FRUITS, [*foods[1:], foods[0]], strict=True))


def train(folder: Path, model: str, names: dict[str, str], **values: Any) -> tuple[Result, list[Event]]:
    """A short run on the task, measured on a way of asking that it was not trained on."""
    told: list[Event] = []
    asked = {
        "model.name": model,
        "model.dtype": "float32",
        "data.train_file": rows(names, ASKING[:4]),
        "data.eval_file": rows(FRUITS, ASKING[4:]) + rows(FRUITS, ["Is there a {} food?"]),
        "training.batch_size": 12,
        "training.gradient_accumulation_steps": 1,
        "training.max_steps": 24,
        "training.learning_rate": 3e-3,
        "training.eval_steps": 24,
        "training.save_steps": 24,
        "evaluation.generation.max_new_tokens": 12,
        "output.output_dir": str(folder),
    }
    more = {name.replace("__", "."): value for name, value in values.items()}
    return run(changed(RunConfig(), asked | more), told.append), told


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, list[Event]]:
    """The demo model, all of its weights trained on the task: its base is loaded anew for the comparison."""
    return train(tmp_path_factory.mktemp("learned"), "demo", FRUITS, method="full", training__learning_rate=1e-3)


@pytest.fixture(scope="module")
def spoiled(learned: tuple[Result, list[Event]], tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, list[Event]]:
    """An adapter on top of that, trained on shuffled answers."""
    return train(tmp_path_factory.mktemp("spoiled"), str(learned[0].folder.final), shuffled())


@pytest.fixture(scope="module")
def demo() -> Opened:
    return open_model("demo", dtype="float32")


# --- the verdict -------------------------------------------------------------------------------------------


def test_a_task_that_can_be_learned_is_called_better(learned: tuple[Result, list[Event]]) -> None:
    found = learned[0].comparison
    assert found is not None and found["outcome"] == "better" and found["sentence"].startswith("Better: held-out loss fell")
    assert found["wins"] == {"won": 12, "lost": 0, "tied": 0}
    assert found["rows"]["measured"] == 12 and found["rows"]["answered"] == 12
    by_name = {row["name"]: row for row in found["metrics"]}
    assert by_name["loss"]["high"] < 0 and by_name["chrf"]["outcome"] == "better"
    assert [event.comparison for event in learned[1] if isinstance(event, Compared)] == [found]


def test_an_adapter_trained_on_shuffled_answers_is_called_worse(spoiled: tuple[Result, list[Event]]) -> None:
    found = spoiled[0].comparison
    assert found is not None and found["outcome"] == "worse" and found["sentence"].startswith("Worse: held-out loss rose")
    assert found["wins"]["lost"] > found["wins"]["won"] and found["worst"]
    worst = found["examples"][found["worst"][0]]
    assert worst["change"] == max(one["change"] for one in found["examples"]) > 0


def test_a_zero_adapter_differs_by_exactly_nothing(demo: Opened) -> None:
    for dtype in ("float32", "bfloat16"):
        base = open_model("demo", dtype=dtype)
        names = ["q_proj", "v_proj", "up_proj"]
        model = add_lora(base.model, r=4, alpha=8, dropout=0.0, targets=names, base_name="demo", seed=1)
        found = compare_models(model, tokenizer=base.chat.tokenizer, data=rows(FRUITS, ASKING[:2]), how=SHORT)
        assert found["outcome"] == "none" and found["sentence"].startswith("No difference shown")
        for row in found["metrics"]:
            assert row["difference"] == 0, row["name"]
            assert row["low"] is None or row["low"] == -row["high"], "equal answers to few rows do not tell much of others"
        assert [(row["low"], row["high"]) for row in found["metrics"] if row["name"] in ("loss", "perplexity")] == [(0, 0)] * 2
        assert found["wins"]["tied"] == 12 and found["general"]["difference"] == 0
        assert found["best"] == found["worst"] == []


def test_a_change_that_may_be_chance_is_not_called_a_difference(demo: Opened) -> None:
    torch.manual_seed(0)
    base = open_model("demo", dtype="float32")
    model = add_lora(base.model, r=4, alpha=8, dropout=0.0, targets=["q_proj"], base_name="demo", seed=1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 1e-3)
    found = compare_models(model, tokenizer=base.chat.tokenizer, data=rows(FRUITS, ASKING[:1]), how=SHORT)
    loss = found["metrics"][0]
    assert loss["difference"] != 0 and loss["low"] < 0 < loss["high"] and found["outcome"] == "none"


# --- what it is made of ------------------------------------------------------------------------------------


def test_losses_of_rows_do_not_depend_on_packing_budget_or_order(demo: Opened) -> None:
    tokens = rows_for(demo, prepare.read("sample:instruct", DataSection()), DataSection()).tokens.select(np.arange(8))
    whole = row_losses(demo.objective, tokens, demo.chat)
    loss, targets = mean_loss(demo.objective, evaluation_passes(tokens, 2048))
    assert whole.loss.sum() / whole.targets.sum() == pytest.approx(loss, rel=1e-6) and whole.targets.sum() == targets
    order = np.random.default_rng(0).permutation(len(tokens))
    for other in (
        row_losses(demo.objective, tokens, demo.chat, budget=64),
        row_losses(demo.objective, tokens, demo.chat, packing=False),
        row_losses(demo.objective, tokens.select(order), demo.chat),
    ):
        assert other.rows.tolist() == whole.rows.tolist() and (other.targets == whole.targets).all()
        np.testing.assert_allclose(other.loss, whole.loss, rtol=1e-6)


def test_bytes_are_those_of_the_answers(demo: Opened) -> None:
    data = rows(FRUITS, ASKING[:1])
    tokens = rows_for(demo, prepare.read(data, DataSection()), DataSection()).tokens
    assert row_losses(demo.objective, tokens, demo.chat).bytes.tolist() == [len(row["response"]) for row in data]


def test_prompts_are_rows_up_to_their_answer(demo: Opened) -> None:
    data = rows(FRUITS, ASKING)
    tokens = rows_for(demo, prepare.read(data, DataSection()), DataSection()).tokens
    found = prompts_of(tokens, demo.chat, seed=3)
    assert sorted(one.row for one in found) == list(range(30)) and found == prompts_of(tokens, demo.chat, seed=3)
    assert [one.row for one in found] != [one.row for one in prompts_of(tokens, demo.chat, seed=4)]
    for one in found:
        assert one.reference == data[one.row]["response"]
        assert one.ids == demo.chat.prompt_ids([{"role": "user", "content": data[one.row]["prompt"]}])


def test_rows_that_the_model_cannot_read_are_left_out_and_counted(demo: Opened) -> None:
    data = [*rows(FRUITS, ASKING[:1]), {"prompt": "Why? " * 600, "response": "Because."}]
    found = rows_for(demo, prepare.read(data, DataSection()), DataSection())
    assert (len(found.tokens), found.left_out) == (len(data) - 1, 1)
    compared = compare_models("demo", "demo", data=data, rows=1, how=SHORT)
    assert compared["rows"]["left_out"] == 1 and compared["rows"]["measured"] == len(data) - 1
    assert measure("demo", data)["model"]["left_out"] == 1
    with pytest.raises(DataError, match=r"no token to learn|beyond max_length"):
        rows_for(demo, prepare.read(data[-1:], DataSection()), DataSection())


def test_a_better_loss_does_not_hide_worse_answers() -> None:
    loss = {"name": "loss", "label": "Held-out loss", "base": 3.0, "tuned": 2.0, "difference": -1.0, "low": -1.2, "high": -0.8}
    metrics = [loss | {"outcome": "better"}, {"label": "chrF", "outcome": "worse"}, {"label": "BLEU", "outcome": "none"}]
    wins = {"won": 5, "lost": 0, "tied": 0}
    assert _sentence(metrics[0], wins, metrics).endswith("5 rows got better, 0 worse. But shown to be worse: chrF.")
    assert _sentence(metrics[0], wins, metrics[::2]).endswith("0 worse.")


def test_raw_texts_have_prompts_and_no_references(demo: Opened) -> None:
    tokens = rows_for(demo, prepare.read([{"text": "The sun rose. " * 20}], DataSection()), DataSection()).tokens
    (one,) = prompts_of(tokens, demo.chat, seed=0)
    assert one.reference == "" and len(one.ids) == 16


def test_the_number_of_answers_follows_from_counts_alone(demo: Opened) -> None:
    assert how_many(100, None, 200) == (100, "all there are")
    assert how_many(100, None, 7) == (7, "about a minute's worth on a usual machine")
    assert how_many(100, 7, 50) == (7, "as many as were asked for") and how_many(4, 7, 50) == (4, "all there are")
    few, many = (usual_count(demo.model, tokens, 5.0) for tokens in (1000, 64))
    assert few < many and usual_count(demo.model, 64, 1e-9) == 4 and usual_count(demo.model, 64, 1e9) == 256


def test_how_much_was_forgotten_is_graded_and_stands_with_its_interval() -> None:
    row = {"base": 2.0, "outcome": "worse"}
    for relative, word in ((0.015, "a little"), (0.05, "some"), (0.12, "much")):
        moved = {"tuned": 2 * (1 + relative), "low": relative, "high": 3 * relative}
        said = _drift(row | moved, relative, 40)
        assert said.startswith(f"It forgot {word} of what it knew")
        assert f"({relative:+.1%}, with 95 % confidence {relative / 2:+.1%} to {1.5 * relative:+.1%})" in said
    assert _drift(row | {"tuned": 2.01, "low": -0.1, "high": 0.1, "outcome": "none"}, 0.005, 40).startswith("No forgetting shown")


def test_the_general_set_is_forty_short_texts_of_two_kinds(demo: Opened) -> None:
    tokens = general_tokens(demo.chat, 512)
    assert len(tokens) == 40 and int(tokens.lengths.max()) < 512
    whole = [tokens.example(index)[1].all() for index in range(40)]
    assert sum(whole) == 20
    losses = row_losses(demo.objective, tokens, demo.chat)
    assert 1.0 < losses.loss.sum() / np.log(2) / losses.bytes.sum() < 3.0, "bits per byte of plain English for a small model"


def test_rows_are_found_by_their_number() -> None:
    losses = RowLosses(np.array([2, 5, 9]), np.array([1.0, 2.0, 3.0]), np.ones(3), np.ones(3))
    assert losses.at([9, 2]).loss.tolist() == [3.0, 1.0]


# --- what a run leaves -------------------------------------------------------------------------------------


def test_a_run_leaves_the_comparison_in_all_its_files(spoiled: tuple[Result, list[Event]]) -> None:
    folder = spoiled[0].folder.path
    tree = json.loads((folder / "eval_results.json").read_text())
    assert tree["comparison"]["outcome"] == "worse" and tree["comparison"]["decoding"]["max_new_tokens"] == 12
    one = tree["comparison"]["examples"][0]
    assert set(one) == {"row", "place", "prompt", "reference", "base", "tuned", "change"} and not one["place"].startswith("/")
    assert {"text", "tokens", "stopped", "loss"} == set(one["base"])
    table = {row["metric"]: row for row in csv.DictReader((folder / "eval_results.csv").read_text().splitlines())}
    assert float(table["held_out_loss"]["low"]) > 0 and table["held_out_loss"]["outcome"] == "worse"
    assert {"bleu", "chrf", "rougeL", "stop_rate", "general_bits_per_byte"} <= set(table)
    text = (folder / "comparison.md").read_text()
    assert "sacreBLEU nrefs:1" in text and "### Where it got worse most" in text and "2,000 resamples" in text
    assert "compared after step" in (folder / "run.log").read_text()


def test_the_comparison_can_be_left_out_and_its_metrics_and_rows_chosen(tmp_path: Path) -> None:
    quick = {"training__max_steps": 1, "training__eval_steps": 1, "training__save_steps": 1}
    result, told = train(tmp_path, "demo", FRUITS, evaluation__compare=False, **quick)
    assert result.comparison is None and not any(isinstance(event, Compared) for event in told)
    result, _ = train(tmp_path, "demo", FRUITS, evaluation__metrics=["rouge1", "perplexity"], evaluation__rows=3, **quick)
    assert result.comparison is not None
    assert [row["name"] for row in result.comparison["metrics"]] == ["loss", "perplexity", "rouge1"]
    assert len(result.comparison["examples"]) == 3 and result.comparison["rows"]["why"] == "as many as were planned"
    result, _ = train(tmp_path, "demo", FRUITS, evaluation__metrics=["perplexity"], **quick)
    assert result.comparison is not None and result.comparison["rows"]["answered"] == 0
    with pytest.raises(ConfigError, match=r"evaluation\.metrics"):
        changed(RunConfig(), {"evaluation.metrics": ["blue"]})


def test_forgetting_is_told(spoiled: tuple[Result, list[Event]]) -> None:
    general = spoiled[0].comparison["general"]  # type: ignore[index]
    assert general["texts"] == 40 and general["difference"] == pytest.approx(general["tuned"] - general["base"])
    warned = any(isinstance(event, Warned) and "forgot" in event.message for event in spoiled[1])
    assert warned == (general["outcome"] == "worse" and general["relative"] >= 0.1)


def test_a_full_run_whose_base_does_not_fit_beside_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llm_finetune_kit.evaluation import end_of_run

    monkeypatch.setattr(end_of_run, "BYTES", {"float32": 10**6})
    quick = {"training__max_steps": 1, "training__eval_steps": 1, "training__save_steps": 1, "method": "full"}
    result, told = train(tmp_path, "demo", FRUITS, **quick)
    assert result.comparison is None and result.folder.finished
    assert any(isinstance(event, Warned) and "a second copy of the model takes" in event.message for event in told)


# --- the command and the function --------------------------------------------------------------------------


def test_compare_finds_the_rows_that_the_run_held_out(
    spoiled: tuple[Result, list[Event]], capsys: pytest.CaptureFixture[str]
) -> None:
    run_folder = str(spoiled[0].folder.path)
    short = ["--max-new-tokens", "8", "--dtype", "float32"]
    assert main(["compare", run_folder, "--json", "--rows", "4", *short]) == 0
    found = json.loads(capsys.readouterr().out)
    at_the_end = spoiled[0].comparison
    assert at_the_end is not None and found["rows"]["measured"] == 12 and found["rows"]["answered"] == 4
    assert found["metrics"][0]["tuned"] == pytest.approx(at_the_end["metrics"][0]["tuned"], rel=1e-4)
    assert main(["compare", run_folder, "--fail-if-worse", "--metrics", "perplexity", *short]) == 6
    said = capsys.readouterr()
    assert "Held-out loss" in said.out and "error[TRAIN-003] the tuned model is worse than its base" in said.err


def test_compare_without_anything_said_is_what_the_run_did_at_its_end(
    spoiled: tuple[Result, list[Event]], tmp_path: Path
) -> None:
    run_folder, out, at_the_end = spoiled[0].folder.path, tmp_path / "new" / "out", spoiled[0].comparison
    assert main(["compare", str(run_folder), "--dtype", "float32", "--out", str(out)]) == 0
    assert at_the_end is not None and sorted(path.name for path in out.iterdir()) == [
        "comparison.md",
        "eval_results.csv",
        "eval_results.json",
    ]
    found = json.loads((out / "eval_results.json").read_text())["comparison"]
    assert found["decoding"] == at_the_end["decoding"] and found["rows"]["answered"] == at_the_end["rows"]["answered"]
    assert [one["tuned"]["text"] for one in found["examples"]] == [one["tuned"]["text"] for one in at_the_end["examples"]]
    table = {row["metric"]: row for row in csv.DictReader((out / "eval_results.csv").read_text().splitlines())}
    assert float(table["held_out_loss"]["tuned"]) == pytest.approx(found["metrics"][0]["tuned"])
    assert found["sentence"] in (out / "comparison.md").read_text()
    assert main(["compare", str(run_folder), "--out", str(run_folder)]) == 2


def test_two_models_are_compared_one_after_the_other(learned: tuple[Result, list[Event]]) -> None:
    final = str(learned[0].folder.final)
    data = rows(FRUITS, ASKING[4:])
    found = compare_models("demo", final, data, how=SHORT, dtype="float32", metrics=["chrf"])
    assert found["outcome"] == "better" and (found["base"], found["tuned"]) == ("demo", final)
    turned = compare_models(final, "demo", data, how=SHORT, dtype="float32", metrics=["chrf"])
    assert turned["outcome"] == "worse"
    assert turned["metrics"][0]["difference"] == pytest.approx(-found["metrics"][0]["difference"])
    with pytest.raises(UsageError, match="whole model, which does not know its base"):
        compare_models(final, data=data)


def test_a_base_that_is_the_adapters_own_is_not_loaded_again(
    spoiled: tuple[Result, list[Event]], learned: tuple[Result, list[Event]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from llm_finetune_kit import opening

    loads = []
    load = opening.load_base
    monkeypatch.setattr(opening, "load_base", lambda *words, **how: loads.append(1) or load(*words, **how))
    data = rows(FRUITS, ASKING[4:])
    found = compare_models(str(learned[0].folder.final), str(spoiled[0].folder.path), data, how=SHORT, dtype="float32")
    assert loads == [1] and found["outcome"] == "worse"


def test_models_with_different_tokenizers_are_compared_per_byte(stories: Path) -> None:
    data = rows(FRUITS, ASKING[:1])
    found = compare_models("demo", str(stories), data, how=SHORT, metrics=[])
    assert found["primary"] == "bits_per_byte" and "bits per byte" in found["sentence"]
    by_name = {row["name"]: row for row in found["metrics"]}
    assert by_name["loss"]["difference"] is None and by_name["bits_per_byte"]["difference"] is not None


def test_prompts_alone_give_answers_side_by_side_and_no_verdict(spoiled: tuple[Result, list[Event]]) -> None:
    found = compare_models(str(spoiled[0].folder.path), prompts=["What food is red?", "Hi"], how=SHORT)
    assert found["outcome"] == "open" and [one["prompt"] for one in found["examples"]] == ["What food is red?", "Hi"]
    assert found["examples"][0]["change"] is None and found["wins"] == {"won": 0, "lost": 0, "tied": 0}


def test_what_cannot_be_compared_is_told(spoiled: tuple[Result, list[Event]], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare"]) == 2 and main(["compare", "a", "b", "c"]) == 2
    assert main(["compare", "demo"]) == 2
    assert "no run, so it has no held-out rows" in capsys.readouterr().err
    adapter = opened(spoiled[0].model, spoiled[0].chat.tokenizer)
    with pytest.raises(UsageError, match="without its tokenizer"):
        compare_models(adapter.model, data=rows(FRUITS, ASKING[:1]))


def test_the_flags_of_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for words, compares in (([], True), (["--compare"], True), (["--no-compare"], False), (["evaluation.compare=false"], False)):
        assert asked_config(_parser("train").parse_all(words)).evaluation.compare is compares
    monkeypatch.chdir(tmp_path)
    ruinous = ["training.learning_rate=0.5", "training.max_steps=4", "evaluation.generation.max_new_tokens=4"]
    assert main(["train", "--model", "demo", "--data", "sample:chat", "--fail-if-worse", *ruinous]) == 6
    said = capsys.readouterr()
    assert "Worse: held-out loss rose" in said.out and "error[TRAIN-003]" in said.err


def test_a_comparison_that_fails_does_not_cost_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llm_finetune_kit.evaluation import end_of_run

    def no_memory(*words: Any, **how: Any) -> Any:
        raise torch.OutOfMemoryError("no memory for the answers")

    monkeypatch.setattr(end_of_run, "side", no_memory)
    quick = {"training__max_steps": 1, "training__eval_steps": 1, "training__save_steps": 1}
    result, told = train(tmp_path, "demo", FRUITS, **quick)
    assert result.folder.finished and result.comparison is None
    assert any(isinstance(event, Warned) and "no memory for the answers" in event.message for event in told)
    assert "OutOfMemoryError" in (result.folder.path / "debug.log").read_text()


def test_answers_that_are_mostly_cut_are_told_where_the_references_are_longer() -> None:
    from llm_finetune_kit.evaluation.asking import Prompt
    from llm_finetune_kit.evaluation.end_of_run import cut_short
    from llm_finetune_kit.generation import Answer
    from llm_finetune_kit.models.locate import demo_folder
    from llm_finetune_kit.models.tokenizer import load_tokenizer

    chat = load_tokenizer(demo_folder())
    long, short = (Prompt(0, [1], "q", text) for text in ("a long answer goes on " * 20, "short"))
    cut, whole = Answer("x", 64, False), Answer("x", 3, True)
    told = cut_short([cut, cut, whole], [long, long, short], chat, 64)
    assert told is not None and "2 of 3 answers were cut at 64 tokens, and 2 references are longer" in told.message
    asked_for = int(told.fix.split("max_new_tokens=")[1].split(",")[0])
    assert asked_for % 64 == 0 and asked_for > len(chat.tokenizer(long.reference).input_ids)
    assert cut_short([cut, whole, whole], [long, long, short], chat, 64) is None
    assert cut_short([cut, cut, cut], [short, short, short], chat, 64) is None
