"""`finetune serve`: a real model behind a real port. Numbers are those of FAULTS.md."""

from __future__ import annotations

import gc
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from asgi import ask, running
from faces import ROOT, finetune
from llm_finetune_kit.cli import main
from llm_finetune_kit.config import GenerationSection
from llm_finetune_kit.errors import BusyError, MachineError, ModelError
from llm_finetune_kit.files import commit
from llm_finetune_kit.folder import RunFolder
from llm_finetune_kit.generation import Answer, answers, stop_ids
from llm_finetune_kit.models.adapters import WEIGHTS, add_lora, save_adapter, without_adapter
from llm_finetune_kit.opening import Opened, open_model
from llm_finetune_kit.serving import listening, server
from llm_finetune_kit.serving.answering import Answered, Cut, Job, Line
from llm_finetune_kit.serving.api import ChatAPI
from llm_finetune_kit.serving.guard import Guard, Rules

QUESTION = [{"role": "user", "content": "How do I reset my password?"}]
GREEDY = {"model": "tuned", "messages": QUESTION, "max_tokens": 12, "temperature": 0}
MOST = 50


@dataclass(frozen=True)
class Served:
    """A server at work, the model in it, the line before it, and what it said."""

    port: int
    opened: Opened
    api: ChatAPI
    guard: Guard
    line: Watched
    heard: list[Answered]

    def post(self, body: Any) -> tuple[int, dict[str, str], Any]:
        """Status, headers and JSON of one chat request."""
        with self.connected() as line:
            line.request("POST", "/v1/chat/completions", body if isinstance(body, bytes) else json.dumps(body))
            found = line.getresponse()
            return found.status, {name.lower(): value for name, value in found.getheaders()}, json.loads(found.read())

    @contextmanager
    def connected(self) -> Iterator[http.client.HTTPConnection]:
        line = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            yield line
        finally:
            line.close()

    def stream(self, body: Any) -> list[Any]:
        """The events of a streamed answer, and the mark at its end."""
        with self.connected() as line:
            line.request("POST", "/v1/chat/completions", json.dumps({**body, "stream": True}))
            found = line.getresponse()
            assert found.getheader("content-type", "").startswith("text/event-stream")
            events = [part.removeprefix("data: ") for part in found.read().decode().split("\n\n") if part]
        assert events.pop() == "[DONE]"
        return [json.loads(event) for event in events]

    def quiet(self) -> None:
        """Wait until nothing is being answered any more."""
        within(60, lambda: self.line.idle)


def within(seconds: float, holds: Callable[[], bool]) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, f"not within {seconds} s"
        time.sleep(0.01)


