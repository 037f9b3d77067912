"""What a machine has, and what a machine that is only named would have."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llm_finetune_kit import hardware
from llm_finetune_kit.errors import MachineError
from llm_finetune_kit.gpus import GPUS, gpu_named
from llm_finetune_kit.hardware import machine_named, this_machine


def test_this_machine_is_known(tmp_path: Path) -> None:
    machine = this_machine(tmp_path / "not" / "there" / "yet")
    assert 0 < machine.free_memory <= machine.memory
    assert machine.cores >= 1 and machine.free_disk > 0
    assert machine.why_bfloat16


@pytest.mark.skipif(hardware._may_have_gpu(), reason="a GPU's driver is here")
def test_a_plain_cpu_is_asked_without_torch() -> None:
    code = "import sys; from llm_finetune_kit.hardware import this_machine as t; m = t(); print(m.kind, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["cpu", "False"]


def test_a_cpu_without_bfloat16_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "cpu_bfloat16", lambda: ("", "the CPU has neither amx_bf16 nor avx512_bf16"))
    monkeypatch.setattr(hardware, "_may_have_gpu", lambda: False)
    machine = this_machine()
    assert not machine.bfloat16 and machine.rates is not None
    assert machine.rates.narrow == machine.rates.float32


@pytest.mark.parametrize("name", GPUS)
def test_every_gpu_of_the_table_is_found_by_its_name(name: str) -> None:
    machine = machine_named(name)
    assert machine.name == f"{name} of {GPUS[name].memory:g} GiB" and machine.kind == "cuda" and machine.rates is not None
    assert machine.memory > 7e9 and machine.rates.narrow > 1e13


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("rtx4090", "RTX 4090"),
        ("4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 3060", "RTX 3060"),
        ("Tesla T4", "T4"),
        ("a100", "A100-40"),
        ("A100 80GB", "A100-80"),
        ("h200", "H200"),
        ("m2 max 32GB", "Apple M2 Max 32GB"),
    ],
)
def test_names_as_people_write_them(asked: str, name: str) -> None:
    assert gpu_named(asked).name == name


@pytest.mark.parametrize(("driver", "memory", "name"), [("NVIDIA A100-SXM4-80GB", 85e9, "A100-80"), ("Tesla T4", 16e9, "T4")])
def test_a_drivers_name_finds_its_row(driver: str, memory: float, name: str) -> None:
    rates, price = hardware._known_rates(driver, int(memory), 8)
    assert rates is not None and rates.source.startswith(name) and price == GPUS[name].price


def test_a_driver_name_that_the_table_lacks_has_no_speed() -> None:
    assert hardware._known_rates("NVIDIA Graphics Device", 8 * 10**9, 8) == (None, None)


def test_a_named_cpu_has_the_memory_it_is_given() -> None:
    machine = machine_named("cpu 16GB")
    assert machine.kind == "cpu" and machine.memory == 16 * 2**30 and machine.free_memory < machine.memory


def test_apple_shares_its_memory() -> None:
    machine = machine_named("M2 Max 32GB")
    assert machine.kind == "mps" and machine.memory == 24 * 2**30


def test_an_unknown_machine_is_refused_with_the_nearest_names() -> None:
    with pytest.raises(MachineError) as caught:
        machine_named("RTX 4900")
    assert caught.value.code == "MACHINE-021"
    assert "did you mean RTX 4090" in caught.value.fix


def test_prices_are_dollars_an_hour_or_nothing() -> None:
    assert all(gpu.price is None or 0.05 < gpu.price < 20 for gpu in GPUS.values())
    assert machine_named("T4").price == GPUS["T4"].price


@pytest.mark.parametrize(
    ("asked", "found"),
    [({}, "2000 48 1"), ({"GOMP_SPINCOUNT": "7"}, "7 48 1"), ({"OMP_WAIT_POLICY": "active"}, "None 48 1")],
)
def test_waiting_threads_soon_sleep_unless_the_environment_says_otherwise(asked: dict[str, str], found: str) -> None:
    code = "import os; from llm_finetune_kit.hardware import share_the_machine as share; share(); " + (
        "print(*(os.environ.get(name) for name in ('GOMP_SPINCOUNT', 'ONEDNN_PRIMITIVE_CACHE_CAPACITY', 'LRU_CACHE_CAPACITY')))"
    )
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    env = {name: value for name, value in os.environ.items() if name not in names} | asked
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.strip() == found


def test_a_command_sets_that_before_torch_is_loaded() -> None:
    code = "import os; from llm_finetune_kit.cli import guarded; guarded(lambda: 0); print(os.environ.get('GOMP_SPINCOUNT'))"
    env = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.strip() == "2000"
