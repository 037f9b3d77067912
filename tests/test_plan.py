"""The plan decides what is open, keeps what was asked, and never lets a run begin that cannot fit."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from faces import start
from llm_finetune_kit.config import RunConfig
from llm_finetune_kit.errors import ConfigError, MachineError
from llm_finetune_kit.hardware import Machine, machine_named
from llm_finetune_kit.models.facts import facts_by_name
from llm_finetune_kit.plan import DataFacts, Plan, compare, fits, make_plan
from llm_finetune_kit.plan.decisions import sampling
from llm_finetune_kit.plan.speed import Measured, Rates

DATA = DataFacts(examples=1000, held_out=50, tokens=234_000, target_tokens=170_000, longest=512)
CPU = Machine("cpu", "a CPU", 4, 16 * 10**9, 14 * 10**9, 10**11, True, "it has amx_bf16", Rates(2e11, 8e11, 4, "a test"))


def plan(name: str, machine: Any = CPU, data: DataFacts = DATA, *, options: dict[str, Any] | None = None, **values: Any) -> Plan:
    config = RunConfig().with_values({"model.name": name} | {key.replace("__", "."): value for key, value in values.items()})
    return make_plan(config, machine, facts_by_name(name), data, **(options or {}))


def chosen(made: Plan, knob: str) -> Any:
    return next(choice.value for choice in made.choices if choice.knob == knob)


KNOBS = (
    "model.dtype", "model.quantization", "model.max_length", "lora.r", "lora.target_modules", "training.tokens_per_pass",
    "training.gradient_checkpointing", "training.optimizer", "attention", "training.threads",
)  # fmt: skip


def test_each_known_model_has_its_rank() -> None:
    """R1: the rank comes from the registry; R4: rank 8 with strength 16 for LLaMA."""
    llama = plan("huggyllama/llama-7b", machine_named("T4")).config.lora
    assert (llama.r, llama.alpha) == (8, 16)
    assert plan("gpt2").config.lora.r == 16
    assert plan("llama-7b", machine_named("T4"), lora__r=32).config.lora.r == 32


@pytest.mark.parametrize("knob", KNOBS)
def test_every_choice_has_a_reason(knob: str) -> None:
    assert any(choice.knob == knob and len(choice.reason) > 10 for choice in plan("smollm2-135m").choices)


@pytest.mark.parametrize(
    ("name", "card", "values", "compiled"),
    [
        ("gpt2", "H100", {"training__max_steps": 100_000}, True),
        ("gpt2", "H100", {"training__max_steps": 100}, False),
        ("gpt2", "T4", {"training__max_steps": 100_000}, False),  # its kernels are slower than their launches
        ("gpt2", "H100", {"training__max_steps": 100_000, "model__quantization": "nf4"}, False),
        ("mistral-7b", "H200", {"training__max_steps": 100_000}, False),
        ("mistral-7b", "H200", {"training__compile": True}, True),
    ],
)
def test_blocks_are_compiled_where_a_gpu_would_wait_for_launches_long_enough(
    name: str, card: str, values: dict[str, Any], compiled: bool
) -> None:
    made = plan(name, machine_named(card), **values)
    assert made.config.training.compile is chosen(made, "training.compile") is compiled


def test_a_cpu_compiles_nothing_unasked() -> None:
    assert plan("smollm2-135m").config.training.compile is None
    assert plan("smollm2-135m", training__compile=True).config.training.compile is True


H100 = replace(machine_named("H100"), liger=True)


@pytest.mark.parametrize(
    ("name", "machine", "values", "used", "why"),
    [
        ("mistral-7b", H100, {}, True, "one kernel each"),
        ("mistral-7b", H100, {"model__quantization": "nf4"}, True, "one kernel each"),
        ("mistral-7b", replace(H100, liger=False), {}, False, "pip install 'llm-finetune-kit[gpu]'"),
        ("mistral-7b", replace(H100, rocm=True), {}, False, "NVIDIA"),
        ("mistral-7b", replace(H100, bfloat16=False), {"training__tokens_per_pass": 64}, False, "8.0"),
        ("mistral-7b", replace(machine_named("M2 Max 96GB"), liger=True), {}, False, "NVIDIA"),
        ("gpt2", H100, {}, False, "do not help with"),
        ("mistral-7b", H100, {"training__compile": True}, False, "the compiler fuses the same"),
        ("mistral-7b", H100, {"training__compile": True, "model__quantization": "nf4"}, True, "one kernel each"),
        ("mistral-7b", replace(H100, liger=False), {"training__liger": True}, True, "you asked for it"),
        ("mistral-7b", H100, {"training__liger": False}, False, "you asked for it"),
    ],
)
def test_ligers_kernels_are_used_where_they_are_and_nothing_else_fuses(
    name: str, machine: Machine, values: dict[str, Any], used: bool, why: str
) -> None:
    made = plan(name, machine, **values)
    choice = next(choice for choice in made.choices if choice.knob == "training.liger")
    assert made.config.training.liger is choice.value is used
    assert why in choice.reason


def test_a_cpu_says_nothing_of_ligers_kernels_unasked() -> None:
    made = plan("smollm2-135m", replace(CPU, liger=True))
    assert made.config.training.liger is None
    assert not any(choice.knob == "training.liger" for choice in made.choices)


def test_who_asks_for_ligers_kernels_gets_no_compiler_unasked() -> None:
    long = {"training__max_steps": 100_000}
    made = plan("smollm2-135m", H100, **long)
    assert made.config.training.compile is True and made.config.training.liger is False
    made = plan("smollm2-135m", H100, training__liger=True, **long)
    assert made.config.training.compile is False and made.config.training.liger is True
    assert not any("will not be used" in warning for warning in made.warnings)
    both = plan("smollm2-135m", H100, training__liger=True, training__compile=True)
    assert any("training.liger will not be used: training.compile" in warning for warning in both.warnings)


def test_what_was_asked_is_kept() -> None:
    asked = {
        "model__dtype": "float32", "model__quantization": "nf4", "model__max_length": 100, "lora__r": 4,
        "lora__target_modules": ["q_proj"], "training__tokens_per_pass": 333, "training__gradient_checkpointing": True,
        "training__checkpoint_every": 3, "training__optimizer": "adamw_8bit", "training__threads": 1,
    }  # fmt: skip
    made = plan("smollm2-135m", **asked)
    tree = made.config.model_dump()
    for path, value in asked.items():
        section, _, name = path.partition("__")
        assert tree[section][name] == value
    assert {choice.reason for choice in made.choices if choice.knob in ("model.dtype", "lora.r")} == {"you asked for it"}


def test_nothing_is_given_up_where_there_is_room() -> None:
    made = plan("smollm2-135m")
    assert made.config.model.quantization is None
    assert made.config.training.gradient_checkpointing is False
    assert made.config.training.optimizer == "adamw"
    assert made.config.training.threads == CPU.cores


def test_the_least_recomputation_that_fits() -> None:
    """With ever less memory: none, some blocks, all of them; never more than is needed."""
    every = []
    model = facts_by_name("tinyllama")
    for free in range(18, 2, -1):
        machine = replace(CPU, free_memory=int(free * 5e8))
        config = RunConfig().with_values({"model.name": "tinyllama", "training.tokens_per_pass": 1024})
        try:
            made = make_plan(config, machine, model, DATA)
        except MachineError:
            break
        if made.config.model.quantization is None:
            every.append(made.config.training.checkpoint_every or 0)
    assert every[0] == 0 and every[-1] == 1
    order = [(0, 4, 3, 2, 1).index(value) for value in every]
    assert order == sorted(order) and set(every) & {2, 3, 4}


def test_mechanics_change_and_meaning_does_not() -> None:
    """R1's rule lowers the batch where memory is short; here only passes shrink, the examples of a step stay."""
    small, large = plan("mistral-7b", machine_named("RTX 3060")), plan("mistral-7b", machine_named("H200"))
    assert small.config.model.quantization == "nf4" and large.config.model.quantization is None
    assert small.examples_per_step == large.examples_per_step == 16
    assert small.config.training.batch_size == large.config.training.batch_size


