"""What a run writes down when it begins, and what must still hold when it goes on."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm_finetune_kit.config import RunConfig
from llm_finetune_kit.data.cache import file_fingerprint
from llm_finetune_kit.errors import ConfigError, DataError, ModelError, UsageError
from llm_finetune_kit.events import Listen, Noted, Warned
from llm_finetune_kit.files import read_json, write_json, write_whole
from llm_finetune_kit.folder import RunFolder
from llm_finetune_kit.hardware import versions
from llm_finetune_kit.material import Material, prepare_run
from llm_finetune_kit.models.fingerprint import model_fingerprint
from llm_finetune_kit.plain_yaml import dump_yaml
from llm_finetune_kit.settings import changed

RESOLVED = "resolved.json"
ROWS = {"train_file": "train_rows.jsonl", "eval_file": "eval_rows.jsonl"}

# What may be changed when a run goes on. MECHANICS say how it is computed and kept, never what is learned; COURSE says
# how it learns from there on. Everything else would make another run of it.
MECHANICS = (
    "training.save_steps",
    "training.save_total_limit",
    "training.logging_steps",
    "training.tokens_per_pass",
    "training.packing",
    "training.share_prompts",
    "training.compile",
    "training.liger",
    "training.gradient_checkpointing",
    "training.checkpoint_every",
    "training.threads",
    "training.on_disk_full",
    "training.trackers",
    "model.cache_dir",
    "evaluation.",
)
COURSE = (
    "training.learning_rate",
    "training.schedule",
    "training.warmup_steps",
    "training.warmup_ratio",
    "training.weight_decay",
    "training.max_grad_norm",
    "training.eval_steps",
    "training.early_stopping_patience",
    "lora.dropout",
)


def write_beginning(folder: RunFolder, config: RunConfig, material: Material) -> None:
    """What was asked, what was decided and what data, model and machine are like."""
    emptied = _keep_rows(folder, config)
    config, decided = config.with_values(emptied), material.plan.config.with_values(emptied)
    write_whole(folder.path / "config.yaml", dump_yaml(config.asked()))
    write_json(folder.path / "plan.json", material.plan.to_dict() | {"config": decided.model_dump(mode="json")})
    write_json(folder.path / "data_report.json", material.report)
    write_json(
        folder.path / RESOLVED,
        {
            "config": decided.model_dump(mode="json"),
            "choices": [vars(choice) for choice in material.plan.choices],
            "data_fingerprints": {name: part["fingerprint"] for name, part in material.report.items() if "fingerprint" in part},
            "data_files": _data_files(material.report),
            "base_model": material.located.name,
            "model_fingerprint": model_fingerprint(material.located.folder),
            "versions": versions(),
            "machine": {"system": platform.platform(), "device": material.plan.device},
        },
    )


def config_to_go_on(folder: RunFolder, max_steps: int | None, changes: Sequence[str], allowed: bool, listen: Listen) -> RunConfig:
    """The config that a run goes on with: what it began with, and the changes that it allows.

    `changes` are `section.key=value`; `allowed` says that the course may be changed. Raises UsageError for a run that
    has not begun or is finished, ConfigError with a table of old and new for changes that would make another run of it.
    """
    began = decided_config(folder)
    if max_steps is not None and max_steps < folder.step:
        fix = f"name at least {folder.step}, or stop: finetune generate {folder.path} uses what was saved"
        raise UsageError(4, f"the run is at step {folder.step} already", where=str(folder.path), fix=fix)
    if folder.finished and (max_steps is None or max_steps <= folder.step):
        fix = f"to train longer: finetune resume RUN --max-steps N, with N above {folder.step}"
        raise UsageError(4, "the run is finished", where=str(folder.path), fix=fix)
    now = _changed_as_allowed(began, changes, allowed, str(folder.path), listen)
    if max_steps is not None:
        now = changed(now, {"training.max_steps": max_steps})
        steps = read_json(folder.path / "plan.json")["steps"]
        if max_steps < steps:
            told = f"the run ends at step {max_steps:,} from here on, not {steps:,}: its learning rate falls to its end sooner"
            listen(Warned(told, f"to go on as planned, leave --max-steps out, or name {steps}"))
    return now.with_values(_stored_rows(folder))


def _changed_as_allowed(began: RunConfig, changes: Sequence[str], allowed: bool, where: str, listen: Listen) -> RunConfig:
    now = changed(began, {}, changes)
    before, after = _flat(began.model_dump(mode="json")), _flat(now.model_dump(mode="json"))
    different = [knob for knob in before if before[knob] != after[knob]]
    refused = [knob for knob in different if not knob.startswith(MECHANICS) and not (allowed and knob in COURSE)]
    if refused:
        heads = ("setting", "began with", "now")
        rows = [heads, *((knob, json.dumps(before[knob]), json.dumps(after[knob])) for knob in refused)]
        widths = [max(len(row[column]) for row in rows) for column in range(2)]
        table = "\n        ".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows)
        soft = all(knob in COURSE for knob in refused)
        fix = "add --allow-change to go on differently from here" if soft else "leave it as it was, or start a new run"
        raise ConfigError(17, "this would make another run of it", where=where, why=table, fix=fix)
    for knob in different:
        listen(Noted(f"{knob} is {json.dumps(after[knob])} from here on; the run began with {json.dumps(before[knob])}"))
    return now


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        nested = isinstance(value, dict) and name not in ("mix", "columns")
        found |= _flat(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return found


def check_files(folder: RunFolder) -> None:
    """Raises DataError where a data file of the run is gone or has changed."""
    for name, was in read_json(folder.path / RESOLVED)["data_files"].items():
        _must_be(was, file_fingerprint(Path(name)) if Path(name).is_file() else None, name)


def check_material(folder: RunFolder, material: Material, listen: Listen) -> None:
    """Raises DataError or ModelError where data or model are not those of the run; warns of other versions."""
    resolved = read_json(folder.path / RESOLVED)
    for name, was in resolved["data_fingerprints"].items():
        _must_be(was, material.report[name]["fingerprint"], str(material.report[name]["name"]))
    was, now = resolved.get("model_fingerprint"), model_fingerprint(material.located.folder)
    if was != now:
        raise ModelError(
            26,
            "the base model has changed since the run began",
            where=material.located.name,
            why=f"the fingerprint of its weights was {str(was)[:12]}… and is {now[:12]}…",
            fix="put the old weights back (model.revision names a revision), or start a new run",
        )
    here = versions()
    other = [
        f"{name} {old} (now {here.get(name, 'missing')})" for name, old in resolved["versions"].items() if old != here.get(name)
    ]
    if other:
        listen(Warned(f"the run began with {', '.join(other)}: it goes on, but not bit for bit as it would have"))


def remember(folder: RunFolder, config: RunConfig) -> None:
    """Where the run is to end and how it goes on now, for a resume after this one."""
    resolved = read_json(folder.path / RESOLVED)
    kept = config.with_values({f"data.{knob}": None for knob, name in ROWS.items() if (folder.path / name).is_file()})
    if resolved["config"] != (now := kept.model_dump(mode="json")):
        write_json(folder.path / RESOLVED, resolved | {"config": now})


def material_of(folder: RunFolder) -> Material:
    """What a run worked with, prepared again: its held-out rows, tokenizer and plan. Raises UsageError where it never began."""
    return prepare_run(decided_config(folder).with_values(_stored_rows(folder)), force=True)


def decided_config(folder: RunFolder) -> RunConfig:
    """The decided config. Raises UsageError for a run that stopped before."""
    try:
        return RunConfig.model_validate(read_json(folder.path / RESOLVED)["config"])
    except FileNotFoundError:
        raise UsageError(6, "the run stopped before training began", where=str(folder.path), fix="start it again") from None


def _must_be(was: str, now: str | None, name: str) -> None:
    """Raises DataError if a data set is not what it was when the run began."""
    if now is None:
        raise DataError(50, "is no longer there", where=name, fix="put the file back, or start a new run")
    if was != now:
        why = f"its SHA-256 was {was[:12]}… and is {now[:12]}…"
        fix = "put the old file back, or start a new run"
        raise DataError(50, "has changed since the run began", where=name, why=why, fix=fix)


def _data_files(report: dict[str, Any]) -> dict[str, str]:
    """Every single file that the run reads, with the SHA-256 of its bytes."""
    parts = [part for whole in report.values() for part in (whole, *whole.get("parts", ()))]
    return {part["name"]: part["fingerprint"] for part in parts if "name" in part and Path(part["name"]).is_file()}


def _keep_rows(folder: RunFolder, config: RunConfig) -> dict[str, Any]:
    """Rows that were given as a Python list go into a file of the run; the config then names none."""
    emptied: dict[str, Any] = {}
    for knob, name in ROWS.items():
        rows = getattr(config.data, knob)
        if isinstance(rows, list):
            write_whole(folder.path / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            emptied[f"data.{knob}"] = None
    return emptied


def _stored_rows(folder: RunFolder) -> dict[str, Any]:
    return {
        f"data.{knob}": [json.loads(line) for line in (folder.path / name).read_text(encoding="utf-8").split("\n") if line]
        for knob, name in ROWS.items()
        if (folder.path / name).is_file()
    }
