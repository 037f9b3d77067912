"""The report says what the events say, whatever they are, and lets no text out of its place."""

from __future__ import annotations

import csv
import html
import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from llm_finetune_kit.config import RunConfig
from llm_finetune_kit.events import (
    Evaluated,
    Event,
    Failed,
    Finished,
    Planned,
    Resumed,
    Sampled,
    Saved,
    Stage,
    Stepped,
    Warned,
    from_record,
    to_record,
)
from llm_finetune_kit.files import write_json, write_whole
from llm_finetune_kit.folder import RunFolder
from llm_finetune_kit.report import words
from llm_finetune_kit.report.card import model_card
from llm_finetune_kit.report.curve import ticks
from llm_finetune_kit.report.figures import before_and_after, caution, figures, kept_step, smoothed, verdict
from llm_finetune_kit.report.live import LiveReport
from llm_finetune_kit.report.write import write_report

SCRIPT = '<script>alert("x")</script><img src=https://evil.example/x.png onerror=alert(1)>'
ANSWER = "=SUM(A1) | `code` **bold**\nsecond line \x1b[31mred \u202eevil"
OUTPUTS = (
    "eval_results.json",
    "eval_results.csv",
    "comparison.md",
    "loss_curve.png",
    "run.log",
    "report.html",
)


def stepped(step: int, loss: float, total: int = 40) -> Stepped:
    return Stepped(step, total, step / 20, loss, 2e-4, 0.7, 900, 300, 0.5)


def evaluated(step: int, loss: float, *, best: bool = False, targets: int = 5000) -> Evaluated:
    return Evaluated(step, loss, math.exp(loss), 32, targets, 0.2, best)


def whole_run(best: int = 30, *, before: float = 3.21, after: float = 2.05) -> list[Event]:
    """A run of 40 steps whose held-out loss is lowest at step `best` and rises again."""
    said: list[Event] = [Stage("data", "train.jsonl"), Planned(plan()), Warned("two rows are equal <b>", "remove one")]
    said += [evaluated(0, before), Sampled(0, SCRIPT, "a a a", "Paris"), Sampled(0, "Capital?", ANSWER, "")]
    for step in range(1, 41):
        said.append(stepped(step, 2 + 1.2 * math.exp(-step / 8) + 0.1 * math.sin(step * 7)))
        if step % 10 == 0:
            said.append(evaluated(step, after + abs(step - best) / 50, best=step <= best))
            said.append(Saved(step, f"checkpoint-{step}", 1_000_000, 0.1))
    said += [Sampled(best, SCRIPT, SCRIPT, "Paris"), Sampled(best, "Capital?", "Paris.\x00", "")]
    return [*said, Saved(best, "final", 2_000_000, 0.2), Finished(40, "all steps done", {"final_step": best})]


def plan() -> dict[str, Any]:
    return {
        "choices": [
            {"knob": "lora.r", "value": 8, "reason": "you asked for it"},
            {"knob": "model.dtype", "value": "bfloat16", "reason": "the CPU computes it <natively>"},
            {"knob": "lora.target_modules", "value": ["q_proj", "v_proj"], "reason": "all linear layers"},
        ],
        "device": "cpu",
        "steps": 40,
        "examples_per_step": 16,
        "trained_parameters": 123456,
        "memory": {
            "weights": 500_000_000,
            "optimizer": 10_000_000,
            "libraries": 650_000_000,
            "activations": 900_000_000,
        },
        "peak_memory": 2_060_000_000,
        "available_memory": 8_000_000_000,
    }


def config(**sections: Any) -> RunConfig:
    tree = {
        "model": {"name": "TinyLlama/TinyLlama-1.1B-Chat-v1.0"},
        "lora": {"r": 8, "alpha": 16, "target_modules": ["q_proj"]},
        "data": {"train_file": "/home/someone/private/train.jsonl"},
        "output": {"run_name": "tiny-run"},
    }
    return RunConfig.model_validate(tree | sections)