def test_below_the_recommended_memory_four_bits_come_before_recomputation() -> None:
    made = plan("phi-3-mini", machine_named("RTX 3080"))
    assert made.config.model.quantization == "nf4"
    assert made.config.training.gradient_checkpointing is False
    assert "16 GB are recommended" in next(choice.reason for choice in made.choices if choice.knob == "model.quantization")


def test_older_gpus_take_float16_and_cpus_float32() -> None:
    assert plan("gpt2", machine_named("T4")).config.model.dtype == "float16"
    assert plan("gpt2", replace(CPU, bfloat16=False)).config.model.dtype == "float32"


@pytest.mark.parametrize(("name", "gpu"), [("tinyllama", "RTX 3070"), ("mistral-7b", "RTX 3060"), ("llama-13b", "T4")])
def test_what_small_gpus_are_promised_fits(name: str, gpu: str) -> None:
    made = plan(name, machine_named(gpu))
    assert made.fits and not made.edits


def test_a_full_optimizer_shrinks_only_where_it_must() -> None:
    assert plan("smollm2-135m", method="full").config.training.optimizer == "adamw"
    tight = replace(CPU, free_memory=int(3.2e9))
    assert plan("smollm2-135m", tight, method="full").config.training.optimizer == "adamw_8bit"


def test_what_cannot_fit_is_refused_with_changes_that_do() -> None:
    tight = replace(CPU, free_memory=int(4e9))
    with pytest.raises(MachineError) as caught:
        plan("tinyllama", tight, method="full")
    error = caught.value
    assert error.code == "MACHINE-020" and "weights 4.4 GB" in error.why
    edits = error.fix.removeprefix("set ").split(", or ")
    assert len(edits) == 3 and edits[0] == "method=lora"
    for edit in edits:
        values = {
            key: json.loads(value) if value[0].isdigit() else value
            for key, _, value in (one.partition("=") for one in edit.split(" and "))
        }
        values = {key: {"true": True, "null": None}.get(str(value), value) for key, value in values.items()}
        config = RunConfig().with_values({"model.name": "tinyllama", "method": "full"} | values)
        assert make_plan(config, tight, facts_by_name("tinyllama"), DATA).fits


