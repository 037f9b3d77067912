"""Faults of the data path as a whole: too few rows, files that change, things that are no files, a cache under fire."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_finetune_kit.config import DataSection, RunConfig
from llm_finetune_kit.data import cache, prepare
from llm_finetune_kit.data.masks import Tokens
from llm_finetune_kit.errors import DataError, KitError
from llm_finetune_kit.settings import changed

GOOD = '{"text": "one"}\n{"text": "two"}\n'

# --- 28: too few rows --------------------------------------------------------------------------------------


def steps(tmp_path: Path, count: int, **more: Any) -> Any:
    """Two steps of the embedded model on `count` rows."""
    from llm_finetune_kit.run import run

    asked = {
        "model.name": "demo",
        "data.train_file": [{"prompt": f"Say {n}.", "response": f"It is {n}."} for n in range(count)],
        "training.max_steps": 2,
        "training.batch_size": 8,
        "training.gradient_accumulation_steps": 2,
        "output.output_dir": str(tmp_path),
    }
    return run(changed(RunConfig(), asked | more))


@pytest.mark.parametrize("count", [1, 3])
def test_fault_028_fewer_rows_than_a_batch_train(tmp_path: Path, count: int) -> None:
    result = steps(tmp_path, count)
    losses = [event["loss"] for event in _events(result.folder.path) if "loss" in event]
    assert losses and all(0 < loss < 20 for loss in losses)


def _events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()]


def test_fault_028_a_held_out_share_that_comes_to_no_row_is_no_evaluation(tmp_path: Path) -> None:
    result = steps(tmp_path, 5, **{"data.validation_split": 0.01})
    report = json.loads((result.folder.path / "data_report.json").read_text(encoding="utf-8"))
    assert "none" in json.dumps(report["masks"])


@pytest.mark.parametrize(("content", "number"), [("", 27), ('{"prompt": "a", "response": ""}\n', 10)])
def test_fault_028_an_eval_file_without_a_usable_row_is_named(tmp_path: Path, content: str, number: int) -> None:
    (tmp_path / "eval.jsonl").write_text(content)
    with pytest.raises(DataError) as caught:
        steps(tmp_path / "outputs", 3, **{"data.eval_file": str(tmp_path / "eval.jsonl")})
    assert caught.value.number == number and "eval.jsonl" in str(caught.value)
    assert not (tmp_path / "outputs").exists()


# --- 3 and 29: the same tokens, or others under another name -------------------------------------------------


@pytest.fixture(scope="module")
def chat() -> Any:
    from llm_finetune_kit.models.locate import demo_folder
    from llm_finetune_kit.models.tokenizer import load_tokenizer

    return load_tokenizer(demo_folder())


def row(answer: str) -> bytes:
    return json.dumps({"prompt": "What is it?", "response": answer}).encode()


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".txt"])
def test_fault_003_a_byte_order_mark_gives_the_same_tokens(tmp_path: Path, chat: Any, suffix: str) -> None:
    content = {".jsonl": row("A river."), ".json": b"[" + row("A river.") + b"]", ".csv": b"prompt,response\nWhat?,A river.\n"}
    found = []
    for name, mark in (("plain", b""), ("marked", b"\xef\xbb\xbf")):
        path = tmp_path / (name + suffix)
        path.write_bytes(mark + content.get(suffix, b"A river."))
        found.append(prepare.tokenize(prepare.read(str(path), DataSection()), DataSection(), chat, "demo").tokens)
    assert found[0].ids.tolist() == found[1].ids.tolist()
    assert found[0].trained.tolist() == found[1].trained.tolist()


@pytest.mark.parametrize("known", ["unknown file", "known file", "known under another tokenizer"])
def test_fault_029_tokens_and_fingerprint_belong_together_when_a_file_changes_midway(
    tmp_path: Path, chat: Any, known: str
) -> None:
    path, settings = tmp_path / "train.jsonl", DataSection()
    old, new = row(f"It is old, {known}."), row(f"It is new, {known}.")
    path.write_bytes(old)
    if known != "unknown file":
        under = "demo" if known == "known file" else "another"
        prepare.tokenize(prepare.read(str(path), settings), settings, chat, under)
    data = prepare.read(str(path), settings)
    path.write_bytes(new)
    made = prepare.tokenize(data, settings, chat, "demo")
    learned = chat.decode(made.tokens.ids[made.tokens.trained].tolist())
    assert made.fingerprint == hashlib.sha256(old if "old" in learned else new).hexdigest()
    again = prepare.tokenize(prepare.read(str(path), settings), settings, chat, "demo")
    assert "new" in chat.decode(again.tokens.ids.tolist()) and again.fingerprint == hashlib.sha256(new).hexdigest()


# --- 30: what is no file -----------------------------------------------------------------------------------


@pytest.fixture
def _no_hang() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(300)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(str(path))


def loop(path: Path) -> None:
    path.symlink_to(path)


def link_to_fifo(path: Path) -> None:
    os.mkfifo(path.with_name("pipe"))
    path.symlink_to("pipe")


def link_to_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


ODD_FILES = [fifo, unix_socket, loop, link_to_fifo, link_to_device]


@pytest.mark.usefixtures("_no_hang")
@pytest.mark.parametrize("make", ODD_FILES)
@pytest.mark.parametrize("name", ["train.jsonl", "train.parquet", "train.txt.gz"])
def test_fault_030_what_is_no_file_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], None], name: str
) -> None:
    monkeypatch.chdir(tmp_path)  # the names of sockets are short
    make(Path(name))
    with pytest.raises(DataError) as caught:
        prepare.read(str(tmp_path / name), DataSection())
    assert name in str(caught.value) and caught.value.fix


@pytest.mark.usefixtures("_no_hang")
@pytest.mark.parametrize("make", ODD_FILES)
def test_fault_030_a_folder_that_holds_one_of_them_hangs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], None]
) -> None:
    monkeypatch.chdir(tmp_path)
    make(Path("train.jsonl"))
    with pytest.raises(KitError) as caught:
        prepare.read(str(tmp_path), DataSection())
    assert tmp_path.name in str(caught.value)


@pytest.mark.usefixtures("_no_hang")
def test_fault_030_a_pipe_for_evaluation_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "eval.jsonl")
    with pytest.raises(DataError, match="pipe"):
        steps(tmp_path / "outputs", 3, **{"data.eval_file": str(tmp_path / "eval.jsonl")})
    assert not (tmp_path / "outputs").exists()


# --- 31: the token cache -----------------------------------------------------------------------------------


def tokens(examples: int) -> tuple[Tokens, np.ndarray]:
    """Made-up tokens of which every number depends on its place, so that a part of them is never taken for the whole."""
    starts = np.arange(examples + 1, dtype=np.int64) * 50
    ids = np.arange(starts[-1], dtype=np.int32)
    sketches = np.arange(examples * 64, dtype=np.uint32).reshape(examples, 64)
    return Tokens(ids, ids % 3 == 0, starts, np.arange(examples, dtype=np.int32)), sketches


def is_whole(found: Any, examples: int) -> bool:
    made, sketches = tokens(examples)
    same = [np.array_equal(getattr(found[0], name), getattr(made, name)) for name in ("ids", "trained", "starts", "rows")]
    return all(same) and np.array_equal(found[1], sketches) and found[2] == {"examples": examples}


def child(work: Callable[[], None]) -> int:
    """The process id of a copy of this process that does only this."""
    process = os.fork()
    if process == 0:
        try:
            work()
        finally:
            os._exit(0)
    return process


def store(path: Path, examples: int) -> None:
    cache.store(path, *tokens(examples), {"examples": examples})


@pytest.mark.usefixtures("_no_hang")
def test_fault_031_killed_at_any_moment_an_entry_is_whole_or_not_there(tmp_path: Path) -> None:
    seed, made = 31, tokens(100_000)  # 51 MB
    chance = random.Random(seed)
    seen: Counter[str] = Counter()
    path = tmp_path / "cache" / "a.safetensors"

    def begun() -> int:
        shutil.rmtree(path.parent, ignore_errors=True)
        process = child(lambda: cache.store(path, *made, {"examples": 100_000}))
        while not path.parent.exists() or not any(path.parent.iterdir()):
            time.sleep(0.0005)
        return process

    process, began = begun(), time.monotonic()
    os.waitpid(process, 0)
    usual = time.monotonic() - began  # that writing takes, now and here
    for number in range(300):
        if number >= 30 and seen["part"] > 2:
            break
        process = begun()
        time.sleep(chance.uniform(0.0, usual))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        found = cache.load(path)
        assert found is None or is_whole(found, 100_000), f"kill {number} of seed {seed}"
        seen["part" if any(path.parent.glob(".*")) else "whole"] += 1
    assert seen["part"] > 2, f"too few kills came while writing to prove anything: {seen}"
    store(path, 100)
    assert is_whole(cache.load(path), 100), "the next run builds it anew"


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_fault_031_a_part_of_an_entry_is_not_taken_for_one(tmp_path: Path, share: float) -> None:
    path = tmp_path / "a.safetensors"
    store(path, 100)
    whole = path.read_bytes()
    assert is_whole(cache.load(path), 100)
    path.write_bytes(whole[: int(len(whole) * share)])
    assert cache.load(path) is None
    path.write_bytes(whole + b"x")
    assert cache.load(path) is None


def test_fault_031_and_096_several_at_once_always_leave_and_find_whole_entries(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"

    def build() -> None:
        for _ in range(20):
            store(path, 3_000)

    writers = [child(build) for _ in range(3)]
    found = 0
    while writers:
        again = cache.load(path)
        assert again is None or is_whole(again, 3_000)
        found += again is not None
        writers = [process for process in writers if os.waitpid(process, os.WNOHANG)[0] == 0]
    assert found and is_whole(cache.load(path), 3_000)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"], "no drafts are left"


def test_fault_031_a_full_disk_costs_the_entry_not_the_run(tmp_path: Path) -> None:
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
        try:
            store(tmp_path / "a.safetensors", 3_000)
            cache.store_json(tmp_path / "a.json", {"text": "x" * 100_000})
        except BaseException:
            os._exit(1)
        os._exit(0)

    _, status = os.waitpid(child(limited), 0)
    assert os.waitstatus_to_exitcode(status) == 0, "an error escaped"
    assert not list(tmp_path.iterdir()), "the broken drafts are removed"


BUILD = """
import os, signal, sys
from pathlib import Path
from llm_finetune_kit.config import DataSection
from llm_finetune_kit.data import prepare
from llm_finetune_kit.models.locate import demo_folder
from llm_finetune_kit.models.tokenizer import load_tokenizer

