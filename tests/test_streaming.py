"""Data larger than memory: every row once an epoch, the same rows for the same step, nothing held that is not needed."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest

from llm_finetune_kit.config import DataSection, RunConfig
from llm_finetune_kit.data import streaming
from llm_finetune_kit.data.sources import blocks
from llm_finetune_kit.data.streaming import Stream, survey
from llm_finetune_kit.errors import ConfigError, DataError, Interrupted
from llm_finetune_kit.events import Event, Stepped
from llm_finetune_kit.models.locate import demo_folder
from llm_finetune_kit.models.tokenizer import ChatTokenizer, load_tokenizer
from llm_finetune_kit.run import resume, run
from llm_finetune_kit.settings import changed

KINDS = ["rows.jsonl", "rows.jsonl.gz", "rows.parquet"]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ROWS", 37)
    monkeypatch.setattr(streaming, "HELD_OUT", 12)


@pytest.fixture(scope="module")
def chat() -> ChatTokenizer:
    return load_tokenizer(demo_folder())


def write(folder: Path, name: str, rows: list[dict[str, str]]) -> str:
    path = folder / name
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if name.endswith(".parquet"):
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=50)
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(lines)
    return str(path)


def rows(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"What is number {index}?", "response": f"It is {index * 7 + 3}."} for index in range(count)]


def stream(path: str, chat: ChatTokenizer, *, hold_out: bool = True, **settings: object) -> Stream:
    asked = DataSection.model_validate(settings)
    return Stream(path, survey(path, asked, 42, hold_out=hold_out), asked, chat)


@pytest.mark.parametrize("name", KINDS)
def test_every_row_comes_once_an_epoch_and_held_out_ones_never(tmp_path: Path, chat: ChatTokenizer, name: str) -> None:
    source = stream(write(tmp_path, name, rows(331)), chat)
    assert len(source) == 331 - 12
    held = set(source.sample().rows.tolist())
    assert len(held) == 12
    steps = -(-len(source) // 16)
    orders = []
    for epoch in range(2):
        taken = [source.take(16, 42, epoch * steps + step) for step in range(steps)]
        assert [len(part) for part in taken[:-1]] == [16] * (steps - 1)
        orders.append(np.concatenate([part.rows for part in taken]).tolist())
    assert set(orders[0]) == set(orders[1]) == set(range(331)) - held
    assert len(orders[0]) == len(set(orders[0])) and orders[0] != orders[1]


@pytest.mark.parametrize("name", KINDS)
def test_a_step_is_the_same_however_it_is_come_to(tmp_path: Path, chat: ChatTokenizer, name: str) -> None:
    path = write(tmp_path, name, rows(200))
    through = stream(path, chat)
    all_steps = [through.take(16, 42, step) for step in range(20)]
    for step in (17, 3, 11):
        jumped = stream(path, chat).take(16, 42, step)
        assert np.array_equal(jumped.ids, all_steps[step].ids) and np.array_equal(jumped.rows, all_steps[step].rows)


def test_the_next_block_is_read_while_steps_on_one_run_and_each_only_once(
    tmp_path: Path, chat: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    encoded = Stream._encoded
    monkeypatch.setattr(Stream, "_encoded", lambda self, index: read.append(index) or encoded(self, index))
    source = stream(write(tmp_path, "rows.jsonl", rows(331)), chat)
    source.take(8, 42, 0)
    source._reader.submit(lambda: None).result()  # all that was begun before it is done
    assert len(read) == 2
    for step in range(-(-len(source) // 8)):
        source.take(8, 42, step)
    assert len(read) == len(source.counts) == len(set(read))


def test_rows_are_named_by_their_line_in_the_file(tmp_path: Path, chat: ChatTokenizer) -> None:
    path = Path(write(tmp_path, "rows.jsonl", rows(100)))
    path.write_text("\n\n" + path.read_text())
    source = stream(str(path), chat, hold_out=False)
    assert source.place(0) == f"{path} line 3" and source.place(99) == f"{path} line 102"
    part = source.take(8, 42, 0)
    text = chat.decode(part.example(0)[0].tolist())
    assert f"number {part.rows[0]}?" in text


def test_a_faulty_row_is_named_before_training_starts_or_dropped(tmp_path: Path, chat: ChatTokenizer) -> None:
    lines = [json.dumps(row) for row in rows(120)]
    lines[99] = json.dumps({"prompt": "What?", "response": None})
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(DataError) as caught:
        stream(str(path), chat)
    assert "line 100" in caught.value.where
    source = stream(str(path), chat, on_bad_rows="drop", validation_split=0.0, hold_out=False)
    assert len(source) == 119
    seen = np.concatenate([source.take(7, 1, step).rows for step in range(17)])
    assert set(seen.tolist()) == set(range(120)) - {99}
    assert "1 rows are left out" in " ".join(streaming.report(str(path), source.survey)["warnings"])


def test_copies_of_held_out_rows_are_not_trained(tmp_path: Path, chat: ChatTokenizer) -> None:
    path = write(tmp_path, "rows.jsonl", rows(100) * 2)
    source = stream(path, chat)
    held = {row % 100 for row in source.sample().rows.tolist()}
    taken = np.concatenate([source.take(16, 42, step).rows for step in range(-(-len(source) // 16))])
    assert not held & {row % 100 for row in taken.tolist()}
    assert source.survey.repeated == 100


def test_max_samples_limits_an_epoch(tmp_path: Path, chat: ChatTokenizer) -> None:
    assert len(stream(write(tmp_path, "rows.jsonl", rows(300)), chat, max_samples=50)) == 50


def test_fault_029_a_file_that_changes_while_it_is_trained_on_is_noticed(tmp_path: Path, chat: ChatTokenizer) -> None:
    path = write(tmp_path, "rows.jsonl", rows(300))
    source = stream(path, chat)
    source.take(16, 42, 0)
    text = Path(path).read_text()
    Path(path).write_text(text.replace("It is 3.", "It is 4."))
    os.utime(path, (1, 1))
    with pytest.raises(DataError, match="has changed"):
        for step in range(1, 18):
            source.take(16, 42, step)


def test_what_cannot_be_streamed_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("prompt,response\na,b\n")
    with pytest.raises(DataError, match="cannot be streamed") as caught:
        survey(str(path), DataSection(), 42, hold_out=True)
    assert "finetune data convert" in caught.value.fix
    with pytest.raises(ConfigError, match="cannot be streamed"):
        run(RunConfig().with_values({"model.name": "demo", "data.train_file": "sample:chat", "data.streaming": True}))


def test_a_streamed_run_resumes_at_the_right_row(tmp_path: Path) -> None:
    asked = {
        "model.name": "demo",
        "data.train_file": write(tmp_path, "rows.jsonl", rows(400)),
        "data.streaming": True,
        "training.max_steps": 12,
        "training.batch_size": 4,
        "training.gradient_accumulation_steps": 1,
        "training.save_steps": 3,
        "training.eval_steps": 100,
        "evaluation.prompts": ["What is number 5?"],
        "evaluation.generation.max_new_tokens": 4,
    }
    told: dict[str, list[Event]] = {"whole": [], "halves": []}
    run(changed(RunConfig(), asked | {"output.output_dir": str(tmp_path / "whole")}), told["whole"].append)

    def stop_at_5(event: Event) -> None:
        told["halves"].append(event)
        if isinstance(event, Stepped) and event.step == 5:
            raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, Interrupted)):
        run(changed(RunConfig(), asked | {"output.output_dir": str(tmp_path / "halves")}), stop_at_5)
    from llm_finetune_kit.runs import find_run

    resume(find_run(None, tmp_path / "halves"), told["halves"].append)
    losses = {
        name: {event.step: event.loss.hex() for event in events if isinstance(event, Stepped)} for name, events in told.items()
    }
    assert losses["whole"] == losses["halves"] and len(losses["whole"]) == 12


def test_long_raw_texts_are_learned_in_windows(tmp_path: Path, chat: ChatTokenizer) -> None:
    from llm_finetune_kit.data import prepare
    from llm_finetune_kit.data.windows import windowed

    path = tmp_path / "story.txt"
    path.write_text("\n".join(f"Day {index}: we walked {index * 3} miles." for index in range(400)))
    settings = DataSection()
    whole = prepare.tokenize(prepare.read(str(path), settings), settings, chat, chat.fingerprint())
    cut = windowed(whole, 100, chat)
    assert len(whole.tokens) == 1 and len(cut.tokens) == -(-len(whole.tokens.ids) // 100)
    assert np.array_equal(cut.tokens.ids, whole.tokens.ids) and cut.tokens.lengths.max() <= 100
    assert len(cut.sketches) == len(cut.tokens) and set(cut.tokens.rows.tolist()) == {0}
    result = run(changed(RunConfig(), {
        "model.name": "demo", "data.train_file": str(path), "training.max_steps": 2, "output.output_dir": str(tmp_path / "out"),
        "evaluation.generation.max_new_tokens": 4,
    }))  # fmt: skip
    report = json.loads((result.folder.path / "data_report.json").read_text())
    assert report["masks"]["held_out_examples"] > 0 and "windows" in " ".join(report["train"]["notes"])