def test_force_makes_a_warning_of_it() -> None:
    made = plan("tinyllama", replace(CPU, free_memory=int(4e9)), options={"force": True}, method="full")
    assert not made.fits and made.edits
    assert any("GB are free" in warning for warning in made.warnings)


def test_a_machine_that_holds_nothing_is_told_plainly() -> None:
    with pytest.raises(MachineError, match="needs about") as caught:
        plan("llama-13b", replace(CPU, free_memory=10**9))
    assert "smaller model" in caught.value.fix


def test_fault_070_a_disk_that_is_too_small_is_told_before_anything_starts() -> None:
    small = replace(CPU, free_disk=10**6)
    with pytest.raises(MachineError, match=r"needs about .* MB of disk and 1.0 MB are free") as caught:
        plan("gpt2", small)
    for part in ("checkpoints", "one being written", "final"):
        assert part in caught.value.why
    forced = plan("gpt2", small, options={"force": True})
    assert any("of disk" in warning for warning in forced.warnings)
    assert sum(forced.disk.values()) > 10**6


def test_unknown_layers_are_refused() -> None:
    with pytest.raises(ConfigError, match="no layer nothing"):
        plan("gpt2", lora__target_modules=["nothing"])


@pytest.mark.parametrize(
    ("name", "values", "told"),
    [
        ("gpt2", {"lora__variant": "dora", "lora__init": "pissa"}, "do not go together"),
        ("gpt2", {"lora__bias": "all", "model__quantization": "nf4"}, "biases of a quantized model"),
        ("gpt2", {"method": "full", "model__quantization": "nf4"}, "cannot be trained in full"),
        ("gpt2", {"method": "full", "training__freeze_layers": 13}, "has only 12 blocks"),
        ("tinyllama", {"lora__init": "pissa", "lora__r": 257, "lora__target_modules": ["q_proj", "k_proj"]}, "256 outputs"),
        ("gpt2", {"model__max_length": 1025}, "has 1,024 positions"),
    ],
)
def test_what_excludes_each_other_or_is_more_than_the_model_has_is_refused(name: str, values: dict[str, Any], told: str) -> None:
    long = replace(DATA, longest=2000)
    with pytest.raises(ConfigError, match=told) as caught:
        plan(name, data=long, **values)
    assert caught.value.fix