def make(tmp_path: Path, events: list[Event], *, papers: bool = True) -> Path:
    """A run folder that holds these events and, with `papers`, the files that a run writes at its start."""
    folder = RunFolder.create(tmp_path / "outputs", "tiny-run")
    with folder.locked():
        for event in events:
            folder.record(event)
    if papers:
        dropped = [{"place": f"line {line}", "reason": "empty answer <i>"} for line in (7, 9, 11, 13)]
        part = {
            "name": "/home/someone/private/train.jsonl",
            "format": "alpaca",
            "why_format": "found instruction and output",
        }
        masks = {
            "examples": 96,
            "tokens": 9000,
            "target_tokens": 3000,
            "held_out_from": "32 of 132 rows",
            "longest": 211,
        }
        write_whole(folder.path / "config.yaml", yaml.safe_dump(config().asked()))
        write_json(folder.path / "plan.json", plan())
        write_json(
            folder.path / "resolved.json",
            {"config": config().model_dump(), "base_model": "demo", "versions": {"torch": "2.13.0"}},
        )
        write_json(
            folder.path / "data_report.json",
            {"train": part | {"rows": 132, "examples": 128, "dropped": dropped}, "masks": masks},
        )
    return folder.path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make(tmp_path_factory.mktemp("report"), whole_run())
    write_report(folder)
    return folder


def read(folder: Path, name: str) -> str:
    return (folder / name).read_text(encoding="utf-8")


def test_before_is_step_zero_and_after_is_the_kept_step_not_the_last():
    found = before_and_after(whole_run(best=30), 30)
    assert found["loss_before"] == 3.21
    assert found["loss_after"] == 2.05
    assert found["improvement"] == pytest.approx(1.16)
    assert found["perplexity_after"] == pytest.approx(math.exp(2.05))


def test_without_held_out_rows_nothing_is_claimed():
    assert before_and_after([stepped(1, 2.0)], 1) == {}
    events = [stepped(40, 2.0), Saved(40, "final", 1, 0.1), Finished(40, "all steps done")]
    assert verdict(figures(events)).tone == "open"


@pytest.mark.parametrize(("after", "tone"), [(2.05, "good"), (3.205, "flat"), (3.9, "bad")])
def test_the_verdict_says_what_happened(after: float, tone: str):
    assert verdict(figures(whole_run(after=after))).tone == tone


def test_few_held_out_tokens_are_a_hint_and_not_a_proof():
    assert "hint" in caution(figures([evaluated(0, 3.0, targets=90)]))
    assert caution(figures([evaluated(0, 3.0, targets=9000)])) == ""


def test_a_killed_run_shows_its_best_step_so_far():
    events = [
        event for event in whole_run() if not isinstance(event, (Finished, Sampled)) and getattr(event, "folder", "") != "final"
    ]
    found = figures(events)
    assert (found.kept, found.shown, found.ended) == (None, 30, None)
    assert verdict(found).headline == "Not finished: step 40 of 40"


def test_a_resume_makes_an_earlier_failure_void():
    events = [stepped(1, 3.0), Failed("TRAINING-001", "the loss is nan"), Resumed(1, "checkpoint-1"), stepped(2, 2.9)]
    assert figures(events).ended is None
    assert kept_step(events) is None


def test_smoothing_begins_at_the_first_value_and_stays_within_the_losses():
    found = figures(whole_run())
    losses = [point.loss for point in found.train]
    assert found.smooth[0].loss == pytest.approx(losses[0])
    assert all(min(losses) <= point.loss <= max(losses) for point in found.smooth)
    assert smoothed([]) == []


