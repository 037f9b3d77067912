"""No network, no home, a cache that cannot be written: what is on this machine works, and the rest is told."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from faces import ROOT, Done, finetune, start
from hub import Hub, one_layer
from loopback import serving

TINYLLAMA = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
FOUND = "from llm_finetune_kit.models.locate import locate; print(locate('tinyllama').folder)"

# Python imports this before anything else: whoever tries to reach another machine, or to ask for its address, ends at once.
NO_NETWORK = """\
import os, socket
def stop(*words, **_):
    os.write(2, f"A CONNECTION WAS TRIED: {words[-1]}".encode())
    os._exit(98)
class Closed(socket.socket):
    connect = connect_ex = stop
socket.socket = Closed
socket.getaddrinfo = socket.gethostbyname = stop
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    source = ROOT.parent / "shared/data/models/stories260K-hf"
    if not source.is_dir():
        pytest.skip("the folder with real models is not here")
    folder = tmp_path_factory.mktemp("hub")
    with serving(Hub({TINYLLAMA: one_layer(source, folder / "served")})) as running:
        yield running


@pytest.fixture
def closed(tmp_path: Path) -> dict[str, str]:
    """An environment in which no process may connect to anything; the hub's client believes that it may."""
    (tmp_path / "wall").mkdir()
    (tmp_path / "wall" / "sitecustomize.py").write_text(NO_NETWORK)
    path = f"{tmp_path / 'wall'}{os.pathsep}{ROOT / 'src'}"
    return {"PYTHONPATH": path, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": "http://10.255.255.1"}


def fetched(hub: Hub, home: Path) -> Path:
    done = start([sys.executable, "-c", FOUND], home.parent, hub.environment | {"HF_HOME": str(home)})
    assert done.code == 0, done.err
    return home


def test_the_wall_stops_a_connection(closed: dict[str, str], tmp_path: Path) -> None:
    code = "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9')"
    done = start([sys.executable, "-c", code], tmp_path, closed)
    assert done.code == 98 and "A CONNECTION WAS TRIED" in done.err


@pytest.mark.parametrize("words", [(), ("model.quantization=nf4",)])
def test_fault_131_a_local_model_is_trained_and_asked_without_one_attempt_to_connect(
    stories: Path, closed: dict[str, str], tmp_path: Path, words: tuple[str, ...]
) -> None:
    shutil.copytree(stories, tmp_path / "model")
    asked = ("--data", "sample:chat", "--max-steps", "2", "evaluation.generation.max_new_tokens=4", *words)
    done = finetune(tmp_path, "--model", "model", *asked, environment=closed)
    assert done.code == 0, done.err
    done = finetune(tmp_path, "eval", "outputs/final", "--data", "sample:chat", environment=closed)
    assert done.code == 0, done.err


def test_fault_131_a_model_of_the_cache_needs_no_connection(hub: Hub, closed: dict[str, str], tmp_path: Path) -> None:
    fetched(hub, tmp_path / "home")
    done = start([sys.executable, "-c", FOUND], tmp_path, closed)
    assert done.code == 0, done.err
    assert str(tmp_path / "home") in done.out


def test_fault_132_a_model_that_is_not_here_is_told_in_time_with_what_to_do(tmp_path: Path) -> None:
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = finetune(tmp_path, "--model", "tinyllama", "--data", "sample:chat", environment=offline)
    assert done.code == 5 and done.work < 3 and done.seconds < 30
    assert f"error[MACHINE-001] model.name: {TINYLLAMA} is not on this machine" in done.err
    assert "connect once to download it, give a local folder, or use the embedded model: --model demo" in done.err


BOUND = """\
import ctypes, os, sys
for right in (1, 2):  # to write and to read whatever the permissions say, which root may; the next program has lost both
    ctypes.CDLL(None).prctl(24, right, 0, 0, 0)
os.execv(sys.executable, [sys.executable, "-c", sys.argv[1]])
"""


def bound(code: str, folder: Path, environment: dict[str, str]) -> Done:
    """Run with permissions that hold for root too."""
    if not sys.platform.startswith("linux"):
        pytest.skip("only Linux can take rights from root")
    return start([sys.executable, "-c", BOUND, code], folder, environment)


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Callable[[Path], Path]]:
    """Makes a folder with all in it read-only, until the test ends."""
    folders: list[Path] = []

    def lock(folder: Path) -> Path:
        inside = [path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink()]
        folders.extend([folder, *inside])
        for path in [folder, *inside]:
            path.chmod(0o555)
        return folder

    yield lock
    for path in folders:
        path.chmod(0o755)


NOWHERE = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
REFUSED = """
from llm_finetune_kit.errors import MachineError
from llm_finetune_kit.models.locate import locate
try:
    locate('tinyllama')
except MachineError as error:
    print(error)
"""


def test_fault_133_a_model_is_found_in_a_cache_that_is_read_only(
    hub: Hub, tmp_path: Path, locked: Callable[[Path], Path]
) -> None:
    home = locked(fetched(hub, tmp_path / "home"))
    code = f"import os; assert not os.access({str(home)!r}, os.W_OK)\n{FOUND}"
    done = bound(code, tmp_path, NOWHERE | {"HF_HOME": str(home)})
    assert done.code == 0, done.err
    assert str(home) in done.out


def test_fault_133_a_read_only_cache_without_the_model_names_the_variable_to_set(
    hub: Hub, tmp_path: Path, locked: Callable[[Path], Path]
) -> None:
    (tmp_path / "home").mkdir()
    done = bound(REFUSED, tmp_path, hub.environment | {"HF_HOME": str(locked(tmp_path / "home"))})
    assert done.code == 0, done.err
    assert "error[MACHINE-002]" in done.out and f"{TINYLLAMA} cannot be stored" in done.out
    assert "model.cache_dir or HF_HOME" in done.out


def test_fault_133_without_a_home_the_demo_model_works_and_others_are_told(
    hub: Hub, tmp_path: Path, locked: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "empty").mkdir()
    nowhere = {"HOME": str(locked(tmp_path / "empty") / "nobody")}
    code = "from llm_finetune_kit.models.locate import locate; print(locate('demo').name)"
    done = bound(code, tmp_path, nowhere)
    assert done.code == 0 and done.out.strip() == "demo", done.err
    done = bound(REFUSED, tmp_path, hub.environment | nowhere)
    assert done.code == 0, done.err
    assert "error[MACHINE-002]" in done.out and "HF_HOME" in done.out
