"""The page in a real browser, from the first tab to the last: one server, one Chromium, tiny runs on the demo model."""

from __future__ import annotations

import http.server
import io
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from gzip import decompress
from pathlib import Path
from typing import Any

import pytest

from chromium import PROGRAM
from conftest import SHARED
from llm_finetune_kit.folder import RunFolder

pytestmark = pytest.mark.skipif(
    PROGRAM is None and os.environ.get("CI") != "true", reason="no chromium is installed (apt-get install chromium)"
)
ROOT = Path(__file__).resolve().parents[1]
CANARY = "hf_canaryCANARYcanaryCANARYcanary01"
WORDS = ("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
BASE_IS = "What is the sum of two and three?"

# Python imports this before anything else: whoever connects to another machine is written down.
WATCHED = """\
import os, socket
real = socket.socket.connect
def connect(self, address):
    if isinstance(address, tuple) and not str(address[0]).startswith(("127.", "::1", "localhost")):
        with open(os.environ["CONNECTIONS"], "a") as log:
            print(address, file=log)
    return real(self, address)
socket.socket.connect = connect
"""


@dataclass
class Server:
    """`finetune ui` in a process of its own, in a folder of its own."""

    folder: Path
    port: int
    process: Any = None
    said: Path = field(init=False)

    def __post_init__(self) -> None:
        self.said = self.folder / "server.log"

    def start(self) -> None:
        wall = self.folder / ".wall"
        wall.mkdir(exist_ok=True)
        (wall / "sitecustomize.py").write_text(WATCHED)
        ours = {
            "PYTHONPATH": f"{wall}{os.pathsep}{ROOT / 'src'}",
            "OMP_NUM_THREADS": "1",
            "CONNECTIONS": str(self.folder / "connections"),
        }
        secret = {"HF_TOKEN": CANARY, "WANDB_API_KEY": CANARY, "LLM_FINETUNE_KIT_CACHE": str(self.folder / ".cache")}
        command = [sys.executable, "-m", "llm_finetune_kit", "ui", "--port", str(self.port)]
        with open(self.said, "ab") as log:
            self.process = subprocess.Popen(command, cwd=self.folder, env=os.environ | ours | secret, stdout=log, stderr=log)
        within(180, lambda: b"localhost" in self.said.read_bytes() and self.answers())

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def answers(self) -> bool:
        try:
            return self.get("live") != b""
        except OSError:
            return False

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/{path}", timeout=30) as answer:
            body: bytes = answer.read()
        return body

    def post(self, path: str, value: Any) -> bytes:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/{path}", json.dumps(value).encode())
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=60) as answer:
            body: bytes = answer.read()
        return body

    def events(self, run: str) -> list[dict[str, Any]]:
        path = self.folder / "outputs" / run / "events.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]

    def step(self, run: str) -> int:
        return max((event["step"] for event in self.events(run) if event["event"] == "Stepped"), default=0)


def within(seconds: float, holds: Callable[[], Any]) -> Any:
    """The first true value of `holds()`, or a failure after that time."""
    until = time.monotonic() + seconds
    while not (value := holds()):
        assert time.monotonic() < until, f"not within {seconds} s"
        time.sleep(0.1)
    return value


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = Server(tmp_path_factory.mktemp("ui"), port)
    found.start()
    yield found
    found.kill()
    for lock in found.folder.glob("outputs/*/.lock"):
        held = re.match(r"process (\d+)", lock.read_text())
        if held and RunFolder(lock.parent).at_work:
            os.kill(int(held[1]), signal.SIGKILL)


@pytest.fixture(scope="module")
def page(server: Server) -> Iterator[Any]:
    assert PROGRAM is not None, "chromium cannot be found"
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=PROGRAM, args=list(WORDS))
        page = chromium.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(180_000)
        page.asked, page.faults = [], []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("pageerror", lambda error: page.faults.append(str(error)))
        page.goto(f"http://127.0.0.1:{server.port}/")
        yield page
        chromium.close()


