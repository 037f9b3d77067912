"""What all tests share: quiet threads, no network, caches in a temporary place, tiny real models."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from llm_finetune_kit.hardware import share_the_machine

if TYPE_CHECKING:
    from llm_finetune_kit.events import Event
    from llm_finetune_kit.run import Result

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for tests that it starts in the background
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # each of several processes has its own core
share_the_machine()  # as the program does; here torch is loaded before it


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_FINETUNE_KIT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Matrix products on one thread while the module's tests run: they compare bits."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class DemoRun:
    """`finetune demo`, done: the folder that holds `outputs/demo`, what it told, and its processor time in seconds."""

    place: Path
    result: Result
    told: list[Event]
    work: float


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> DemoRun:
    """One run for all tests that look at a finished one. Whoever changes its folder takes a copy."""
    from llm_finetune_kit.config import RunConfig, demo_values
    from llm_finetune_kit.run import run

    place = tmp_path_factory.mktemp("demo")
    told: list[Event] = []
    values = demo_values() | {"output.output_dir": str(place / "outputs")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLM_FINETUNE_KIT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        started = time.process_time()
        result = run(RunConfig().with_values(values), told.append)
        return DemoRun(place, result, told, time.process_time() - started)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data and models; tests that need them are skipped only where the folder does not exist."""
    if not SHARED.is_dir():
        pytest.skip("the folder with real data is not here")
    return SHARED


@pytest.fixture(scope="session")
def stories(shared: Path) -> Path:
    """A really trained Llama of 260,000 weights."""
    return shared / "models" / "stories260K-hf"
