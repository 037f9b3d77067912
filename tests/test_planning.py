"""Plans without a run: with nothing fetched that a plan has no use for, and also where the hub is out of reach."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from faces import ROOT, Done, finetune, start
from hub import Hub, one_layer
from llm_finetune_kit.config import RunConfig
from llm_finetune_kit.errors import ConfigError, MachineError
from llm_finetune_kit.events import Event, Noted
from llm_finetune_kit.plan import Plan
from llm_finetune_kit.planning import plan_run
from llm_finetune_kit.settings import load_config
from loopback import serving

TINYLLAMA = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
GATED = "meta-llama/Llama-3.2-1B-Instruct"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    source = ROOT.parent / "shared/data/models/stories260K-hf"
    if not source.is_dir():
        pytest.skip("the folder with real models is not here")
    model = one_layer(source, tmp_path_factory.mktemp("hub") / "served")
    with serving(Hub({TINYLLAMA: model, GATED: model}, gated={GATED})) as running:
        yield running


def ask(hub: Hub, place: Path, *words: str) -> tuple[Done, set[str]]:
    """A command with this hub, and the files it fetched from there."""
    hub.asked.clear()
    done = finetune(place, *words, environment=hub.environment | {"HF_HOME": str(place / "home")})
    assert done.code == 0, done.err
    return done, {path.rpartition("/")[2] for path in hub.asked if path.startswith("GET ") and "/resolve/" in path}


def test_a_plan_fetches_no_weights(hub: Hub, tmp_path: Path) -> None:
    words = ("--model", "tinyllama", "--data", "sample:chat")
    _, fetched = ask(hub, tmp_path, "plan", *words, "model.quantization=nf4")
    assert {"config.json", "tokenizer.json"} <= fetched and "model.safetensors" not in fetched
    assert ask(hub, tmp_path, "plan", *words)[1] == set(), "what is here is not fetched again"
    hub.asked.clear()
    code = "from llm_finetune_kit.models.locate import locate; print(locate('tinyllama').folder)"
    start([sys.executable, "-c", code], tmp_path, hub.environment | {"HF_HOME": str(tmp_path / "home")})
    assert any("model.safetensors" in path for path in hub.asked), "a run needs them, and what is here does not pass for whole"


def test_a_gated_model_of_the_catalog_is_planned_all_the_same(hub: Hub, tmp_path: Path) -> None:
    done, _ = ask(hub, tmp_path, "plan", "--model", "llama-3.2-1b", "--data", "sample:chat")
    assert "is gated, so its tokens cannot be counted: reckoned with the data's 16 examples" in " ".join(done.err.split())


def planned(config: RunConfig, **how: Any) -> tuple[Plan, list[str]]:
    said: list[Event] = []
    plan = plan_run(config, said.append, **how)
    return plan, [event.message for event in said if isinstance(event, Noted)]


@pytest.mark.parametrize("name", ["mistral_7b", "llama3_8b", "tinyllama_lora", "llama_7b_dialogue", "llama_13b_dialogue", "gpt2"])
def test_shipped_configs_are_planned_where_the_hub_is_out_of_reach(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_finetune_kit.data.prepare.read_source", _out_of_reach)
    config, _ = load_config(ROOT / f"configs/{name}.yaml")
    plan, notes = planned(config, on="A100-80")
    examples = f"{config.data.max_samples or 1000:,} examples"
    assert "the hub cannot be reached" in notes[0] and f"reckoned with {examples}" in notes[0]
    assert plan.steps == (config.training.max_steps or plan.steps) and plan.fits
    with pytest.raises(MachineError, match="cannot be reached"):
        planned(config, probed=True)
    with pytest.raises(MachineError, match="cannot be reached"):
        planned(config.with_values({"model.name": "nobody/nothing"}))


def test_rows_are_counted_and_tokens_estimated_where_the_tokenizer_is_out_of_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("llm_finetune_kit.material.locate", _out_of_reach)
    rows = [{"prompt": f"{index:>60}", "response": "b" * 339} for index in range(100)]  # with the line end between: 400
    file, texts = tmp_path / "rows.jsonl", tmp_path / "texts.txt"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    texts.write_text("c" * 10_000 + "\n", encoding="utf-8")
    config = RunConfig().with_values({"model.name": "tinyllama", "data.train_file": str(file)})
    plan, notes = planned(config, on="T4")
    assert plan.steps == 15, "3 epochs of 80 of the 100 rows, 16 to a step"
    assert "the data's 80 examples of 100 tokens on average, 85% of them learned, the longest of 100" in notes[0]
    assert "estimated from characters" in notes[0]
    (length,) = [choice for choice in plan.choices if choice.knob == "model.max_length"]
    assert length.value == 100 and "estimated" in length.reason and "nothing is cut" not in length.reason
    assert "50 tokens on average, 70% of them" in planned(config.with_values({"model.max_length": 50}), on="T4")[1][0]
    mixed = config.with_values({"data.train_file": None, "data.mix": {str(file): 1, "sample:chat": 1}})
    assert "the data's 32 examples" in planned(mixed, on="T4")[1][0]
    streamed = config.with_values({"data.streaming": True})
    assert "the data's 95 examples of 100 tokens on average" in planned(streamed, on="T4")[1][0]
    # 2,500 tokens in 3 windows, of which one is held out
    assert "the data's 2 examples of 834" in planned(config.with_values({"data.train_file": str(texts)}), on="T4")[1][0]


def _out_of_reach(*_: Any, **__: Any) -> None:
    raise MachineError(1, "it is not on this machine and the hub cannot be reached")


def test_a_config_is_planned_without_any_network(tmp_path: Path) -> None:
    words = ("plan", str(ROOT / "configs/tinyllama_lora.yaml"), "--on", "T4")
    done = finetune(tmp_path, *words, environment={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")})
    assert done.code == 0, done.err
    assert "cannot be reached, so its tokens cannot be counted" in " ".join(done.err.split())
    assert "Plan for T4 of 15 GiB" in done.out and "fp16" not in done.out and "float16" in done.out


@pytest.mark.parametrize("price", [-1.0, float("nan")])
def test_a_price_below_zero_is_refused(price: float) -> None:
    with pytest.raises(ConfigError, match="dollars an hour"):
        plan_run(RunConfig().with_values({"model.name": "gpt2"}), on="T4", price=price)


def test_settings_of_the_hub_are_told_to_be_idle_where_the_model_is_here() -> None:
    said: list[Event] = []
    plan_run(
        RunConfig().with_values({"model.name": "demo", "model.revision": "v1", "data.train_file": "sample:chat"}), said.append
    )
    assert any("model.revision will not be used: demo is no model of the hub" in str(event) for event in said)