def tab(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def fill(page: Any, knob: str, text: str) -> None:
    page.fill(f"#knob-{knob.replace('.', '-')} :is(input, textarea)", text)


def card(page: Any) -> str:
    return str(page.inner_text("#live"))


def shown_step(page: Any) -> int:
    place = page.query_selector("#live .run [role=progressbar]")
    return int(place.get_attribute("aria-valuenow")) if place else 0


def test_the_page_says_whether_a_model_fits(page: Any) -> None:
    page.click("#demo")
    page.wait_for_selector("#model-card .tiles")
    assert "LoRA fits on this machine" in page.inner_text("#model-card")
    assert "memory" in (page.get_attribute("#model-card .bar", "aria-label") or "")


def test_an_upload_is_reported_and_its_mask_shown(page: Any, server: Server, tmp_path: Path) -> None:
    real = SHARED / "sft" / "gsm8k_train.jsonl.gz"
    rows = decompress(real.read_bytes()).split(b"\n")[:30] if real.exists() else [(ROOT / "data" / "train.json").read_bytes()]
    (tmp_path / "Grade School.jsonl").write_bytes(b"\n".join(rows))
    tab(page, "Dataset")
    page.set_input_files("#upload input[type=file]", tmp_path / "Grade School.jsonl")
    page.wait_for_selector("#upload-said .note")
    assert "uploads/grade-school.json" in page.inner_text("#upload-said")
    page.click("#check")
    page.wait_for_selector("#xray .xray")
    told = page.inner_text("#data-report")
    assert "Data report" in told and "Rows" in told and re.search("Read as [a-z-]+: found", told)
    assert page.locator("#xray .xray pre b").count() > 10  # learned tokens
    assert "gate lets it pass" in page.inner_text("#xray")


def test_the_plan_is_shown_before_anything_starts(page: Any, server: Server) -> None:
    tab(page, "Training")
    page.get_by_text("Evaluation", exact=True).click()
    page.get_by_text("Answers during evaluation", exact=True).click()
    fill(page, "evaluation.generation.max_new_tokens", "8")
    asked = {"training.max_steps": "4000", "training.batch_size": "2", "training.save_steps": "5"}
    asked["training.eval_steps"] = "400"  # so seldom that nothing stops it early
    asked |= {"model.max_length": "512", "output.run_name": "Long Run", "evaluation.rows": "2"}
    for knob, text in asked.items():
        fill(page, knob, text)
    page.click("#plan")
    page.wait_for_selector("#planned .card")
    said = page.inner_text("#planned")
    assert "It fits." in said and "Memory" in said and "Time" in said and "4,000" in said
    assert "finetune train model.name=demo" in page.locator("#planned pre").text_content()
    assert not (server.folder / "outputs").exists()


def test_fault_97_five_presses_are_one_run_and_the_curve_moves(page: Any, server: Server) -> None:
    for _ in range(5):
        page.click("#start")
    page.wait_for_selector("#live .run svg path.smooth")
    first = shown_step(page)
    within(180, lambda: shown_step(page) > first + 1)
    assert "Tokens per second" in card(page) and "Time left" in card(page)
    assert [path.name for path in (server.folder / "outputs").iterdir()] == ["long-run"]


def test_a_reload_and_a_second_tab_show_the_same(page: Any, server: Server) -> None:
    page.reload()
    page.wait_for_selector("#tabs")
    tab(page, "Training")
    page.wait_for_selector("#live .run")
    within(60, lambda: page.input_value("#knob-training-max_steps :is(input, textarea)") == "4000")  # once it is remembered
    within(60, lambda: page.input_value("#knob-output-run_name :is(input, textarea)") == "Long Run")
    with page.context.browser.new_page() as other:
        other.goto(f"http://127.0.0.1:{server.port}/")
        tab(other, "Training")
        other.wait_for_selector("#live .run")
        assert other.inner_text("#live h3") == page.inner_text("#live h3") == "long-run"
        assert abs(shown_step(other) - shown_step(page)) < 50


def test_fault_99_another_start_waits(page: Any, server: Server) -> None:
    for knob, text in {"training.max_steps": "3", "output.run_name": "short", "training.eval_steps": "3"}.items():
        fill(page, knob, text)
    page.click("#start")
    page.wait_for_selector("#live .badge:has-text('waiting')")
    assert "short" in page.inner_text("#history") and "running" in page.inner_text("#history")
    assert not (server.folder / "outputs" / "short").exists()
    number = (server.folder / ".finetune-ui" / "queue" / "at-work.lock").read_text().split()[1]
    commands = [Path(f"/proc/{one}/cmdline").read_bytes() for one in (number, server.process.pid)]
    assert all(b"llm_finetune_kit" in command and CANARY.encode() not in command for command in commands)


def test_fault_122_fifty_users_while_a_training_runs(page: Any, server: Server) -> None:
    config = json.loads(server.get("config"))
    by_id = {part["id"]: part["props"].get("elem_id") for part in config["components"]}
    look = next(one["id"] for one in config["dependencies"] if one["outputs"] and by_id[one["outputs"][0]] == "model-card")
    wrong: list[str] = []

    def user(number: int) -> list[float]:
        """What each of four requests took."""
        taken = []
        name = ("demo", "gpt2", "tinyllama", "mistral-7b", "phi-3-mini")[number % 5]
        run = ("long-run", "short")[number % 2]
        for _ in range(3):
            began = time.monotonic()
            if json.loads(server.get(f"live?run={run}"))["run"] != run:
                wrong.append(run)
            taken.append(time.monotonic() - began)
        began = time.monotonic()
        asked = {"data": [name], "fn_index": look, "session_hash": f"user{number}"}
        server.post("gradio_api/queue/join", asked)
        said = server.get(f"gradio_api/queue/data?session_hash=user{number}").decode()
        taken.append(time.monotonic() - began)
        if f"<h3>{name}</h3>" not in said:
            wrong.append(name)
        return taken

    alone = sorted(sum(user(number)) for number in range(50, 57))
    assert alone[0] < 1.0, alone
    visit = alone[3]  # on a busy machine longer, and then fifty come more slowly
    with ThreadPoolExecutor(50) as crowd:
        visits = []
        for number in range(50):  # people do not all press at once
            visits.append(crowd.submit(user, number))
            time.sleep(max(1 / 12, visit))
        taken = [seconds for one in visits for seconds in one.result()]
    assert wrong == [] and len(taken) == 200
    assert statistics.quantiles(taken, n=20)[-1] < max(1.0, 4 * visit), (visit, sorted(taken)[-20:])


def test_fault_123_a_killed_server_takes_no_run_with_it(page: Any, server: Server) -> None:
    before = server.step("long-run")
    server.kill()
    page.wait_for_selector("body.kit-away")
    within(180, lambda: server.step("long-run") > before + 1)
    server.start()
    page.wait_for_selector("body:not(.kit-away)", state="attached")
    page.click("#history button[data-run='long-run']")
    page.wait_for_selector("#live h3:has-text('long-run')")
    now = shown_step(page)
    within(180, lambda: shown_step(page) > now)
    assert "short" in page.inner_text("#history"), "the queue is still there"


def test_stop_saves_and_the_next_run_begins(page: Any, server: Server) -> None:
    page.click("#live button.stop")
    page.wait_for_selector("#live .badge:has-text('interrupted')")
    assert server.events("long-run")[-1]["event"] == "Failed"
    assert list((server.folder / "outputs" / "long-run").glob("checkpoint-*"))
    page.click("#history button[data-run='short']")
    page.wait_for_selector("#live .badge:has-text('finished')", timeout=240_000)


def test_base_and_tuned_are_compared_and_asked(page: Any, server: Server) -> None:
    tab(page, "Testing")
    page.wait_for_selector("#comparison table")
    assert "Held-out loss" in page.inner_text("#comparison")
    page.get_by_text("How they answer", exact=True).click()
    page.fill("#longest input[type=number]", "512")  # long, as gradio and a browser show many pieces at once
    page.fill("#question textarea", f"<img src=x onerror=alert(1)> {BASE_IS}")
    watch = "new MutationObserver(() => window.seen.add(document.querySelector('#chat').innerText.length))"
    page.evaluate(
        f"window.seen = new Set(); {watch}.observe(document.querySelector('#tabs'), {{subtree: true, childList: true}})"
    )
    page.click("#ask")
    page.wait_for_selector("#chat .ask")
    page.wait_for_function("!document.querySelector('#chat .caret') && !document.querySelector('#chat .answer .soft')")
    assert len(page.evaluate("[...window.seen]")) > 3, "the answers come in pieces: not only asked, loading and whole"
    assert BASE_IS in page.inner_text("#chat") and "waits for its turn" not in page.inner_text("#chat")
    assert page.locator("#chat img").count() == 0
    assert len(page.inner_text("#chat .answer.base")) > 1


def test_the_adapter_and_the_report_can_be_taken_home(page: Any, server: Server) -> None:
    names = zipfile.ZipFile(io.BytesIO(server.get("runs/short/model.zip"))).namelist()
    assert {"adapter_model.safetensors", "adapter_config.json", "manifest.json", "README.md"} <= set(names)
    answer = urllib.request.urlopen(f"http://127.0.0.1:{server.port}/runs/short/report", timeout=30)
    assert "sandbox" in answer.headers["Content-Security-Policy"] and b"<html" in answer.read()
    with page.expect_download() as taken:
        page.click("#comparison a:has-text('Download the adapter')")
    assert taken.value.suggested_filename == "short.zip"


def test_a_stopped_run_goes_on(page: Any, server: Server) -> None:
    stopped = server.step("long-run")
    tab(page, "Training")
    page.click("#history button[data-run='long-run']")
    page.click("#live button.main")
    within(180, lambda: server.step("long-run") > stopped)
    page.wait_for_selector("#live .badge:has-text('running')")
    page.click("#live button.stop")
    page.wait_for_selector("#live .badge:has-text('interrupted')")


def test_fault_111_a_hostile_name_is_text(page: Any, server: Server) -> None:
    name = "<img src=x onerror=document.title=1>"
    final = server.folder / "outputs" / name / "final"
    final.mkdir(parents=True)
    (final / "manifest.json").write_text("{}")
    (final.parent / "events.jsonl").write_text('{"event": "Stage", "time": 1, "name": "plan", "detail": "<img src=x>"}\n')
    tab(page, "Training")
    page.get_by_role("button", name=name).click()
    page.wait_for_selector("#live h3:has-text('onerror')")
    tab(page, "Testing")
    page.click("#tested input")
    page.get_by_role("option", name=name).click()
    page.wait_for_selector("#comparison .empty")
    assert page.locator("#tabs img").count() == 0 and page.title() == "LLM Finetune Kit"


@pytest.mark.parametrize("path", [
    "gradio_api/file=/etc/passwd", "gradio_api/file=connections", "gradio_api/file=server.log", "file=/etc/passwd",
    "runs/../x/report", "runs/none/report", "runs/%2e%2e/report", "runs/long-run/model.zip",
    "gradio_api/proxy=http://127.0.0.1/x", "monitoring", "docs",
])  # fmt: skip
def test_fault_107_and_120_what_is_not_there_says_nothing(path: str, server: Server) -> None:
    with pytest.raises(urllib.error.HTTPError) as found:
        server.get(path)
    said = found.value.read().decode()
    assert found.value.code in (403, 404)
    assert len(said) < 200 and "Traceback" not in said and "root:" not in said and str(server.folder) not in said


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b'{"do": "stop"}', b'{"do": "rm", "run": "short"}', b"\xff" * 50])
def test_fault_120_a_request_that_cannot_be_understood(body: bytes, server: Server) -> None:
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}/act", body)
    with pytest.raises(urllib.error.HTTPError) as found:
        urllib.request.urlopen(request, timeout=30)
    assert found.value.code == 400 and "Traceback" not in found.value.read().decode()