def test_every_output_is_written_and_small(finished: Path):
    for name in OUTPUTS:
        assert (finished / name).stat().st_size > 0
    assert (finished / "report.html").stat().st_size < 1_000_000
    assert (finished / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    assert not list(finished.glob(".*.part"))


def test_the_page_marks_the_kept_step_and_says_the_verdict(finished: Path):
    page = read(finished, "report.html")
    assert "Held-out loss fell from 3.21 to 2.05: the model predicts unseen answers better." in page
    assert page.count('"mark"') == page.count("kept: step 30</text>") == 2  # a wide and a narrow picture


def test_no_text_of_others_becomes_markup(finished: Path):
    page = read(finished, "report.html")
    assert "<script" not in page
    assert html.escape(SCRIPT, quote=False).split("(")[0] in page
    for text in ("are equal <b>", "answer <i>", "<natively>", "<img"):
        assert text not in page
    assert "\x1b" not in page + read(finished, "run.log")
    assert "\u202e" not in page + read(finished, "comparison.md")


def test_the_page_asks_nothing_of_any_network(finished: Path):
    page = read(finished, "report.html")
    tags = re.findall(r"<[^>]*>", page)
    assert not [tag for tag in tags if re.search(r"https?:|\bsrc=|\bhref=(?!.#)|url\(|\bon\w+=", tag)]
    assert "url(" not in page
    assert "@import" not in page


def test_the_page_explains_what_was_asked_decided_dropped_and_needed(finished: Path):
    page = read(finished, "report.html")
    for text in (
        "lora.r",
        "Rank of the update",
        "the CPU computes it &lt;natively&gt;",
        "4 × empty answer",
        "2.1 GB",
        "33 %",
        "line 7",
    ):
        assert text in page
    assert "finetune resume outputs/tiny-run --max-steps 80" in page


def test_no_absolute_path_is_written_into_the_evidence(finished: Path):
    for name in OUTPUTS:
        assert b"/home/someone" not in (finished / name).read_bytes()
        assert str(finished.parent).encode() not in (finished / name).read_bytes()


def test_results_are_strict_json_and_agree_with_the_table(finished: Path):
    tree = json.loads(read(finished, "eval_results.json"), parse_constant=pytest.fail)
    rows = {row["metric"]: row for row in csv.DictReader(read(finished, "eval_results.csv").splitlines())}
    assert list(next(iter(rows.values()))) == ["metric", "base", "tuned", "difference", "low", "high", "outcome"]
    assert float(rows["held_out_loss"]["tuned"]) == tree["before_and_after"]["loss_after"] == 2.05
    assert rows["step"]["tuned"] == "30"
    assert [event["step"] for event in tree["evaluations"]] == [0, 10, 20, 30, 40]
    assert tree["samples"][0]["prompt"] == SCRIPT


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r"])
def test_no_text_cell_is_a_formula(start: str):
    table = words.csv_table([["metric", "base"], [f"{start}cmd()", -1.5]])
    name, number = list(csv.reader(io.StringIO(table, newline="")))[1]
    assert name.startswith("'")
    assert float(number) == -1.5


def test_the_comparison_keeps_a_row_on_one_line(finished: Path):
    text = read(finished, "comparison.md")
    assert "<script" not in text
    assert "=SUM(A1) \\| \\`code\\` \\*\\*bold\\*\\*<br>second line" in text
    assert "| Held-out loss | 3.210 | 2.050 |" in text


def test_the_log_has_a_line_for_each_event(finished: Path):
    lines = read(finished, "run.log").splitlines()
    assert len(lines) == len(whole_run())
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  \S", line) for line in lines)
    assert "finished after step 40: all steps done" in lines[-1]


@pytest.mark.parametrize("papers", [True, False])
@pytest.mark.parametrize(
    "events",
    [
        [],
        [Stage("data", "x"), Failed("DATA-001", "is <empty>")],
        [stepped(1, 3.0)],
        [evaluated(0, 3.0)],
        [stepped(1, math.inf), evaluated(0, math.inf), evaluated(1, 3.0), Sampled(0, "q", "", "")],
    ],
    ids=["nothing", "failed early", "one step", "only the base", "infinite"],
)
def test_a_run_that_came_nowhere_has_a_report(tmp_path: Path, events: list[Event], papers: bool):
    folder = make(tmp_path, events, papers=papers)
    write_report(folder)
    assert "Not finished" in read(folder, "report.html")
    json.loads(read(folder, "eval_results.json"), parse_constant=pytest.fail)


def test_answers_during_training_and_memory_are_shown_over_the_steps(finished: Path, tmp_path: Path):
    before = read(finished, "report.html")  # of a run that recorded neither
    assert "during training" not in before and "Memory (GB)" not in before and 'class="planned"' not in before
    events = whole_run()
    for step in (20, 10):
        place = next(place for place, event in enumerate(events) if isinstance(event, Evaluated) and event.step == step)
        events[place + 1 : place + 1] = [Sampled(step, "Capital?", f"Rome <{step}>", ""), Sampled(step, SCRIPT, "", "Paris")]
    held = [replace(event, memory=10**9 + event.step) if isinstance(event, Stepped) else event for event in events]
    folder = make(tmp_path, held)
    write_report(folder)
    by_prompt = {pair.prompt: pair.between for pair in figures(held).pairs}
    assert by_prompt["Capital?"] == ((10, "Rome <10>"), (20, "Rome <20>")) and by_prompt[SCRIPT] == ((10, ""), (20, ""))
    html = read(folder, "report.html")
    assert html.count("Its answers during training: 2") == 2 and "Rome &lt;20&gt;" in html
    assert "Memory (GB) from step 1 to 40: 1 at first, 1 at last, 2.06 planned" in html and 'class="planned"' in html
    assert json.loads(read(folder, "eval_results.json"))["samples"][0]["between"][0][0] == 10


def test_old_events_without_memory_can_be_read():
    record = to_record(stepped(3, 2.0), 0.0)
    del record["memory"]
    assert from_record(record) == stepped(3, 2.0)


def test_a_long_run_stays_small(tmp_path: Path):
    folder = make(tmp_path, [stepped(step, 3 + math.sin(step), 20_000) for step in range(1, 20_001)])
    write_report(folder)
    assert (folder / "report.html").stat().st_size < 200_000


@pytest.mark.parametrize(("method", "library"), [("lora", "peft"), ("full", "transformers")])
def test_the_card_begins_with_front_matter_that_other_tools_read(method: str, library: str):
    base = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
    card = model_card(config(method=method), base, whole_run(), 30)
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["base_model"] == base
    assert front["library_name"] == library
    assert front["pipeline_tag"] == "text-generation"
    assert f"base_model:{'adapter' if method == 'lora' else 'finetune'}:{base}" in front["tags"]
    assert "datasets" not in front
    assert "| Loss (nats per token) | 3.210 | 2.050 |" in card
    assert "licence Apache-2.0" in card
    assert "/home/someone" not in card
    assert "<script" not in card


def test_the_card_of_a_local_base_names_no_hub_model_and_no_path():
    card = model_card(config(model={"name": "/home/someone/models/own"}), "/home/someone/models/own", whole_run(), 30)
    assert "base_model" not in yaml.safe_load(card.split("---\n")[1])
    assert "/home/someone" not in card
    assert 'from_pretrained("path/to/own")' in card


def test_the_card_without_held_out_rows_says_so():
    card = model_card(config(data={"train_file": "owner/rows"}), "demo", [stepped(40, 2.0)], 40)
    assert yaml.safe_load(card.split("---\n")[1])["datasets"] == ["owner/rows"]
    assert "No rows were held out" in card


def test_the_page_is_written_as_the_run_goes_and_takes_a_hundredth_of_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, now = make(tmp_path, whole_run()), [0.0]
    written: list[float] = []
    heard: list[Event] = []

    def write(path: Path) -> None:
        written.append(now[0])
        now[0] += 0.5  # seconds that a page takes

    monkeypatch.setattr("llm_finetune_kit.report.live.write_page", write)
    monkeypatch.setattr("llm_finetune_kit.report.live.time.monotonic", lambda: now[0])
    live = LiveReport(folder, heard.append)
    live(Stage("model", "demo"))
    for step in range(1000):
        now[0] += 1.0
        live(stepped(step, 2.0))
        live(evaluated(step, 2.0))
    assert written[0] == 0.0
    assert 15 <= len(written) <= 21
    assert len(heard) == 2001
    assert 0.5 * len(written) <= 0.011 * now[0]


def test_a_page_that_cannot_be_written_costs_no_event(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    heard: list[Event] = []
    live = LiveReport(tmp_path / "gone", heard.append)
    live(Stage("model", "demo"))
    assert heard == [Stage("model", "demo")]


def test_ticks_are_round_and_inside():
    assert ticks(1.93, 3.31, 5) == [2.0, 2.5, 3.0]
    assert ticks(0, 40, 4) == [0, 10, 20, 30, 40]
