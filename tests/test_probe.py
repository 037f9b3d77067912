"""A probe runs steps of the run's own order, in the real engine, and leaves everything as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llm_finetune_kit import probe as probing
from llm_finetune_kit.config import RunConfig
from llm_finetune_kit.data.batches import step_tokens
from llm_finetune_kit.events import Event, Noted
from llm_finetune_kit.material import Material, prepare_run
from llm_finetune_kit.models.loading import load_base
from llm_finetune_kit.planning import plan_run
from llm_finetune_kit.probe import probe, worst_passes

VALUES: dict[str, Any] = {
    "model.name": "demo", "data.train_file": "sample:chat", "training.batch_size": 4, "training.max_steps": 6,
    "training.gradient_accumulation_steps": 1, "training.threads": 1, "evaluation.generation.max_new_tokens": 4,
}  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(probing, "STEPS", 3)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    folder = tmp_path_factory.mktemp("probe")
    return prepare_run(RunConfig().with_values(VALUES | {"output.output_dir": str(folder)}))


def test_the_steps_are_those_that_the_run_will_have(material: Material) -> None:
    found = probe(material)
    steps = [step_tokens(material.train, 4, material.plan.config.training.seed, step) for step in (1, 2, 3)]
    assert found.steps == 3
    assert found.step_tokens == pytest.approx(sum(len(examples.ids) for examples in steps) / 3)
    assert found.step_targets == pytest.approx(sum(int(examples.targets.sum()) for examples in steps) / 3)
    assert found.step_examples == 4
    parts = (found.start, found.evaluation, found.answers, 3 * found.step_seconds)
    assert all(part > 0 for part in parts)
    assert 3 * found.step_seconds < found.seconds
    assert found.peak_memory > 10**8


def test_a_loaded_model_keeps_its_weights(material: Material) -> None:
    base = load_base(material.located, "bfloat16", "cpu")
    before = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    probe(material, base)
    after = {name.replace(".base_layer", ""): parameter for name, parameter in base.named_parameters()}
    assert all(torch.equal(after[name], was) for name, was in before.items())


def test_the_worst_step_has_the_longest_rows(material: Material) -> None:
    (work,) = worst_passes(material.train, 2, 10**6, packing=True)
    longest = sorted(material.train.lengths.tolist())[-2:]
    assert 0 <= sum(longest) - work.tokens <= 2 * max(longest) and max(work.lengths) < max(longest)
    assert len(worst_passes(material.train, 8, 1, packing=True)) == probing.PASSES


def test_a_probed_plan_tells_what_it_stands_on(tmp_path: Path) -> None:
    told: list[Event] = []
    plan = plan_run(RunConfig().with_values(VALUES | {"output.output_dir": str(tmp_path / "out")}), told.append, probed=True)
    assert plan.time["source"] == "3 steps measured on this machine"
    assert any(isinstance(event, Noted) and event.message.startswith("probed in") for event in told)
    assert not (tmp_path / "out").exists()