def test_biases_that_are_trained_keep_the_plan_from_quantizing() -> None:
    tight = replace(CPU, free_memory=int(2.5e9))
    assert plan("tinyllama", tight).config.model.quantization == "nf4"
    with pytest.raises(MachineError):
        plan("tinyllama", tight, lora__bias="all")


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"method": "full", "lora__r": 8, "lora__variant": "dora"}, "lora.r, lora.variant will not be used"),
        ({"lora__bias": "all"}, "lora.bias will not be used: tinyllama has no biases"),
        ({"training__freeze_layers": 2}, "training.freeze_layers will not be used"),
        ({"model__double_quantization": False}, "model.double_quantization will not be used"),
        ({"training__compile": True, "model__quantization": "nf4"}, "training.compile will not be used"),
        ({"training__liger": True}, "training.liger will not be used: its kernels are for NVIDIA's GPUs, not for cpu"),
        ({"training__checkpoint_every": 2, "training__gradient_checkpointing": False}, "checkpoint_every will not be used"),
        ({"model__max_length": 5000}, "model.max_length=5,000 is more than the 2,048 tokens that tinyllama was made for"),
    ],
)
def test_what_will_not_be_used_or_not_be_understood_is_a_warning(values: dict[str, Any], told: str) -> None:
    large = replace(CPU, free_memory=10**11)
    assert any(told in warning for warning in plan("tinyllama", large, **values).warnings)
    assert not any("will not" in warning or "made for" in warning for warning in plan("tinyllama").warnings)
    packed = plan("tinyllama", model__double_quantization=False, model__quantization="nf4", model__max_length=2048)
    assert not any("will not" in warning or "made for" in warning for warning in packed.warnings)


def test_to_ask_for_every_nth_block_is_to_ask_for_recomputation() -> None:
    made = plan("tinyllama", training__checkpoint_every=2)
    assert made.config.training.gradient_checkpointing is True and made.config.training.checkpoint_every == 2
    assert made.memory["activations"] < plan("tinyllama").memory["activations"]


# --- time and cost -----------------------------------------------------------------------------------------


def test_time_adds_up_and_grows_with_work() -> None:
    short, long = plan("smollm2-135m", training__max_steps=10), plan("smollm2-135m", training__max_steps=60)
    assert long.time["training"] == pytest.approx(6 * short.time["training"])
    parts = ("start", "training", "evaluation", "answers", "saving", "report")
    assert short.time["total"] == pytest.approx(sum(short.time[part] for part in parts))
    assert short.time["tokens_per_second"] == pytest.approx(16 * 234 / short.time["step_seconds"])


def test_recomputing_and_full_fine_tuning_take_longer() -> None:
    plain = plan("tinyllama", machine_named("A100-40"))
    again = plan("tinyllama", machine_named("A100-40"), training__gradient_checkpointing=True)
    full = plan("tinyllama", machine_named("A100-40"), method="full")
    assert 1.2 < again.time["step_seconds"] / plain.time["step_seconds"] < 1.6
    assert full.time["step_seconds"] > plain.time["step_seconds"]


def test_cost_is_hours_times_price() -> None:
    listed = plan("tinyllama", machine_named("T4"))
    mine = plan("tinyllama", machine_named("T4"), options={"price": 2.0})
    assert listed.cost is not None and mine.cost is not None
    assert mine.cost["total"] == pytest.approx(2.0 * mine.time["total"] / 3600)
    assert listed.cost["total"] == pytest.approx(listed.cost["price_per_hour"] * listed.cost["hours"])
    assert plan("gpt2").cost is None


def test_a_machine_of_unknown_speed_has_no_time() -> None:
    made = plan("gpt2", replace(CPU, rates=None))
    assert made.time == {} and made.cost is None


def test_the_last_step_of_an_epoch_is_smaller() -> None:
    """1,000 examples in steps of 16: 62 whole ones and one of 8."""
    epochs = plan("smollm2-135m", training__num_epochs=2)
    assert epochs.steps == 126
    tokens = epochs.time["tokens_per_second"] * epochs.time["step_seconds"]
    assert tokens == pytest.approx(234_000 * 2 / 126)


PROBED = Measured(
    step_seconds=100.0, step_tokens=16 * 234.0, step_targets=16 * 170.0, step_examples=16.0, steps=5,
    start=3.0, evaluation=7.0, answers=11.0, peak_memory=9 * 10**9,
)  # fmt: skip


def test_a_probe_replaces_the_estimates() -> None:
    before = plan("smollm2-135m", training__max_steps=10)
    after = plan("smollm2-135m", options={"measured": PROBED}, training__max_steps=10)
    assert after.peak_memory == 9 * 10**9
    assert after.time["training"] == pytest.approx(10 * 100.0)
    assert after.time["evaluation"] == pytest.approx(11 * 7.0)  # before the first step and after every one
    assert after.time["answers"] == pytest.approx(2 * 11.0)
    imports = after.time["start"] - 3.0
    assert 0 < imports < before.time["start"]
    assert "5 steps measured" in after.time["source"]