def test_fault_102_another_site_starts_and_stops_nothing(server: Server) -> None:
    before = sorted(path.name for path in (server.folder / ".finetune-ui" / "queue").iterdir())
    for path in ("act", "gradio_api/queue/join", "gradio_api/upload"):
        request = urllib.request.Request(f"http://127.0.0.1:{server.port}/{path}", b'{"do": "resume", "run": "long-run"}')
        request.add_header("Origin", "http://evil.example")
        with pytest.raises(urllib.error.HTTPError) as found:
            urllib.request.urlopen(request, timeout=30)
        assert found.value.code == 403
    assert sorted(path.name for path in (server.folder / ".finetune-ui" / "queue").iterdir()) == before


class Counting(http.server.BaseHTTPRequestHandler):
    """Counts who comes."""

    asked = 0

    def do_GET(self) -> None:
        Counting.asked += 1
        self.send_error(404)

    def log_message(self, *words: Any) -> None:
        """Silent."""


def test_fault_106_and_115_a_call_past_the_page_takes_no_file_and_fetches_nothing(server: Server) -> None:
    """gradio takes what looks like an upload in the value of any control."""
    config = json.loads(server.get("config"))
    by_id = {part["id"]: part["props"].get("elem_id") for part in config["components"]}
    calls = [one for one in config["dependencies"] if one["backend_fn"] and one["inputs"]]
    (server.folder / "mine.jsonl").write_text('{"prompt": "a", "response": "b"}')
    before = sorted(path for path in server.folder.rglob("*") if path.is_file() and path.suffix in (".jsonl", ""))
    with http.server.HTTPServer(("127.0.0.1", 0), Counting) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        paths = [
            str(server.folder / "mine.jsonl"),
            "/etc/hostname",
            f"http://127.0.0.1:{other.server_port}/x.jsonl",
            "mine.jsonl",
        ]
        paths += [str(server.folder / ".finetune-ui" / "incoming" / ".." / ".." / "mine.jsonl")]
        for call in (next(one for one in calls if by_id[one["inputs"][0]] == name) for name in ("upload", "knob-model-name")):
            for path in paths:
                for key in ("path", "url"):
                    file = {key: path, "orig_name": "x.jsonl", "meta": {"_type": "gradio.FileData"}}
                    for value in (file, [file], {"a": [file]}):
                        with pytest.raises(urllib.error.HTTPError) as found:
                            server.post("gradio_api/queue/join", {"data": [value], "fn_index": call["id"], "session_hash": "x"})
                        assert found.value.code == 400
        other.shutdown()
    assert Counting.asked == 0
    assert sorted(path for path in server.folder.rglob("*") if path.is_file() and path.suffix in (".jsonl", "")) == before


def test_fault_108_an_upload_beyond_the_limit_is_cut(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as wire:
        head = f"POST /gradio_api/upload HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nContent-Length: 900000000\r\n\r\n"
        wire.sendall(head.encode())
        assert b" 413 " in wire.recv(1000).split(b"\r\n")[0]


def test_fault_124_nothing_is_asked_of_any_other_machine(page: Any, server: Server) -> None:
    ours = (f"http://127.0.0.1:{server.port}/", "data:", "blob:")
    assert [url for url in page.asked if not url.startswith(ours)] == []
    assert page.faults == []
    assert "Traceback" not in server.said.read_text()
    assert not (server.folder / "connections").exists()


def test_fault_119_secrets_are_written_nowhere(page: Any, server: Server) -> None:
    files = [path for path in server.folder.rglob("*") if path.is_file()]
    assert len(files) > 30
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []
    assert CANARY not in page.content() and CANARY.encode() not in server.get("live?run=short")
