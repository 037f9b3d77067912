"""The browser page without a browser: the form, names and paths, uploads, the queue, what is shown and what is not there."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llm_finetune_kit.config import RunConfig, knobs
from llm_finetune_kit.errors import BusyError, ConfigError, KitError, UsageError
from llm_finetune_kit.events import Evaluated, Failed, Finished, Planned, Resumed, Saving, Stepped, Warned
from llm_finetune_kit.files import write_json
from llm_finetune_kit.folder import RunFolder
from llm_finetune_kit.plain_yaml import dump_yaml
from llm_finetune_kit.settings import load_config
from llm_finetune_kit.ui import form, runs_view, uploads, views
from llm_finetune_kit.ui.answers import Answering, Turn
from llm_finetune_kit.ui.desk import Desk
from llm_finetune_kit.ui.jobs import Jobs
from llm_finetune_kit.ui.routes import is_there
from llm_finetune_kit.ui.testing_tab import conversation
from llm_finetune_kit.ui.uploads import Limits
from llm_finetune_kit.ui.watch import Watch, pace
from llm_finetune_kit.ui.workspace import Workspace
from test_settings import another

SOURCE = Path(form.__file__).parent
EVIL = "<img src=x onerror=alert(1)>{{7*7}}${alert(2)}"


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    """A desk over an empty folder."""
    return Desk(Workspace(tmp_path.resolve()))


@contextlib.contextmanager
def at_work(desk: Desk, name: str = "from-a-terminal") -> Iterator[RunFolder]:
    """A run of this workspace that a terminal is at: nothing else begins meanwhile."""
    run = RunFolder.create(desk.workspace.outputs, name)
    with run.locked():
        run.record(Stepped(1, 10, 0.1, 2.0, 1e-3, 1.0, 100, 50, 0.5))
        yield run


def stepped(step: int, loss: float = 2.0, tokens: int = 100, seconds: float = 0.5) -> Stepped:
    return Stepped(step, 10, step / 10, loss, 1e-3, 1.0, tokens, tokens // 2, seconds)


# --- the form ----------------------------------------------------------------------------------------------


def test_every_knob_has_a_control_but_those_withheld_with_a_reason() -> None:
    assert set(form.controls()) == set(knobs()) - set(form.WITHHELD)
    assert all(control.help == knobs()[path].description for path, control in form.controls().items())
    placed = {control.path for controls in form.sections(form.controls()).values() for control in controls}
    assert placed | set(form.COMMON) | set(form.OF_THE_TABS) == set(form.controls())


@pytest.mark.parametrize("path", form.controls())
def test_a_form_gives_the_config_that_yaml_and_a_terminal_give(path: str, tmp_path: Path) -> None:
    value = another(path)
    config = RunConfig().with_values({path: value})
    values = form.values_of(config)
    assert form.config_of(values) == config
    (tmp_path / "asked.yaml").write_text(dump_yaml(config.asked()))
    assert form.config_of(values) == load_config(tmp_path / "asked.yaml")[0] == load_config(None, form.words(values))[0]
    assert len(form.words(values)) == 1


def test_an_untouched_form_asks_for_nothing() -> None:
    values = {path: control.value for path, control in form.controls().items()}
    assert form.words(values) == []
    assert form.values_of(RunConfig()) == values


@pytest.mark.parametrize("text", ["null", "~", "'quoted", '"both"', "two\nlines", "a: b", "[1]", " spaces ", "#5", "ünï", "x=y"])
def test_a_text_stays_the_text_that_was_typed(text: str) -> None:
    assert form.config_of({"data.system_prompt": text}).data.system_prompt == text


def test_all_faults_of_a_form_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as found:
        form.config_of({"training.max_steps": "many", "lora.r": "-1"})
    assert "training.max_steps" in str(found.value) and "lora.r" in str(found.value)
    assert "command line" not in str(found.value)
    assert str(found.value).startswith("error[CONFIG-004] LoRA r (lora.r) is") and "\nMax steps (training.max_steps)" in str(
        found.value
    )
    assert form.faulty(found.value) == ["lora.r", "training.max_steps"]


def test_a_decimal_comma_gets_a_hint() -> None:
    with pytest.raises(ConfigError) as found:
        form.config_of({"training.learning_rate": "0,003"})
    assert "decimal point" in found.value.fix and form.faulty(found.value) == ["training.learning_rate"]
    assert "#knob-training-learning_rate" in views.error(found.value, ["knob-training-learning_rate"])


# --- names and paths ---------------------------------------------------------------------------------------

PIECES = ("..", ".", "~", "/", "C:\\", "%2e%2e", "\0", "a" * 300, "\\\\host\\x", "-rf", "$(id)", "`id`", ";id", "\n", "link")
TAILS = ("", "/x", "/../x", "\\x", "/passwd", ":x", "/etc/passwd", ".jsonl", "#3", "[:1]", "/secret.jsonl", "%00")
PATHS = [head + tail for head in PIECES for tail in TAILS]
PATHS += [
    "../../etc/passwd",
    "/etc/passwd",
    "....//x",
    "outside",
    "outside/secret.jsonl",
    "uploads/../../x",
    "file:///etc/passwd",
]
PATHS += ["http://127.0.0.1/x.jsonl", "https://a.b/c", "s3://a/b", "ftp://a/b", "data:text/csv,a", "//host/share"]
PATHS += [".finetune-ui/queue"]
PATHS += ["hf://a/b", "../x:train", "x/../../y#5", "owner/../name", ".env", "uploads/.hidden", "link/secret.jsonl", "holder"]


@pytest.fixture(scope="module")
def walled(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace with links that lead out of it, beside a folder with something secret."""
    base = tmp_path_factory.mktemp("walled").resolve()
    (base / "secrets").mkdir()
    (base / "secrets" / "secret.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    root = base / "here"
    (root / "outputs").mkdir(parents=True)
    (root / "holder").mkdir()
    for link in (root / "link", root / "outside", root / "holder" / "link", root / "outputs" / "stolen"):
        link.symlink_to(base / "secrets")
    RunFolder.create(base / "secrets", "run")
    return Workspace(root)


def test_fault_106_no_name_leads_out_of_the_workspace(walled: Workspace) -> None:
    assert len(PATHS) > 180
    before = sorted(walled.root.parent.rglob("*"))
    for text in PATHS:
        for means in (walled.model, walled.data, walled.run, lambda name: Jobs(walled).stop(name)):
            with pytest.raises(KitError):
                means(text)
    after = [path for path in walled.root.parent.rglob("*") if walled.own not in (path, *path.parents)]
    assert sorted(after) == before


def test_fault_106_a_run_behind_a_link_is_no_run(walled: Workspace) -> None:
    (walled.root.parent / "secrets" / "events.jsonl").write_text("")
    assert walled.runs() == []


@pytest.mark.parametrize("values", [
    {"data.mix": "{../secrets/secret.jsonl: 1}"}, {"data.template": "/etc/passwd"}, {"data.template": "../x.jinja"},
    {"data.eval_file": "/etc/passwd"}, {"data.train_file": "../secrets/secret.jsonl"}, {"model.name": "/etc"},
])  # fmt: skip
def test_fault_114_a_path_in_any_setting_is_refused(values: dict[str, str], walled: Workspace) -> None:
    with pytest.raises(KitError):
        Desk(walled).config({"model.name": "demo", "data.train_file": "sample:chat"} | values)


def test_fault_114_remote_code_and_other_folders_cannot_be_asked_for(desk: Desk) -> None:
    for withheld in form.WITHHELD:
        with pytest.raises(KeyError):
            desk.config({"model.name": "demo", "data.train_file": "sample:chat", withheld: "x"})
    for path, value in {"model.trust_remote_code": True, "model.cache_dir": "/tmp", "output.output_dir": "/tmp"}.items():
        config = RunConfig().with_values({"model.name": "demo", "data.train_file": "sample:chat", path: value})
        with pytest.raises(ConfigError):
            desk.jobs.start(config)
    assert desk.jobs.all() == []


def test_fault_115_an_address_is_no_name_and_nothing_is_fetched(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("socket.socket.connect", lambda *where: asked.append(where))
    monkeypatch.setattr("socket.getaddrinfo", lambda *where, **how: asked.append(where) or [])
    for address in ("http://10.0.0.1/a.jsonl", "https://example.org/m", "s3://bucket/x", "hf://datasets/a/b", "git@host:a/b"):
        for look in (lambda one: desk.model(one), lambda one: desk.check({"model.name": "demo", "data.train_file": one})):
            with pytest.raises(KitError):
                look(address)
    assert asked == []


def test_names_inside_the_workspace_mean_what_they_say(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path.resolve())
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a b.jsonl").write_text("{}")
    good = ["sample:chat", "sample:chat[5:10]#3", "alpaca", "both#5", "rows", "rows/a b.jsonl", "rows/a b.jsonl#3", "owner/name"]
    for name in (*good, "owner/name:train[:10%]", "rows:train"):
        assert workspace.data(name) == name
    assert [workspace.model(name) for name in ("demo", "GPT2", "rows", "owner/name")] == ["demo", "GPT2", "rows", "owner/name"]


# --- uploads -----------------------------------------------------------------------------------------------


def arrived(folder: Path, content: bytes) -> Path:
    path = Workspace(folder.resolve()).incoming / "arrived"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


PARQUET = b"PAR1" + b"\0" * 20 + b"PAR1"
GOOD = [
    (b'{"prompt": "a", "response": "b"}\n', "My Data (1).jsonl", "uploads/my-data-1.jsonl"),
    (b"\xef\xbb\xbf[{}]", "rows.txt.json", "uploads/rows-txt.json"),
    (b'[{"a": 1}]', "../../etc/cron.d/evil.pkl", "uploads/evil.json"),
    (b"prompt,response\na,b\n", "table.csv", "uploads/table.csv"),
    ("größe\tb\n".encode(), "..\\..\\x.tsv", "uploads/x.tsv"),
    (PARQUET, "x.exe", "uploads/x.parquet"),
    (b"plain text", "\u202egnp.txt", "uploads/gnp.txt"),
    (b"{}", ".jsonl", "uploads/jsonl.jsonl"),
    (b"{}", "\0/\n.jsonl", "uploads/data.jsonl"),
    (b"{}", "a" * 500 + ".json", f"uploads/{'a' * 48}.jsonl"),
]
BAD = [
    b"", b"   \n", b"PK\x03\x04zip", b"\x1f\x8b\x08gzip", b"<!DOCTYPE html><script>", b"<svg onload=x>", b"  <?xml version='1'?>",
    b"\x7fELF\x02", b"MZ\x90\0", b"#!/bin/sh\nid", b"\x80\x04\x95pickle", b"GIF89a\x00", b"%PDF-1.4\x00", b"text\0text",
    b"\xff\xfea\0", b"PAR1 and no end",
]  # fmt: skip


@pytest.mark.parametrize(("content", "name", "kept"), GOOD)
def test_fault_109_data_is_kept_under_a_name_that_is_made_here(content: bytes, name: str, kept: str, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path.resolve())
    assert uploads.take(workspace, arrived(tmp_path, content), name) == kept
    assert (tmp_path / kept).read_bytes() == content
    assert list(workspace.incoming.iterdir()) == []
    assert not (tmp_path / kept).stat().st_mode & 0o111
    assert workspace.data(kept) == kept


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.txt", "rows.parquet", "rows"])
def test_fault_109_what_is_no_data_is_refused_whatever_it_is_called(name: str, tmp_path: Path) -> None:
    for content in BAD:
        if content.startswith(b"PAR1") and name.endswith((".csv", ".txt")):
            continue  # text that begins so
        with pytest.raises(UsageError):
            uploads.take(Workspace(tmp_path.resolve()), arrived(tmp_path, content), name)
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_fault_106_only_what_was_uploaded_is_moved(tmp_path: Path) -> None:
    root = tmp_path / "here"
    arrived(root, b"{}").with_name("link").symlink_to(tmp_path / "mine.jsonl")
    (tmp_path / "mine.jsonl").write_text("{}")
    for path in (
        tmp_path / "mine.jsonl",
        Workspace(root).incoming / "link",
        Workspace(root).incoming / ".." / ".." / ".." / "mine.jsonl",
    ):
        with pytest.raises(UsageError):
            uploads.take(Workspace(root.resolve()), path, "mine.jsonl")
    assert (tmp_path / "mine.jsonl").exists() and not (root / "uploads").exists()


def test_the_same_file_sent_twice_is_kept_once(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path.resolve())
    names = [uploads.take(workspace, arrived(tmp_path, text), "a.jsonl") for text in (b"{}", b"{}", b'{"b": 1}')]
    assert names == ["uploads/a.jsonl", "uploads/a.jsonl", "uploads/a-2.jsonl"]


def test_fault_110_a_file_and_all_files_have_limits(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path.resolve())
    limits = Limits(file=100, total=250, files=3)
    rows = [b'{"n": %d}' % number + b" " * 90 for number in range(4)]
    with pytest.raises(UsageError, match="has 101 bytes"):
        uploads.take(workspace, arrived(tmp_path, b"{}" + b" " * 99), "large.jsonl", limits)
    for row in rows[:2]:
        uploads.take(workspace, arrived(tmp_path, row), "a.jsonl", limits)
    with pytest.raises(UsageError, match="no room"):
        uploads.take(workspace, arrived(tmp_path, rows[2]), "a.jsonl", limits)
    uploads.take(workspace, arrived(tmp_path, b"{}"), "b.jsonl", limits)
    with pytest.raises(UsageError, match="no room"):
        uploads.take(workspace, arrived(tmp_path, b"[]"), "c.json", limits)
    assert uploads.used(workspace) == (2 * 98 + 2, 3)


def test_fault_109_what_is_gzipped_is_kept_unpacked_and_told_by_its_content(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path.resolve())
    assert uploads.take(workspace, arrived(tmp_path, gzip.compress(b'{"a": 1}\n')), "rows.jsonl.gz") == "uploads/rows.jsonl"
    assert uploads.take(workspace, arrived(tmp_path, gzip.compress(b"a,b\n1,2\n")), "Table.CSV.GZ") == "uploads/table.csv"
    assert (tmp_path / "uploads" / "rows.jsonl").read_bytes() == b'{"a": 1}\n'
    packed = gzip.compress(b'{"a": 1}\n' * 999)
    for content in (packed[:-9], gzip.compress(b"MZ\x90\0"), gzip.compress(packed)):
        with pytest.raises(UsageError) as found:
            uploads.take(workspace, arrived(tmp_path, content), "rows.jsonl.gz")
        assert found.value.code == "USAGE-053"
        assert list(workspace.incoming.iterdir()) == []


def test_fault_110_a_gzip_bomb_is_cut_at_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "PART", 1000)
    workspace, written = Workspace(tmp_path.resolve()), []
    bomb = arrived(tmp_path, gzip.compress(b" " * 5_000_000))
    monkeypatch.setattr(
        Path, "unlink", lambda path, missing_ok: (written.append(path.stat().st_size), path.rename(tmp_path / path.name))
    )
    assert bomb.stat().st_size < 10_000
    with pytest.raises(UsageError, match="unpacked file has more than"):
        uploads.take(workspace, bomb, "rows.jsonl.gz", Limits(file=10_000))
    assert max(written) <= 10_000 and list(workspace.incoming.iterdir()) == []


# --- the queue ---------------------------------------------------------------------------------------------

ASKED = {"model.name": "demo", "data.train_file": "sample:chat", "training.max_steps": "2"}


def test_fault_97_a_start_pressed_five_times_is_one_run(desk: Desk) -> None:
    with at_work(desk):
        names = {Desk(desk.workspace).start(ASKED) for _ in range(5)}  # a desk each: five servers
        assert names == {"demo-chat"}
        assert [job.name for job in desk.jobs.waiting()] == ["demo-chat"]
        assert desk.start(ASKED | {"training.max_steps": "3"}) == "demo-chat-2"


def test_fault_99_the_queue_outlives_the_server(desk: Desk) -> None:
    with at_work(desk):
        names = [desk.start(ASKED | {"training.seed": str(seed)}) for seed in range(20)]
        again = Desk(desk.workspace)
        assert [job.name for job in again.jobs.waiting()] == names
        card = again.live(names[3])["card"]
        assert "waiting" in card and "3 others are before it" in card
        again.act("stop", names[3])
        assert [job.name for job in desk.jobs.waiting()] == names[:3] + names[4:]
        assert [config_of(desk, name).training.seed for name in names[:3]] == [0, 1, 2]


def config_of(desk: Desk, name: str) -> RunConfig:
    return load_config(desk.jobs.folder / f"{name}.yaml")[0]


def test_a_queue_has_an_end(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_finetune_kit.ui.jobs.MOST_WAITING", 2)
    with at_work(desk):
        desk.start(ASKED)
        desk.start(ASKED | {"training.seed": "1"})
        with pytest.raises(BusyError):
            desk.start(ASKED | {"training.seed": "2"})


@pytest.mark.parametrize("asked", ["My Run!", "../x", "-rf", "$(id)", "a" * 99, "…", "UP", "con.jsonl", "a;b"])
def test_fault_113_a_run_that_begins_here_has_a_plain_name(asked: str, desk: Desk) -> None:
    with at_work(desk), contextlib.suppress(ConfigError):
        assert re.fullmatch("[a-z0-9][a-z0-9-]{0,63}", desk.start(ASKED | {"output.run_name": asked}))


def test_fault_113_commands_are_lists_and_never_pass_a_shell() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in SOURCE.glob("*.py"))
    assert not re.search(r"shell\s*=|os\.system|popen\(|getoutput|\beval\(|\bexec\(", text)
    assert len(re.findall(r"subprocess\.(run|Popen|call|check_\w+)\(", text)) == 1


def test_a_start_that_comes_to_nothing_is_told_and_the_next_begins(desk: Desk) -> None:
    (desk.workspace.root / "bad.jsonl").write_text('{"prompt": "a", "response": null}\n')
    name = desk.start(ASKED | {"data.train_file": "bad.jsonl"})
    waited = time.monotonic()
    while desk.jobs.current()[0] and time.monotonic() - waited < 180:
        time.sleep(0.05)
    card = desk.live(name)["card"]
    assert "did not begin" in card and "DATA-" in card and "bad.jsonl line 1" in card
    assert "did not begin" in desk.live(name)["history"]
    assert Desk(desk.workspace).live("")["run"] == name
    finished(desk, "newer")
    fresh = Desk(desk.workspace).live("")
    assert fresh["run"] == "newer" and fresh["history"].index("newer") < fresh["history"].index(f">{name}<")
    assert (fresh["state"], fresh["status"]) == ("finished", "newer finished")
    desk.act("dismiss", name)
    assert desk.jobs.all() == []


def test_a_run_that_will_not_go_on_says_why(desk: Desk) -> None:
    run = RunFolder.create(desk.workspace.outputs, "old")
    with run.locked():
        run.record(stepped(1))
    desk.act("resume", "old")  # it has no checkpoint and no config
    waited = time.monotonic()
    while desk.jobs.current()[0] and time.monotonic() - waited < 180:
        time.sleep(0.05)
    desk.jobs.advance()
    card = Desk(desk.workspace).live("old")["card"]
    assert "interrupted" in card and 'role="alert"' in card and "What to do" in card


def test_stopping_what_does_not_run_is_told(desk: Desk) -> None:
    run = RunFolder.create(desk.workspace.outputs, "old")
    with run.locked():
        run.record(stepped(1))
        with pytest.raises(BusyError):
            desk.act("resume", "old")
    with pytest.raises(UsageError):
        desk.act("stop", "old")
    with pytest.raises(UsageError):
        desk.act("delete", "old")


# --- what runs said ----------------------------------------------------------------------------------------


def test_a_log_read_in_pieces_is_the_log_read_whole(tmp_path: Path) -> None:
    run, watch = RunFolder.create(tmp_path, "run"), Watch()
    events = [stepped(1), stepped(2), Saving(2, "checkpoint-2", 0), stepped(3)]
    events += [Resumed(2, "checkpoint-2"), stepped(3, 1.5), stepped(4)]
    with run.locked():
        for event in events:
            run.record(event)
            assert watch.told(run) == run.replay()
    with open(run.path / "events.jsonl", "ab") as log:
        log.write(b'{"event": "Stepped", "st')  # as it is written
    assert watch.told(run) == run.replay()
    (run.path / "events.jsonl").write_text("")
    assert watch.told(run) == []


def test_the_pace_is_that_of_the_last_steps() -> None:
    told = [*(stepped(step, seconds=100.0) for step in range(1, 5)), *(stepped(5, seconds=0.5) for _ in range(20))]
    going = pace(told)  # type: ignore[arg-type]
    assert (going.tokens_per_second, going.seconds_left) == (200.0, 2.5)
    assert pace([]).seconds_left is None


def finished(desk: Desk, name: str, *, prompt: str = "demo") -> RunFolder:
    """A run as its log and files tell it."""
    run = RunFolder.create(desk.workspace.outputs, name)
    config = RunConfig().with_values({"model.name": prompt, "data.train_file": prompt}).model_dump(mode="json")
    with run.locked():
        run.record(Planned({"config": config, "steps": 10}))
        run.record(Evaluated(0, 3.0, 20.0, 5, 50, 0.1))
        run.record(stepped(1))
        run.record(Warned(prompt, fix=prompt))
        run.record(Evaluated(1, 2.5, 12.0, 5, 50, 0.1, best=True))
        run.record(Finished(1, prompt, {}))
    run.final.mkdir()
    write_json(run.final / "manifest.json", {})
    return run


def test_the_card_of_a_run_tells_how_it_stands(desk: Desk) -> None:
    finished(desk, "done")
    card = desk.live("done")["card"]
    assert "finished" in card and "3.000 → 2.500" in card and "<svg" in card and "runs/done/model.zip" in card
    with at_work(desk) as run:
        assert desk.live("")["run"] == "from-a-terminal"
        card = desk.live("")["card"]
        assert "running" in card and "200" in card and "4.5 s" in card
        run.record(Failed("TRAIN-003", "loss is NaN", "lower the rate"))
    desk._live.forget()
    card = desk.live("from-a-terminal")["card"]
    assert "loss is NaN" in card and "lower the rate" in card


def test_few_held_out_rows_are_told_and_other_text_stands_apart(desk: Desk) -> None:
    row = {"base": 3.0, "tuned": 2.5, "difference": -0.5, "low": -0.6, "high": -0.4, "outcome": "better"}
    general = row | {"outcome": "open", "sentence": "General text is as before."}
    found = {"outcome": "better", "sentence": "Better.", "rows": {"answered": 1, "of": 5, "why": "asked"}}
    found |= {"metrics": [row | {"label": "Held-out loss"}], "general": general}
    run = finished(desk, "done")
    shown = runs_view.comparison(run, found)
    assert "Only 5 held-out rows with 50 learned tokens" in shown and "<th></th>" not in shown
    assert shown.index("Held-out loss") < shown.index("not of your rows") < shown.index("General text, bits")
    with run.locked():
        run.record(Evaluated(2, 2.4, 12.0, 5000, 50_000, 0.1, best=True))
    assert "Only" not in runs_view.comparison(run, found)


def test_fault_111_what_others_wrote_is_text(desk: Desk) -> None:
    finished(desk, "x<b>y", prompt=EVIL)
    fault = UsageError(50, EVIL, where=EVIL, why=EVIL, fix=EVIL)
    turns = [Turn(EVIL, {"base": EVIL, "tuned": EVIL})]
    live = desk.live("x<b>y")
    pieces = [live["card"], live["history"], views.error(fault), conversation(turns), views.hint(EVIL, EVIL)]
    pieces.append(views.piece("uploaded", EVIL))
    said = f"error[DATA-001] {EVIL}\n  fix:  {EVIL}\n"
    pieces.append(views.error(views.fault_in(said, EVIL)))
    for piece in pieces:
        assert "<img" not in piece and "<b>y" not in piece
        assert "&lt;img src=x onerror=alert(1)&gt;{{7*7}}${alert(2)}" in piece or "x&lt;b&gt;y" in piece


def test_fault_111_a_report_of_hostile_data_holds_no_markup(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(desk.workspace.root)
    row = {"prompt": EVIL, "response": f"</pre><script>{EVIL}</script>"}
    (desk.workspace.root / "evil.jsonl").write_text("\n".join([json.dumps(row)] * 8))
    report, xray = desk.check({"model.name": "demo", "data.train_file": "evil.jsonl"})
    assert "<img" not in report + xray and "<script" not in report + xray
    assert "&lt;" in xray


# --- asking models -----------------------------------------------------------------------------------------


def test_a_conversation_has_limits(desk: Desk) -> None:
    from llm_finetune_kit.config import GenerationSection

    run = finished(desk, "done")
    for question, turns, said in (("  ", [], "no question"), ("x" * 5000, [], "question is"), ("x", [Turn("a")] * 20, "conv")):
        with pytest.raises(UsageError, match=said):
            list(Answering().ask(run, turns, question, GenerationSection()))


# --- what the server answers -------------------------------------------------------------------------------


def test_fault_107_of_gradio_only_what_the_page_needs_is_there() -> None:
    needed = ("/", "/live", "/act", "/assets/x.js", "/gradio_api/queue/join", "/gradio_api/upload", "/runs/a/report")
    assert all(is_there(path) for path in needed)
    closed = ["file=/etc/passwd", "file/etc/passwd", "proxy=http://a.b", "call/predict", "run/predict", "api/predict"]
    closed += ["vibe-edit/", "process_recording", "run-history/connect", "deep_link", "stream/x", "component_server"]
    closed += ["custom_component/1/client/a/b.js", "../live", "queue/join/../../file=/etc/passwd"]
    ways = [
        *(f"/gradio_api/{one}" for one in closed),
        "/monitoring",
        "/login",
        "/docs",
        "/openapi.json",
        "/svelte/x",
        "/static/../x",
    ]
    assert [path for path in ways if is_there(path)] == []


def test_a_missing_gradio_is_one_line(tmp_path: Path) -> None:
    code = "import sys; sys.modules['gradio'] = None; from llm_finetune_kit.cli import page; sys.exit(page([]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 5
    assert "error[MACHINE-052]" in done.stderr and "pip install 'llm-finetune-kit[ui]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_fault_120_an_address_others_reach_needs_a_token(tmp_path: Path) -> None:
    from llm_finetune_kit.cli import main

    assert main(["ui", "--host", "0.0.0.0", "--port", "0"]) == 2
