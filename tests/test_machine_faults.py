"""FAULTS 134 to 140: what can be wrong with the machine and what is around the program."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from faces import FINETUNE, Done, finetune, start
from llm_finetune_kit.doctor import machine, places, software
from llm_finetune_kit.errors import MachineError
from test_doctor import examined

SHORT = ["--model", "demo", "--data", "sample:chat", "--max-steps", "1", "--run-name", "short", "training.batch_size=2"]
QUICK = ["training.gradient_accumulation_steps=1", "evaluation.generation.max_new_tokens=4"]


def unshared(folder: Path, prepare: str, *words: str) -> Done:
    """Run a command where `prepare`, a line of shell, has changed the mounts for it alone."""
    if start(["unshare", "-m", "true"], folder).code if shutil.which("unshare") else True:
        pytest.skip("mounts cannot be unshared here")
    return start(["unshare", "-m", "sh", "-c", f'{prepare} && exec "$@"', "sh", *words], folder)


# --- 134 ---------------------------------------------------------------------------------------------------


def test_fault_134_output_that_cannot_be_written_is_found_before_the_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    done = unshared(tmp_path, "mount -t tmpfs -o ro tmpfs out", *FINETUNE, *SHORT, "--output-dir", "out/runs")
    assert done.code == 5
    assert "error[MACHINE-" in done.err and f"{tmp_path / 'out'}" in done.err and "fix:" in done.err
    assert "loading" not in done.out + done.err
    assert "Traceback" not in done.err


def test_fault_134_the_doctor_names_output_that_cannot_be_written(tmp_path: Path) -> None:
    found = places.output(Path("/proc/runs"))
    assert (found.status, found.fix) == ("fail", "choose another: --output-dir FOLDER")


# --- 135 ---------------------------------------------------------------------------------------------------

# as if the package had never been installed: the finder of files does not see it
ABSENT = """\
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec.__func__
def blind(cls, name, path=None, target=None):
    return None if name.partition(".")[0] == "bitsandbytes" else find(cls, name, path, target)
PathFinder.find_spec = classmethod(blind)
"""


@pytest.fixture
def without_extras(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "blind").mkdir()
    (tmp_path / "blind" / "sitecustomize.py").write_text(ABSENT)
    source = Path(__file__).resolve().parents[1] / "src"
    return {"PYTHONPATH": f"{tmp_path / 'blind'}{os.pathsep}{source}"}


def test_fault_135_a_missing_extra_is_one_line_with_its_purpose_and_the_command(
    tmp_path: Path, without_extras: dict[str, str]
) -> None:
    found = examined(tmp_path, without_extras)["bitsandbytes"]
    assert found.status == "warn"
    assert found.finding == "not installed; it is for 4- and 8-bit weights (QLoRA) and 8-bit optimizers"
    assert found.fix == 'pip install "llm-finetune-kit[quantization]"'


def test_fault_135_a_run_that_needs_a_missing_extra_says_how_to_get_it(tmp_path: Path, without_extras: dict[str, str]) -> None:
    done = finetune(tmp_path, *SHORT, *QUICK, "model.quantization=nf4", environment=without_extras)
    assert done.code == 5, done.err
    assert "bitsandbytes" in done.err and "pip install" in done.err and "[quantization]" in done.err
    assert "Traceback" not in done.err


def test_fault_135_other_commands_work_without_the_extras(tmp_path: Path, without_extras: dict[str, str]) -> None:
    for words in (["models", "--json"], ["plan", "--model", "demo", "--data", "sample:chat", "--json"], [*SHORT, *QUICK]):
        done = finetune(tmp_path, *words, environment=without_extras)
        assert done.code == 0, done.err


# --- 136 ---------------------------------------------------------------------------------------------------


def installed(folder: Path, package: str, version: str) -> None:
    """As far as the records of installed packages tell."""
    records = folder / f"{package}-{version}.dist-info"
    records.mkdir(parents=True)
    (records / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")


def test_fault_136_versions_out_of_range_are_told_with_found_and_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    software.check_versions()  # this environment is sound
    for package, version in (("torch", "1.13.1"), ("transformers", "4.45.0"), ("peft", "0.7.0")):
        installed(tmp_path, package, version)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(MachineError) as caught:
        software.check_versions()
    for words in ("torch 1.13.1, needed >=", "transformers 4.45.0, needed >=", "peft 0.7.0, needed >="):
        assert words in caught.value.problem
    assert caught.value.fix.startswith("pip install ") and '"torch>=' in caught.value.fix
    assert "numpy" not in caught.value.fix
    found = software.packages()
    assert (found.status, found.finding, found.fix) == ("fail", caught.value.problem, caught.value.fix)


def test_fault_136_local_and_early_versions_in_range_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(tmp_path, "torch", "99.0.0.dev20300101+cu130")
    monkeypatch.syspath_prepend(str(tmp_path))
    torch = next(need for need in software.needs() if need.package == "torch")
    assert (torch.found, torch.fits) == ("99.0.0.dev20300101+cu130", True)


# --- 137 ---------------------------------------------------------------------------------------------------


@pytest.fixture
def nvidia(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts an nvidia-smi on the PATH that says what a real one would, and takes torch for one built with CUDA."""

    def says(line: str, *, code: int = 0, cuda: str | None = "12.8") -> None:
        script = tmp_path / "nvidia-smi"
        script.write_text(f"#!/bin/sh\necho '{line}'\nexit {code}\n")
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setattr(machine, "_torch_build", lambda: {"cuda": cuda, "hip": None})
        monkeypatch.setattr(machine, "_kernel_driver", lambda: None)

    return says


