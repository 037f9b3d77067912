"""Models from the hub: fetched once, found again without a network, and clear words when they cannot be had."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from faces import FINETUNE, ROOT, Done, finetune, start
from hub import COMMIT, Hub, one_layer
from llm_finetune_kit.cli import main
from llm_finetune_kit.events import Stepped
from llm_finetune_kit.folder import RunFolder
from loopback import serving
from test_machine_faults import unshared

TINYLLAMA = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
GATED = "meta-llama/Llama-3.2-1B-Instruct"
SHORT = "evaluation.generation.max_new_tokens=4"
TRAIN = ("--model", "tinyllama", "--data", "sample:chat", "--max-steps", "2", SHORT, "--run-name")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def hub(place: Path) -> Iterator[Hub]:
    source = ROOT.parent / "shared/data/models/stories260K-hf"
    if not source.is_dir():
        pytest.skip("the folder with real models is not here")
    model = one_layer(source, place / "served")
    with serving(Hub({TINYLLAMA: model, GATED: model}, gated={GATED})) as running:
        yield running


def ask(hub: Hub, place: Path, *words: str, light: bool = False) -> tuple[Done, list[str]]:
    """A command with this hub, and what it asked of it."""
    hub.asked.clear()
    done = finetune(place, *words, environment=hub.environment | {"HF_HOME": str(place / "home")}, light=light)
    assert "Traceback" not in done.err
    return done, list(hub.asked)


@pytest.fixture(scope="module")
def first(hub: Hub, place: Path) -> tuple[Done, list[str]]:
    return ask(hub, place, *TRAIN, "first")


def test_a_known_name_is_downloaded_and_trained(first: tuple[Done, list[str]], place: Path) -> None:
    done, asked = first
    assert done.code == 0, done.err
    assert (place / "outputs/first/final/adapter_model.safetensors").is_file()
    fetched = {path.rpartition("/")[2] for path in asked if path.startswith(f"GET /{TINYLLAMA}/resolve/{COMMIT}/")}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= fetched
    assert "pytorch_model.bin" not in fetched, "pickles are not even fetched"
    assert [path for path in asked if TINYLLAMA not in path] == [], "nothing but the model is asked for: no telemetry"
    assert "it/s" not in done.err, "no bars of libraries outside a terminal"


def test_the_adapter_names_the_hub_id_and_the_run_no_place_on_this_machine(first: tuple[Done, list[str]], place: Path) -> None:
    run = place / "outputs/first"
    for folder in (run / "final", run / "checkpoint-2"):
        assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == TINYLLAMA
    texts = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert len(texts) > 15
    for secret in (str(place), str(Path.home()) + "/", str(ROOT)):
        assert [str(path.relative_to(run)) for path, raw in texts.items() if secret.encode() in raw] == []


def test_a_run_with_a_local_model_holds_its_place_in_adapter_config_only(
    hub: Hub, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    assert main(["--model", "served", "--data", "sample:chat", "--max-steps", "1", "--run-name", "local"]) == 0
    run = place / "outputs/local"
    named = {path.name for path in run.rglob("*") if path.is_file() and str(place).encode() in path.read_bytes()}
    assert named == {"adapter_config.json"}, "plain PEFT has to find the base there"


def test_fault_131_a_model_that_is_here_is_used_without_asking_anybody(
    first: tuple[Done, list[str]], hub: Hub, place: Path
) -> None:
    hub.asked.clear()
    code = "from llm_finetune_kit.models.locate import locate; print(locate('tinyllama').folder)"
    done = start([sys.executable, "-c", code], place, hub.environment | {"HF_HOME": str(place / "home")})
    assert done.code == 0 and COMMIT in done.out
    assert hub.asked == []


def test_a_repository_that_the_hub_does_not_have_is_told(hub: Hub, place: Path) -> None:
    done, _ = ask(hub, place, "--model", "nobody/nothing", "--data", "sample:chat")
    assert done.code == 4
    assert "error[MODEL-002] model.name: the hub has no model nobody/nothing" in done.err
    assert "fix:  check the spelling; private models need HF_TOKEN" in done.err
    assert done.work < 3  # an import of torch would take longer


def test_a_gated_repository_is_told_with_its_page(hub: Hub, place: Path) -> None:
    done, _ = ask(hub, place, "--model", "llama-3.2-1b", "--data", "sample:chat")
    assert done.code == 4
    assert f"error[MODEL-003] model.name: {GATED} is gated" in done.err
    assert f"accept its licence on {hub.url}/{GATED} and set HF_TOKEN" in done.err
    assert done.work < 3  # an import of torch would take longer


def test_a_revision_that_is_not_there_is_told(hub: Hub, place: Path) -> None:
    done, _ = ask(hub, place, "--model", "tinyllama", "--data", "sample:chat", "model.revision=v9")
    assert done.code == 4
    assert f"model.revision: {TINYLLAMA} has no revision v9" in done.err


@pytest.mark.parametrize(
    "name", ["a/b/c", "../x", "~/x", "owner/", "/nowhere", "a b/c", "own--er/x", "x" * 5000, "owner/" + "x" * 500]
)
def test_a_name_that_cannot_be_is_told_without_the_hub(name: str, hub: Hub, place: Path) -> None:
    from llm_finetune_kit.errors import KitError, ModelError
    from llm_finetune_kit.models.locate import check_name

    with pytest.raises(ModelError) as caught:
        check_name(name)
    assert isinstance(caught.value, KitError) and caught.value.fix


def test_fault_132_the_second_run_needs_no_hub_and_a_new_model_is_told_at_once(
    first: tuple[Done, list[str]], hub: Hub, place: Path
) -> None:
    with socket.socket() as free:  # a port on which nobody listens
        free.bind(("127.0.0.1", 0))
        nobody = Hub({}, url=f"http://127.0.0.1:{free.getsockname()[1]}")
        done, _ = ask(nobody, place, *TRAIN, "second")
        assert done.code == 0, done.err
        losses = [
            [event.loss for event in RunFolder(place / "outputs" / run).replay() if isinstance(event, Stepped)]
            for run in ("first", "second")
        ]
        assert losses[0] == losses[1] and len(losses[0]) == 2
        done, _ = ask(nobody, place, "--model", "gpt2", "--data", "sample:chat")
    assert done.code == 5 and done.work < 3 and done.seconds < 30
    assert "error[MACHINE-001] model.name: openai-community/gpt2 is not on this machine and the hub cannot be reached" in done.err
    assert "why:  [Errno 111] Connection refused" in done.err
    assert "--model demo" in done.err


def test_fault_132_a_network_that_swallows_everything_is_noticed(place: Path) -> None:
    """A full backlog drops new connections, as a firewall does; the hub's own client would wait for minutes."""
    with socket.socket() as full, socket.socket() as one, socket.socket() as two, socket.socket() as three:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for other in (one, two, three):
            other.setblocking(False)
            other.connect_ex(full.getsockname())
        done, _ = ask(Hub({}, url=f"http://127.0.0.1:{full.getsockname()[1]}"), place, "--model", "gpt2", "--data", "sample:chat")
    assert done.code == 5 and "the hub cannot be reached" in done.err and "timed out" in done.err
    assert done.seconds < 60  # of which it waits for four


def test_fault_133_a_cache_that_cannot_be_written_is_told(hub: Hub, place: Path) -> None:
    (place / "wall").write_text("a file where a folder is due")
    done, _ = ask(hub, place, "--model", "tinyllama", "--data", "sample:chat", f"model.cache_dir={place}/wall/inside")
    assert done.code == 5, done.err
    assert "error[MACHINE-00" in done.err


def test_fault_133_a_full_cache_is_told(hub: Hub, place: Path) -> None:
    (place / "tiny").mkdir()
    variables = [f"{name}={value}" for name, value in (hub.environment | {"HF_HOME": str(place / "tiny")}).items()]
    words = ("--model", "tinyllama", "--data", "sample:chat")
    done = unshared(place, "mount -t tmpfs -o size=64k tmpfs tiny", "env", *variables, *FINETUNE, *words)
    assert done.code == 5, done.err
    assert f"error[MACHINE-002] {place / 'tiny'}" in done.err and "No space left" in done.err
    assert "model.cache_dir or HF_HOME" in done.err and "Traceback" not in done.err
