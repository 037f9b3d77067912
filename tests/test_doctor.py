"""The doctor finds what is wrong, names the fix, is quick, and touches neither torch nor the network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from faces import ROOT, start
from hub import Hub
from llm_finetune_kit.doctor import Check, examine, machine, places, software
from loopback import serving

EXAMINE = """\
import json, sys
from dataclasses import asdict
from pathlib import Path
from llm_finetune_kit.doctor import examine
found = examine(Path(sys.argv[1]), online="online" in sys.argv, deep="deep" in sys.argv)
print(json.dumps([asdict(check) for check in found]))
print(json.dumps(sorted({"torch", "transformers", "bitsandbytes"} & set(sys.modules))))
"""


def examined(folder: Path, environment: dict[str, str], *words: str) -> dict[str, Check]:
    """What the doctor says in a process of its own."""
    done = start([sys.executable, "-c", EXAMINE, str(folder / "out"), *words], folder, environment)
    assert done.code == 0, done.err
    checks = [Check(**check) for check in json.loads(done.out.splitlines()[0])]
    return {check.name: check for check in checks}


def installed(folder: Path, body: str, *, library: bytes | None = None, lost: bool = False) -> dict[str, str]:
    """A bitsandbytes that is found before the real one, by its environment; with `lost` a file of it is not there."""
    package, records = folder / "bitsandbytes", folder / "bitsandbytes-9.9.dist-info"
    for place in (package, records):
        place.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").write_text(body)
    if library is not None:
        (package / "libbitsandbytes_cpu.so").write_bytes(library)
    (records / "METADATA").write_text("Metadata-Version: 2.1\nName: bitsandbytes\nVersion: 9.9\n")
    written = [f"bitsandbytes/__init__.py,,{len(body)}"] + ["bitsandbytes/nn.py,,100"] * lost
    (records / "RECORD").write_text("\n".join(written))
    return {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT / 'src'}"}


def a_library() -> bytes:
    """Some compiled library that loads."""
    import safetensors

    return next(Path(safetensors.__file__).parent.glob("*.so")).read_bytes()


@pytest.mark.alone
def test_a_sound_machine_is_found_sound_without_torch_or_the_network(tmp_path: Path) -> None:
    with serving(Hub({})) as hub:
        done = start([sys.executable, "-c", EXAMINE, str(tmp_path / "out")], tmp_path, hub.environment)
    found = {check["name"]: Check(**check) for check in json.loads(done.out.splitlines()[0])}
    assert {"python", "packages", "gpu", "bfloat16", "threads", "memory", "disk", "output", "file system", "hub", "torch"} <= set(
        found
    )
    assert [check for check in found.values() if check.status == "fail"] == []
    assert all(check.finding for check in found.values())
    assert all(check.fix for check in found.values() if check.status != "ok"), "each complaint comes with what to do"
    assert hub.asked == [], "no connection is made unless asked for"
    assert not (tmp_path / "out").exists() and list(tmp_path.glob(".tmp*")) == [], "nothing is left behind"
    if not Path("/proc/driver/nvidia").exists() and not Path("/dev/kfd").exists():  # with a GPU, torch is asked about it
        assert json.loads(done.out.splitlines()[1]) == [], "torch is imported in a child only"
    assert "its library loads" in found["torch"].finding
    assert done.work < 2.5, "seconds of all its processes: an import of torch and bitsandbytes takes four"


def test_the_hub_is_asked_when_wanted(tmp_path: Path) -> None:
    ask = [sys.executable, "-c", "from llm_finetune_kit.doctor.places import hub; print(hub(True))"]
    with serving(Hub({})) as hub:
        answer = start(ask, tmp_path, hub.environment).out
        assert "'ok'" in answer and f"{hub.url} answers" in answer
        assert hub.asked != []
    silent = start(ask, tmp_path, hub.environment).out
    assert "'warn'" in silent and "does not answer" in silent and "HTTPS_PROXY" in silent
    assert "unset HF_HUB_OFFLINE" in start(ask, tmp_path, {"HF_HUB_OFFLINE": "1"}).out


def test_a_look_that_fails_is_a_finding_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def memory() -> Check:
        raise RuntimeError("no such luck")

    monkeypatch.setattr("llm_finetune_kit.doctor.LOOKS", (memory,))
    found = {check.name: check for check in examine(tmp_path)}
    assert found["memory"].status == "warn" and "no such luck" in found["memory"].finding


def test_a_whole_package_is_imported_only_when_asked(tmp_path: Path) -> None:
    place = installed(tmp_path, "open('imported', 'w')", library=a_library())
    found = examined(tmp_path, place)["bitsandbytes"]
    assert found == Check("bitsandbytes", "ok", "9.9, whole, and its library loads")
    assert not (tmp_path / "imported").exists()
    torch = tmp_path / "torch.py"  # the real one would take its time
    torch.write_text("")
    assert examined(tmp_path, place, "deep")["bitsandbytes"] == Check("bitsandbytes", "ok", "9.9 can be imported")
    assert (tmp_path / "imported").exists()


def test_a_library_that_does_not_load_is_told_by_the_import(tmp_path: Path) -> None:
    place = installed(tmp_path, "raise OSError('libcudart.so.12: cannot open')", library=b"not a library")
    found = examined(tmp_path, place)["bitsandbytes"]
    assert found.status == "warn" and "broken" in found.finding and "libcudart" in found.finding
    assert found.fix == "pip install --force-reinstall bitsandbytes"


def test_a_package_that_crashes_at_import_is_told(tmp_path: Path) -> None:
    found = examined(tmp_path, installed(tmp_path, "import os; os._exit(7)"))["bitsandbytes"]
    assert found.status == "warn" and "code 7" in found.finding


def test_lost_files_are_told_also_where_the_import_does_without_them(tmp_path: Path) -> None:
    found = examined(tmp_path, installed(tmp_path, "", library=a_library(), lost=True))["bitsandbytes"]
    assert found.status == "warn"
    assert found.finding == "9.9 can be imported, but 1 of its files are not as installed (bitsandbytes/nn.py)"


def test_an_import_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sleeper.py").write_text("import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(software, "PATIENCE", 0.5)
    child = software._child([("sleeper", "")])
    state, why = software._fates(child)["sleeper"]
    assert state == "broken" and "longer than" in why
    assert child.returncode is not None


def test_threads_left_idle_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "allowed_cores", lambda: 4)
    monkeypatch.setattr(machine, "_cpu_quota", lambda: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert machine.threads().fix == "unset OMP_NUM_THREADS, or set training.threads=4"
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert machine.threads().status == "ok"
    monkeypatch.setattr(machine, "_cpu_quota", lambda: 1.5)
    assert "training.threads=1" in machine.threads().fix
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert machine.threads().status == "ok", "more would share what the container may use"


def test_little_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, status in ((0, "ok"), (1 << 60, "warn")):
        monkeypatch.setattr(places, "LITTLE_DISK", limit)
        assert places.disk(tmp_path / "not" / "there").status == status
    monkeypatch.setattr(places, "NO_DISK", 1 << 60)
    assert places.disk(tmp_path).status == "fail"


def test_little_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "GB are free" in machine.memory().finding
    monkeypatch.setattr(machine, "LITTLE_MEMORY", 1e18)
    assert (machine.memory().status, "finetune plan" in machine.memory().fix) == ("warn", True)


def test_temporary_files_and_caches_that_cannot_be_written_are_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    wrong = str(tmp_path / "file" / "below")
    variables = {"TMPDIR": wrong, "HF_HOME": "/proc/nowhere", "LLM_FINETUNE_KIT_CACHE": "/proc/nowhere", "HOME": "/proc/nowhere"}
    found = examined(tmp_path, variables)
    for name, variable in (
        ("temporary files", "TMPDIR"),
        ("hub cache", "HF_HOME"),
        ("cache", "LLM_FINETUNE_KIT_CACHE"),
        ("home", "HF_HOME"),
    ):
        assert found[name].status == "warn", name
        assert variable in found[name].fix + found[name].finding


def test_what_torch_was_built_for_is_read_without_importing_it() -> None:
    code = (
        "import sys; from llm_finetune_kit.doctor.machine import _torch_build; build = _torch_build(); "
        "assert 'torch' not in sys.modules; import torch; assert build == {'cuda': torch.version.cuda, 'hip': torch.version.hip}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