def test_fault_137_a_sound_gpu_is_named(nvidia: Callable[..., None]) -> None:
    nvidia("Tesla T4, 535.104.05, 3, 15360")
    assert machine.gpu() == machine.Check("gpu", "ok", "Tesla T4, driver 535.104.05, CUDA 12.8")


def test_fault_137_an_old_driver_is_told(nvidia: Callable[..., None]) -> None:
    nvidia("Tesla T4, 470.82.01, 3, 15360")
    found = machine.gpu()
    assert found.status == "fail"
    assert found.finding == "driver 470.82.01 is too old for CUDA 12.8 of this torch, which needs 525.60"
    assert "install driver 525.60 or newer" in found.fix
    nvidia("Tesla T4, 570.10, 3, 15360", cuda="13.0")
    assert "needs 580.65" in machine.gpu().finding


def test_fault_137_torch_without_cuda_is_told(nvidia: Callable[..., None]) -> None:
    nvidia("Tesla T4, 535.104.05, 3, 15360", cuda=None)
    assert (machine.gpu().status, machine.gpu().fix) == ("warn", machine.CUDA_TORCH)


def test_fault_137_a_busy_gpu_is_told(nvidia: Callable[..., None]) -> None:
    nvidia("Tesla T4, 535.104.05, 14000, 15360")
    assert machine.gpu().status == "warn" and "14,000 of 15,360 MB" in machine.gpu().finding
    nvidia("Tesla T4, 535.104.05, 14000, 15360\nTesla T4, 535.104.05, 0, 15360")
    assert machine.gpu().status == "ok", "there is a free one"