def test_a_probe_of_longer_rows_says_less_of_shorter_ones() -> None:
    """What was probed is moved to the run's mean step: twice the tokens took about twice the time."""
    twice = replace(PROBED, step_tokens=32 * 234.0, step_targets=32 * 170.0, step_examples=32.0)
    after = plan("smollm2-135m", options={"measured": twice}, training__max_steps=10)
    assert 0.5 < after.time["step_seconds"] / 100.0 < 0.55


def test_kernels_of_ever_new_lengths_are_counted() -> None:
    equal = replace(DATA, tokens=512_000)
    few, many = (plan("smollm2-135m", training__max_steps=steps).memory["kernels"] for steps in (1, 100))
    assert few < many == plan("smollm2-135m", training__max_steps=1000).memory["kernels"]
    assert plan("smollm2-135m", data=equal, training__max_steps=100).memory["kernels"] == few


# --- proof -------------------------------------------------------------------------------------------------


def test_predicted_against_measured() -> None:
    made = plan("smollm2-135m")
    told = compare(made.to_dict(), int(made.peak_memory / 1.1), 2 * made.time["tokens_per_second"])
    assert told["peak_memory"]["error"] == pytest.approx(0.1)
    assert told["tokens_per_second"]["error"] == pytest.approx(-0.5)
    assert compare({}, 1, 1.0)["peak_memory"]["error"] is None


def test_a_plan_is_plain_values() -> None:
    made = plan("mistral-7b", machine_named("RTX 4090"))
    tree = json.loads(json.dumps(made.to_dict()))
    assert tree["peak_memory"] == sum(tree["memory"].values())


@pytest.mark.parametrize(
    ("name", "machine", "answer"),
    [
        ("gpt2", "cpu 16GB", "LoRA"),
        ("mistral-7b", "A100-40", "LoRA"),
        ("mistral-7b", "RTX 3060", "QLoRA"),
        ("llama-13b", "RTX 4060", "no"),
    ],
)
def test_what_fits_where(name: str, machine: str, answer: str) -> None:
    assert fits(facts_by_name(name), machine_named(machine)) == answer


def test_a_plan_by_name_takes_two_seconds_at_most(tmp_path: Path) -> None:
    code = (
        "import sys; from llm_finetune_kit.config import RunConfig; from llm_finetune_kit.plan import DataFacts, make_plan;"
        "from llm_finetune_kit.hardware import machine_named; from llm_finetune_kit.models.facts import facts_by_name;"
        "make_plan(RunConfig(), machine_named('T4'), facts_by_name('mistral-7b'), DataFacts(100, 0, 20000, 15000, 512));"
        "print('torch' in sys.modules)"
    )
    tries = [start([sys.executable, "-c", code], tmp_path) for _ in range(3)]
    assert [done.out.split() for done in tries] == [["False"]] * 3
    assert min(done.work for done in tries) < 2


def test_sample_answers_come_with_evaluations_as_often_as_is_cheap() -> None:
    """`answers` is how many steps they last; 3 % of the steps between them may go into them."""
    assert sampling(3.0, 100, 1000) == (100, "at every evaluation")
    assert sampling(7.0, 100, 1000)[0] == 300 and "one evaluation in 3" in sampling(7.0, 100, 1000)[1]
    assert sampling(40.0, 100, 1000)[0] == 1000 and "before and after training only" in sampling(40.0, 100, 1000)[1]


def test_what_is_asked_of_the_model_does_not_depend_on_how_busy_the_machine_is() -> None:
    slow = replace(CPU, rates=Rates(1e10, 4e10, 4, "a busy moment"))
    first, second = (plan("gpt2", machine).config.evaluation for machine in (CPU, slow))
    assert first == second and first.sample_steps and 4 <= (first.rows or 0) <= 256
    told = plan("gpt2", evaluation__sample_steps=7, evaluation__rows=9)
    assert (told.config.evaluation.sample_steps, told.config.evaluation.rows) == (7, 9)
    often = plan("gpt2", evaluation__sample_steps=1)
    assert often.time["answers"] > 5 * told.time["answers"]
    assert plan("gpt2", evaluation__compare=False).config.evaluation.rows is None


def test_the_length_is_never_below_the_knobs_own_minimum() -> None:
    data = DataFacts(examples=10, held_out=0, tokens=70, target_tokens=20, longest=7)
    assert make_plan(RunConfig(), machine_named("T4"), facts_by_name("tinyllama"), data).config.model.max_length == 8