class Watched(Line):
    """A line that writes down who comes, by the seed of the request."""

    joined: list[int]

    def join(self, job: Job) -> None:
        super().join(job)
        self.joined.append(job.seed)

    @property
    def idle(self) -> bool:
        with self._changed:
            return self._now is None and not self._waiting


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on the demo model that says other things than its base."""
    folder = tmp_path_factory.mktemp("adapter")
    base = open_model("demo", dtype="float32")
    model = add_lora(base.model, r=4, alpha=8, dropout=0.0, targets=["q_proj", "v_proj"], base_name="demo", seed=1)
    torch.manual_seed(0)
    for name, part in model.named_parameters():
        if "lora_B" in name:
            part.data.normal_(std=0.4)
    save_adapter(model, folder)
    base.chat.save(folder)
    return folder


@pytest.fixture(scope="module")
def served(adapter: Path) -> Iterator[Served]:
    opened = open_model(str(adapter), dtype="float32")
    heard: list[Answered] = []
    line = Watched(opened, heard.append, most=MOST)
    line.joined = []
    api = ChatAPI(opened, line)
    guard = Guard(api.app(), Rules())
    with running(lambda: server.Server(guard, line, lambda: None)) as port:
        yield Served(port, opened, api, guard, line, heard)


def expected(served: Served, model: str, tokens: int) -> Answer:
    """What the engine itself answers."""
    ids, how = served.opened.chat.prompt_ids(QUESTION), GenerationSection(max_new_tokens=tokens)
    if model == "tuned":
        return answers(served.opened.model, served.opened.chat, [ids], how)[0]
    with without_adapter(served.opened.model):
        return answers(served.opened.model, served.opened.chat, [ids], how)[0]


def test_base_and_tuned_answer_as_the_engine_does_whole_and_in_pieces(served: Served) -> None:
    said = {}
    for model in ("tuned", "base"):
        due = expected(served, model, 12)
        status, _, whole = served.post(GREEDY | {"model": model})
        [choice] = whole["choices"]
        assert (status, choice["message"]["content"]) == (200, due.text)
        assert choice["finish_reason"] == ("stop" if due.stopped else "length")
        prompt = len(served.opened.chat.prompt_ids(QUESTION))
        counts = {"prompt_tokens": prompt, "completion_tokens": due.tokens, "total_tokens": prompt + due.tokens}
        assert whole["usage"] == counts
        first, *events, last, usage = served.stream(GREEDY | {"model": model, "stream_options": {"include_usage": True}})
        assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert len(events) > 3
        assert "".join(event["choices"][0]["delta"]["content"] for event in events) == due.text
        assert last["choices"][0]["finish_reason"] == choice["finish_reason"]
        assert (usage["choices"], usage["usage"]) == ([], counts)
        said[model] = due.text
    assert said["base"] != said["tuned"]
    with served.connected() as line:
        line.request("GET", "/v1/models")
        assert [one["id"] for one in json.loads(line.getresponse().read())["data"]] == ["tuned", "base"]


def test_an_answer_ends_before_its_stop_text_whole_and_in_pieces(served: Served) -> None:
    due = expected(served, "base", 40).text
    words = due.split()
    stop = " ".join(words[2:4])  # of more than one token
    body = GREEDY | {"model": "base", "max_tokens": 40, "stop": ["never said", stop]}
    _, _, whole = served.post(body)
    assert whole["choices"][0]["message"]["content"] == due[: due.index(stop)].rstrip()
    assert whole["choices"][0]["finish_reason"] == "stop"
    assert whole["usage"]["completion_tokens"] < 40
    pieces = [event["choices"][0]["delta"].get("content", "") for event in served.stream(body)]
    assert "".join(pieces) == due[: due.index(stop)].rstrip()
    held = body | {"stop": due[-5:] + "and more"}  # the end of the answer may be the beginning of this
    assert served.post(held)[2]["choices"][0]["message"]["content"] == due


def test_text_is_cut_the_same_wherever_its_pieces_begin() -> None:
    text = "  The cat sat\n\non the mat END and slept \n"
    whole = text.strip()
    for stops, due in (([], whole), (["END"], "The cat sat\n\non the mat"), (["EN", "sat"], "The cat"), (["slept zzz"], whole)):
        for size in (1, 2, 3, 7, 50):
            cut = Cut(stops)
            said = [cut.add(text[start : start + size]) for start in range(0, len(text), size) if not cut.found]
            assert "".join(said) + cut.rest() == due
            assert cut.found == (due != whole)


def test_the_seed_says_which_answer_is_drawn(served: Served) -> None:
    drawn = GREEDY | {"temperature": 1.5, "seed": 7, "top_p": 0.9}
    said = [served.post(body)[2]["choices"][0]["message"]["content"] for body in (drawn, drawn, drawn | {"seed": 8})]
    assert said[0] == said[1] != said[2]


MESSAGE = {"role": "user", "content": "a"}
PICTURE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
WRONG: dict[str, tuple[Any, int, str]] = {
    "no JSON": (b"{", 400, "invalid_json"),
    "no text": (b"\xff\xfe", 400, "invalid_json"),
    "half a letter": (b'{"model": "tuned", "messages": [{"role": "user", "content": "\\ud800"}]}', 400, "invalid_json"),
    "not a number": (b'{"model": "tuned", "temperature": NaN}', 400, "invalid_json"),
    "a deep tree": (b"[" * 100_000, 400, "invalid_json"),
    "a list": ([], 400, "invalid_json"),
    "nothing": ({}, 400, "missing_required_parameter"),
    "no messages": ({"messages": []}, 400, "invalid_value"),
    "a million messages": (b'{"model":"tuned","messages":[' + b"0," * 999_999 + b"0]}", 400, "invalid_value"),
    "very many messages": ({"messages": [{"role": "user", "content": ""}] * 100_000}, 400, "invalid_value"),
    "100 MB": (b"x" * 100_000_000, 413, "request_too_large"),
    "another model": ({"model": "gpt-4"}, 404, "model_not_found"),
    "too many tokens": ({"max_tokens": 10**9}, 400, "invalid_value"),
    "very many tokens": ({"max_completion_tokens": 10**40}, 400, "invalid_value"),
    "no tokens": ({"max_tokens": 0}, 400, "invalid_value"),
    "true tokens": ({"max_tokens": True}, 400, "invalid_value"),
    "half tokens": ({"max_tokens": 1.5}, 400, "invalid_value"),
    "two limits": ({"max_tokens": 1, "max_completion_tokens": 2}, 400, "None"),
    "a long talk": ({"messages": [{"role": "user", "content": "word " * 2000}]}, 400, "context_length_exceeded"),
    "a very long talk": ({"messages": [{"role": "user", "content": "word " * 500_000}]}, 400, "context_length_exceeded"),
    "hot": ({"temperature": "hot"}, 400, "invalid_value"),
    "too hot": ({"temperature": 3}, 400, "invalid_value"),
    "no share": ({"top_p": 0}, 400, "invalid_value"),
    "a role": ({"messages": [{"role": "tool", "content": "a"}]}, 400, "invalid_value"),
    "a number said": ({"messages": [{"role": "user", "content": 5}]}, 400, "invalid_value"),
    "a picture": ({"messages": [PICTURE]}, 400, "invalid_value"),
    "an answer": ({"messages": [{"role": "assistant", "content": "a"}]}, 400, "None"),
    "a text": ({"messages": "hello"}, 400, "invalid_value"),
    "its own template": ({"chat_template": "{{ messages }}"}, 400, "unsupported_parameter"),
    "template words": ({"chat_template_kwargs": {"a": 1}}, 400, "unsupported_parameter"),
    "two answers": ({"n": 2}, 400, "unsupported_parameter"),
    "tools": ({"tools": [{"type": "function"}]}, 400, "unsupported_parameter"),
    "a penalty": ({"presence_penalty": 0.5}, 400, "unsupported_parameter"),
    "an empty stop": ({"stop": ""}, 400, "invalid_value"),
    "five stops": ({"stop": ["a"] * 5}, 400, "invalid_value"),
    "a long name": ({"x" * 5000: 1}, 400, "unsupported_parameter"),
}


@pytest.mark.parametrize("case", WRONG)
def test_fault_116_what_cannot_be_done_is_refused_in_openais_form(served: Served, case: str) -> None:
    body, status, code = WRONG[case]
    before = len(served.heard)
    if isinstance(body, dict) and body:
        body = {"model": "tuned", "messages": [MESSAGE], **body}
    began = time.process_time()  # of both sides
    found, headers, tree = served.post(body)
    assert (found, str(tree["error"]["code"])) == (status, code), tree
    assert set(tree["error"]) == {"message", "type", "param", "code"}
    assert len(tree["error"]["message"]) < 300
    assert headers["content-type"] == "application/json"
    assert time.process_time() - began < 3
    assert len(served.heard) == before


def test_fault_116_what_asks_for_nothing_may_stand_in_a_request(served: Served) -> None:
    idle = {"n": 1, "stop": None, "logprobs": False, "tools": [], "presence_penalty": 0.0, "user": "me", "metadata": {"a": "b"}}
    talk = [
        {"role": "developer", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}, {"type": "text", "text": "!"}]},
        {"role": "assistant", "content": "Yes?", "refusal": None, "tool_calls": None, "annotations": []},
        MESSAGE,
    ]
    plain = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": "Yes?"},
        MESSAGE,
    ]
    texts = [served.post(GREEDY | {"messages": one, **more})[2]["choices"] for one, more in ((talk, idle), (plain, {}))]
    assert texts[0] == texts[1]


def test_fault_117_whoever_leaves_stops_the_generation_and_memory_comes_back(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_finetune_kit.serving.answering.stop_ids", lambda *_: [])  # no answer is short by chance
    long = GREEDY | {"max_tokens": 450, "temperature": 1.5, "stream": True}

    def leave(number: int) -> None:
        """Once the answer has begun to come or, of the odd ones, which come whole, the request is in the line."""
        with served.connected() as line:
            line.request("POST", "/v1/chat/completions", json.dumps(long | {"stream": number % 2 == 0, "seed": number}))
            if number % 2:
                within(60, lambda: number in served.line.joined)
            else:
                line.getresponse().read(700)

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())

    leave(1000)
    leave(1001)
    served.quiet()
    before, known = tensors(), len(served.heard)
    with ThreadPoolExecutor(10) as crowd:
        list(crowd.map(leave, range(1002, 1012)))
    served.quiet()
    done = served.heard[known:]
    assert {one.reason for one in done} == {"left"}
    assert sum(one.tokens for one in done) < 450  # of 4,500 that were asked
    assert tensors() <= before
    assert served.post(GREEDY)[0] == 200


def test_fault_117_fifty_at_once_get_their_own_answers_and_those_beyond_the_line_are_told_when(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    bodies = [GREEDY | {"model": ("base", "tuned")[number % 2], "max_tokens": 1 + number % 3} for number in range(6)]
    due = [served.post(body)[2]["choices"] for body in bodies]
    whole, refused = threading.Event(), threading.Semaphore(0)

    def waiting(*given: Any) -> list[int]:
        assert whole.wait(60)
        return stop_ids(*given)

    def post(number: int) -> Any:
        found = served.post(bodies[number % 6])
        refused.release() if found[0] == 429 else None
        return found

    monkeypatch.setattr("llm_finetune_kit.serving.answering.stop_ids", waiting)  # the first answer begins when the line is full
    with ThreadPoolExecutor(MOST + 14) as crowd:
        asked = [crowd.submit(post, number) for number in range(MOST + 14)]
        for _ in range(13):  # one is at work and all others that were not refused wait
            assert refused.acquire(timeout=60)
        whole.set()
        found = [one.result() for one in asked]
    answered = [(number, tree["choices"]) for number, (status, _, tree) in enumerate(found) if status == 200]
    full = [(headers, tree) for status, headers, tree in found if status == 429]
    assert len(answered) >= MOST
    assert len(answered) + len(full) == len(found)
    assert all(choices == due[number % 6] for number, choices in answered)
    assert full
    assert all(int(headers["retry-after"]) >= 1 and tree["error"]["code"] == "line_full" for headers, tree in full)


def test_fault_102_120_121_every_route_is_behind_the_guard(served: Served) -> None:
    before = len(served.heard)
    routes = [(route.path.replace("{model}", "base"), method) for route in served.api.app().routes for method in route.methods]
    assert {path for path, _ in routes} >= {"/v1/models", "/v1/models/base", "/v1/chat/completions", "/health"}
    for path, method in [*routes, ("/nothing", "GET"), ("/v1/chat/completions", "GET"), ("/health", "POST")]:
        for headers in ({"origin": "null"}, {"origin": "http://evil.example"}, {"sec-fetch-site": "cross-site"}):
            assert ask(served.guard, method, path, headers, json.dumps(GREEDY).encode()).status == 403
        assert ask(served.guard, method, path, {"host": "evil.example"}).status == 421
        found = ask(served.guard, method, path)
        assert found.headers["x-content-type-options"] == "nosniff", path
        assert "frame-ancestors 'none'" in found.headers["content-security-policy"]
        if found.status >= 400:
            assert set(json.loads(found.body)["error"]) == {"message", "type", "param", "code"}
        assert not re.search(rb"Traceback|\.py|starlette|uvicorn|\d+\.\d+\.\d+", found.body)
    assert len(served.heard) == before


def test_fault_120_an_answer_that_fails_costs_only_itself(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no memory at /secret/place")

    monkeypatch.setattr("llm_finetune_kit.serving.answering.stop_ids", broken)
    status, _, tree = served.post(GREEDY)
    assert (status, tree["error"]["type"]) == (500, "server_error")
    assert "secret" not in str(tree)
    assert "/secret/place" in caplog.text
    monkeypatch.undo()
    assert served.post(GREEDY)[0] == 200


def copy(folder: Path, draft: Path) -> None:
    for path in folder.iterdir():
        (draft / path.name).write_bytes(path.read_bytes())


LAST = server.TRIES - 1  # so few states that reading anew must come to an end, however slow the machine is


def train(folder: RunFolder, adapter: Path) -> None:
    """What a run does while it trains: ever new checkpoints, the one before removed; each is all of one number."""
    tensors = load_file(adapter / WEIGHTS)
    for step in range(1, LAST + 1):

        def write(draft: Path, step: int = step) -> None:
            copy(adapter, draft)
            save_file({name: torch.full_like(part, step) for name, part in tensors.items()}, draft / WEIGHTS)

        commit(folder.path / f"checkpoint-{step}", write, {"base_model": "demo", "step": step})
        for old in folder.checkpoints()[1:]:
            for path in old.iterdir():
                path.unlink()
            old.rmdir()
        time.sleep(0.2)


def test_fault_98_a_run_that_is_being_written_is_served_from_one_whole_state(tmp_path: Path, adapter: Path) -> None:
    run = RunFolder.create(tmp_path, "run")
    (run.path / "events.jsonl").write_text("")
    writer = threading.Thread(target=train, args=(run, adapter))
    writer.start()
    try:
        while not run.checkpoints():
            time.sleep(0.05)
        seen = [0.0]
        while seen[-1] < LAST:
            opened, folder = server.opened_whole(str(run.path), dtype="float32", device="cpu")
            parts = [part for name, part in opened.model.named_parameters() if "lora_" in name]
            values = {float(value) for part in parts for value in part.unique()}
            assert values == {float(folder.rpartition("-")[2])}
            seen += values
    finally:
        writer.join()
    assert seen == sorted(seen)


def test_fault_98_what_was_replaced_while_it_was_read_is_read_again(
    tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"

    def put(step: int) -> None:
        commit(folder, lambda draft: copy(adapter, draft), {"step": step})

    read: list[int] = []

    def between(model: str, **_: Any) -> int:
        read.append(len(read))
        if len(read) < 3:
            put(len(read))
        if len(read) == 2:
            raise FileNotFoundError(model)
        return len(read)

    put(0)
    monkeypatch.setattr(server, "open_model", between)
    assert server.opened_whole(str(folder), dtype="float32", device="cpu") == (3, str(folder))
    monkeypatch.setattr(server, "open_model", lambda model, **_: put(len(read)) or read.append(0))
    with pytest.raises(BusyError, match="faster than it can be read"):
        server.opened_whole(str(folder), dtype="float32", device="cpu")
    monkeypatch.undo()
    (folder / WEIGHTS).unlink()
    with pytest.raises(ModelError):
        server.opened_whole(str(folder), dtype="float32", device="cpu")


# `finetune`, but no answer is at its end before it has as many tokens as were asked: none is short by chance.
ENDLESS = """\
import sys
from llm_finetune_kit.cli import main
from llm_finetune_kit.serving import answering
answering.stop_ids = lambda *_: []
sys.exit(main(sys.argv[1:]))
"""


def test_the_command_serves_until_it_is_told_to_end(tmp_path: Path) -> None:
    token = "a-token-for-this-test"
    (tmp_path / "token.txt").write_text(token)
    asked = "serve demo --port 0 --token-file token.txt --cors http://a.example --cors http://b.example"
    words = [sys.executable, "-c", ENDLESS, *asked.split()]
    here = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(words, cwd=tmp_path, env=here, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            assert process.stdout is not None
            told = []
            while not (found := re.search(r"listening on http://127\.0\.0\.1:(\d+)/v1", told[-1] if told else "")):
                told.append(process.stdout.readline())
                assert told[-1], told
            line = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=30)
            body = json.dumps(GREEDY | {"model": "demo", "max_tokens": 500, "stream": True})
            line.request("POST", "/v1/chat/completions", body, {"Authorization": f"Bearer {token}"})
            answer = line.getresponse()
            answer.readline()
            process.send_signal(signal.SIGTERM)
            rest = answer.read().decode()
            out, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert "shutting down" in rest
    assert process.returncode == 0
    assert out.splitlines()[-1] == "stopped"
    everything = "".join(told) + out
    assert token not in everything  # 105
    assert "password" not in everything  # nor what was asked
    assert "Traceback" not in everything
    assert max(map(len, everything.splitlines())) <= 80


def test_mistakes_are_told_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with listening.bound("127.0.0.1", 0) as taken:
        taken.listen()
        port = str(taken.getsockname()[1])
        done = finetune(tmp_path, "serve", "demo", "--port", port, light=True)
        assert (done.code, done.out) == (7, "")
        assert done.err.startswith(f"error[BUSY-020] 127.0.0.1: port {port} is taken")
    for words, code in ((["--host", "0.0.0.0"], "USAGE-040"), (["--cors", "*"], "USAGE-043"), (["--port", "70000"], "USAGE-044")):
        assert main(["serve", "demo", *words]) == 2
        assert capsys.readouterr().err.startswith(f"error[{code}]")
    monkeypatch.setattr(listening, "find_spec", lambda name: None)
    with pytest.raises(MachineError) as caught:
        listening.check_installed()
    assert caught.value.fix == "pip install 'llm-finetune-kit[serve]'"
