"""`run.log`: every event as a line for people."""

from __future__ import annotations

import json
import time
from pathlib import Path

from llm_finetune_kit.events import (
    Compared,
    Evaluated,
    Event,
    Failed,
    Finished,
    Noted,
    Planned,
    Profiled,
    Resumed,
    Sampled,
    Saved,
    Stage,
    Stepped,
    Warned,
    from_record,
)
from llm_finetune_kit.folder import EVENTS
from llm_finetune_kit.report import words
from llm_finetune_kit.report.figures import legible


def run_log(folder: Path, logging_steps: int = 1) -> str:
    """The whole history, also what a later resume made void, in local time."""
    lines = []
    for when, event in _history(folder):
        if isinstance(event, Stepped) and event.step % logging_steps and event.step != event.total_steps:
            continue
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when))
        lines.append(f"{stamp}  {legible(' '.join(in_words(event).split()))}\n")
    return "".join(lines)


def _history(folder: Path) -> list[tuple[float, Event]]:
    found = []
    try:
        lines = (folder / EVENTS).read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            record = json.loads(line)
            event = from_record(record)
        except ValueError:
            continue
        if event is not None:
            found.append((float(record.get("time", 0)), event))
    return found


def in_words(event: Event) -> str:
    """One event in one sentence."""
    match event:
        case Stage(name, detail):
            return f"{name}: {detail}" if detail else name
        case Planned(plan):
            peak = words.size(plan.get("peak_memory", 0))
            return f"planned {plan.get('steps')} steps on {plan.get('device')}, peak memory about {peak}"
        case Resumed(step, checkpoint):
            return f"resumed after step {step} from {checkpoint or 'the start'}"
        case Stepped():
            speed = event.tokens / max(event.seconds, 1e-9)
            moved = f"learning rate {event.learning_rate:.2e}, gradient norm {event.gradient_norm:.3f}"
            return f"step {event.step}/{event.total_steps}: loss {event.loss:.4f}, {moved}, {speed:,.0f} tokens/s"
        case Evaluated():
            best = ", the best so far" if event.best else ""
            figures = f"loss {event.loss:.4f}, perplexity {words.perplexity(event.perplexity)}"
            return f"held out after step {event.step}: {figures}{best}"
        case Sampled(step, prompt, answer):
            return f"answer after step {step} to {prompt!r}: {answer!r}"
        case Compared(step, comparison):
            return f"compared after step {step}: {comparison['sentence']} {comparison['general']['sentence']}"
        case Profiled(steps, seconds, parts):
            told = ", ".join(f"{name} {part / seconds:.0%}" for name, part in sorted(parts.items(), key=lambda part: -part[1]))
            return f"profile of {steps} steps of {1e3 * seconds:.0f} ms: {told}"
        case Saved(step, folder, size, seconds):
            return f"saved {folder} of step {step}: {words.size(size)} in {seconds:.1f} s"
        case Noted(message):
            return f"note: {message}"
        case Warned(message, fix):
            return f"warning: {message}" + (f"; {fix}" if fix else "")
        case Finished(step, reason):
            return f"finished after step {step}: {reason}"
        case Failed(code, problem, fix):
            return f"error[{code}] {problem}" + (f"; fix: {fix}" if fix else "")
    return type(event).__name__