def test_fault_137_a_gpu_that_is_hidden_or_does_not_answer_is_told(
    nvidia: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia("NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver.", code=9)
    assert machine.gpu().status == "warn" and "could not communicate" in machine.gpu().finding
    nvidia("Tesla T4, 535.104.05, 3, 15360")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert machine.gpu().fix == "unset CUDA_VISIBLE_DEVICES"


def test_fault_137_a_gpu_without_bfloat16_is_told_without_torch(nvidia: Callable[..., None]) -> None:
    nvidia("7.5")
    assert machine.bfloat16().status == "warn"
    assert machine.bfloat16().finding.startswith("compute capability 7.5; 8.0 is needed")
    nvidia("8.6")
    assert machine.bfloat16() == machine.Check("bfloat16", "ok", "compute capability 8.6")
    nvidia("9.0", cuda=None)
    assert "CPU" in machine.bfloat16().finding, "this torch trains on the processor"


# --- 138, and the CPU path of 137 --------------------------------------------------------------------------


def test_fault_137_and_138_few_handles_tiny_shared_memory_and_a_broken_driver(tmp_path: Path) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    poor = f"mount -t tmpfs -o size=64k tmpfs /dev/shm && ulimit -n 64 && PATH={tmp_path}:$PATH"
    done = unshared(tmp_path, poor, *FINETUNE, *SHORT, *QUICK)
    assert done.code == 0, done.err
    assert (tmp_path / "outputs" / "short" / "final" / "adapter_model.safetensors").is_file()


def test_fault_138_the_doctor_tells_few_handles_and_tiny_shared_memory(tmp_path: Path) -> None:
    code = "from llm_finetune_kit.doctor.machine import *; print(file_handles()); print(shared_memory())"
    poor = "mount -t tmpfs -o size=64k tmpfs /dev/shm && ulimit -n 64"
    handles, shared = unshared(tmp_path, poor, sys.executable, "-c", code).out.splitlines()
    assert "only 64 files" in handles and "ulimit -n 1024" in handles
    assert "'warn'" in shared and "--shm-size" in shared


def test_fault_138_locale_c_an_odd_time_zone_and_a_path_with_spaces_and_signs(tmp_path: Path) -> None:
    folder = tmp_path / "mein ordner ü 模型 's"
    folder.mkdir()
    odd = {"LC_ALL": "C", "LANG": "C", "TZ": "Pacific/Chatham"}
    done = finetune(folder, *SHORT, *QUICK, "--output-dir", "aus gabe é", environment=odd)
    assert done.code == 0, done.err
    assert (folder / "aus gabe é" / "short" / "report.html").is_file()
    assert examined(tmp_path, odd | {"PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"})["encoding"].fix == "export PYTHONUTF8=1"


# --- 139 ---------------------------------------------------------------------------------------------------


def test_fault_139_warnings_as_errors_and_other_hash_seeds_give_the_same_adapter(tmp_path: Path) -> None:
    digests = set()
    for switches, seed in (([], "0"), (["-W", "error"], "4711")):
        folder = tmp_path / seed
        folder.mkdir()
        command = [sys.executable, *switches, "-m", "llm_finetune_kit", *SHORT, *QUICK]
        done = start(command, folder, {"PYTHONHASHSEED": seed})
        assert done.code == 0, done.err
        adapter = folder / "outputs" / "short" / "final" / "adapter_model.safetensors"
        digests.add(hashlib.sha256(adapter.read_bytes()).hexdigest())
    assert len(digests) == 1


# --- 140 ---------------------------------------------------------------------------------------------------


def test_fault_140_locks_and_renames_are_tried_and_leave_nothing(tmp_path: Path) -> None:
    assert places.file_system_fault(tmp_path / "not" / "there yet") is None
    places.check_file_system(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "call, trouble, told",
    [
        ("fcntl.flock", errno.ENOLCK, "files cannot be locked"),
        ("fcntl.flock", errno.EOPNOTSUPP, "files cannot be locked"),
        ("os.replace", errno.EXDEV, "folders cannot be renamed"),
        ("os.fsync", errno.EIO, "files cannot be written and synced"),
    ],
)
def test_fault_140_a_file_system_without_locks_or_renames_is_refused(
    call: str, trouble: int, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError(trouble, os.strerror(trouble))

    monkeypatch.setattr(call, fails)
    found = places.file_system(tmp_path)
    assert found.status == "fail" and found.finding == f"{told}: {os.strerror(trouble)}" and "local disk" in found.fix
    with pytest.raises(MachineError, match=told) as caught:
        places.check_file_system(tmp_path)
    assert caught.value.exit_code == 5
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def test_fault_140_a_lock_that_keeps_nobody_out_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fcntl.flock", lambda *_: None)
    assert places.file_system_fault(tmp_path) == "files cannot be locked: a second process would be let in"