if sys.argv[2] == "die":
    os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
settings = DataSection()
chat = load_tokenizer(demo_folder())
made = prepare.tokenize(prepare.read(sys.argv[1], settings), settings, chat, "demo")
print(len(made.tokens), int(made.tokens.ids.sum()), int(made.tokens.trained.sum()))
"""


def test_fault_031_runs_after_a_killed_one_and_beside_each_other_have_the_same_tokens(tmp_path: Path) -> None:
    data = tmp_path / "train.jsonl"
    rows = [{"prompt": f"What is {n} + 1?", "response": f"It is {n + 1}."} for n in range(200)]
    data.write_text("\n".join(map(json.dumps, rows)))
    words = [sys.executable, "-c", BUILD, str(data)]
    assert subprocess.run([*words, "die"], timeout=240).returncode == -signal.SIGKILL
    runs = [subprocess.Popen([*words, "live"], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    one, other = [run.communicate(timeout=240)[0] for run in runs]
    assert one == other and one.startswith("200 ")
    entries = [path for path in (cache.cache_home() / "tokens").iterdir() if cache.file_fingerprint(data)[:32] in path.name]
    kept = [path for path in entries if path.suffix == ".safetensors"]
    assert len(kept) == 1
    found = cache.load(kept[0])
    assert found is not None
    assert one.split() == [str(len(found[0])), str(int(found[0].ids.sum())), str(int(found[0].trained.sum()))]
