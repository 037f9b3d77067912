"""The quality report: everything about a data set that would spoil training, with the places where to look.

It works on what `sources` and `formats` made of the rows, for conversations, texts and preference pairs alike.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from llm_finetune_kit.data import similar
from llm_finetune_kit.data.gate import MOST_CUT, inspect
from llm_finetune_kit.data.quality.alphabet import dropped_characters, named
from llm_finetune_kit.data.quality.copies import copies_across, near_duplicates
from llm_finetune_kit.data.quality.echoes import about_answers, about_prompts
from llm_finetune_kit.data.quality.findings import EMPTY, GRAVEST_FIRST, KINDS, SHOWN, Finding, finding, verdict
from llm_finetune_kit.data.quality.scan import scan
from llm_finetune_kit.data.quality.scripts import main_script

NEAR = 0.8  # exact similarity from which two rows count as near duplicates
POINTS = {"min": 0, "p5": 5, "p50": 50, "p95": 95, "p99": 99, "max": 100}
MOST_REASONS = 20
ROLE_FAULT = re.compile(r"unknown role|message in a row|must come first|no assistant message|not a role|empty conversation")


@dataclass(frozen=True)
class QualityReport:
    """What is in a data set and what is wrong with it. Lengths are quantiles over examples."""

    name: str
    rows: int
    used: int
    dropped: list[dict[str, Any]]  # reason, count, places
    lengths: dict[str, dict[str, int]]  # characters and messages, and tokens where they are known
    truncation: dict[str, int] | None  # at max_length; None where tokens are not known
    scripts: dict[str, int]  # examples mostly in each script
    held_out: dict[str, Any] | None
    findings: list[Finding]
    notes: list[str]
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON values."""
        return asdict(self)


def inspect_data(
    source: Any, formatted: Any, *, held_out: Any = None, tokens: Any = None, max_length: int | None = None, chat: Any = None
) -> QualityReport:
    """Look at all rows of a `sources.Source` and what became of them, a `formats.Formatted`.

    `held_out` is such a pair too: what of it the data repeats is leakage. `tokens` (a `masks.Tokens` of the same
    examples, uncut) adds what max_length cuts off, `chat` what the masks of its template leave unlearned.
    """
    work = _Inspection(source, formatted.examples)
    work.about_dropped(formatted.dropped)
    work.about_copies(held_out)
    for kind, hits in scan(formatted.examples).items():
        work.add(kind, hits.examples, remarks=hits.remarks)
    for kind, examples, detail in about_answers(formatted.examples, work.repeats):
        work.add(kind, examples, detail)
    lengths = {"characters": _quantiles(work.characters())}
    if formatted.examples[0].messages is not None:
        lengths["messages"] = _quantiles(np.array([len(example.messages) for example in formatted.examples]))
    truncation = None
    if tokens is not None:
        lengths["tokens"] = _quantiles(tokens.lengths)
        truncation = work.about_tokens(tokens, max_length, chat)
    scripts = work.about_scripts()
    findings = sorted(work.findings, key=lambda found: (GRAVEST_FIRST.index(found.severity), -found.count))
    return QualityReport(
        name=source.name,
        rows=len(source.rows) + len(source.broken),
        used=len(formatted.examples),
        dropped=_reasons(source, formatted.dropped),
        lengths=lengths,
        truncation=truncation,
        scripts=scripts,
        held_out={"name": held_out[0].name, "rows": len(held_out[0].rows)} if held_out else None,
        findings=findings,
        notes=[*source.notes, *_untrainable(formatted.examples), *formatted.warnings],
        verdict=verdict(findings),
    )


def _untrainable(examples: Sequence[Any]) -> list[str]:
    if examples[0].rejected is None and examples[0].label is None:
        return []
    return ["preference data is read and checked; to train on its good answers: finetune data convert FILE --to messages"]


def _reasons(source: Any, dropped: Sequence[tuple[int, str]]) -> list[dict[str, Any]]:
    rows: dict[str, list[int]] = {}
    for row, reason in dropped:
        rows.setdefault(reason, []).append(row)
    found = [(reason, len(bad), [source.place(row) for row in bad[:SHOWN]]) for reason, bad in rows.items()]
    lines: dict[str, list[str]] = {}
    for place, why in source.broken.items():
        lines.setdefault(why, []).append(place)
    found += [(why, len(bad), bad[:SHOWN]) for why, bad in lines.items()]
    common = sorted(found, key=lambda reason: -reason[1])[:MOST_REASONS]
    return [{"reason": reason, "count": count, "places": places} for reason, count, places in common]


def _quantiles(lengths: np.ndarray) -> dict[str, int]:
    return {name: int(value) for name, value in zip(POINTS, np.percentile(lengths, list(POINTS.values())), strict=True)}


class _Inspection:
    """The findings so far, and what several of them need."""

    def __init__(self, source: Any, examples: list[Any]) -> None:
        self.source, self.examples = source, examples
        self.texts = similar.Texts(examples)
        self.answers = similar.Texts(examples, similar.answers_of)
        self.findings: list[Finding] = []
        self.repeats: set[int] = set()  # examples that repeat an earlier one word for word

    def add(self, kind: str, examples: Sequence[int], detail: str = "", remarks: Sequence[str] = ()) -> None:
        """A finding about examples, if there are any; remarks belong to the first of them."""
        if len(examples):
            places = [self.place(example) for example in examples[:SHOWN]]
            places = [f"{place} ({remark})" for place, remark in zip(places, remarks, strict=False)] if remarks else places
            self.findings.append(finding(kind, len(examples), len(self.examples), places, detail))

    def place(self, example: int) -> str:
        return str(self.source.place(self.examples[int(example)].row))

    def about_dropped(self, dropped: Sequence[tuple[int, str]]) -> None:
        """Rows that are no examples: lines that cannot be read, no answer, wrong roles, or faulty in another way."""
        total = len(self.source.rows) + len(self.source.broken)
        unread = [f"{place} ({why})" for place, why in list(self.source.broken.items())[:SHOWN]]
        if unread:
            self.findings.append(finding("unreadable_lines", len(self.source.broken), total, unread))
        kinds: dict[str, list[tuple[int, str]]] = {}
        for row, reason in dropped:
            kind = "empty_answers" if reason in EMPTY else "role_faults" if ROLE_FAULT.search(reason) else "faulty_rows"
            kinds.setdefault(kind, []).append((row, reason))
        for kind, found in kinds.items():
            plain = kind == "empty_answers"
            places = [self.source.place(row) + ("" if plain else f" ({reason})") for row, reason in found[:SHOWN]]
            self.findings.append(finding(kind, len(found), total, places))

    def about_copies(self, held_out: Any) -> None:
        """Exact and near duplicates, and leakage into the held-out data."""
        exact = similar.exact_duplicates(self.texts)
        self.add("exact_duplicates", [later for _, later in exact], remarks=[f"as {self.place(row)}" for row, _ in exact[:SHOWN]])
        self.repeats = {later for _, later in exact}
        others = np.setdiff1d(np.arange(len(self.examples)), np.fromiter(self.repeats, dtype=np.int64))
        sketches = similar.sketch(self.texts)
        near = near_duplicates(self.texts, NEAR, answers=self.answers, sketches=sketches, rows=others)
        remarks = [f"{_percent(alike)} as {self.place(row)}" for row, _, alike in near[:SHOWN]]
        self.add("near_duplicates", [later for _, later, _ in near], remarks=remarks)
        if held_out is not None:
            self._about_leakage(held_out[0], held_out[1].examples, sketches)

    def _about_leakage(self, source: Any, examples: list[Any], sketches: np.ndarray) -> None:
        texts, answers = similar.Texts(examples), similar.Texts(examples, similar.answers_of)
        known = (sketches, similar.sketch(texts))
        pairs = copies_across(self.texts, texts, NEAR, answers=(self.answers, answers), sketches=known)
        exact = sum(similar.normal(self.texts[ours]) == similar.normal(texts[theirs]) for ours, theirs, _ in pairs)
        shown = [f"{self.place(ours)} = {source.place(examples[theirs].row)}, {_percent(alike)}" for ours, theirs, alike in pairs]
        if pairs:
            detail = f"{exact:,} word for word, {len(pairs) - exact:,} nearly, of {len(examples):,} held-out rows"
            self.findings.append(finding("leakage", len(pairs), len(examples), shown[:SHOWN], detail))
        leaked = {theirs for _, theirs, _ in pairs}
        shared = [(ours, theirs) for ours, theirs in about_prompts(self.examples, examples) if theirs not in leaked]
        shown = [f"{self.place(ours)} = {source.place(examples[theirs].row)}" for ours, theirs in shared[:SHOWN]]
        if shared:
            self.findings.append(finding("prompt_leakage", len(shared), len(examples), shown))

    def characters(self) -> np.ndarray:
        """Characters of each example, int64 [examples]; very uneven lengths become a finding."""
        pieces = (len(text) for start in range(0, len(self.texts), 4096) for text in self.texts[start : start + 4096])
        lengths = np.fromiter(pieces, dtype=np.int64, count=len(self.texts))
        self.add("long_conversations", np.flatnonzero(lengths > max(2000, 10 * np.median(lengths))).tolist())
        return lengths

    def about_scripts(self) -> dict[str, int]:
        """How many examples are mostly in which script; those not in the commonest become a finding."""
        scripts = [main_script(text) for start in range(0, len(self.texts), 4096) for text in self.texts[start : start + 4096]]
        counts = Counter(filter(None, scripts))
        common = counts.most_common(1)[0][0] if counts else ""
        others = [place for place, script in enumerate(scripts) if script and script != common]
        self.add("other_script", others, remarks=[scripts[place] for place in others[:SHOWN]])
        return dict(counts.most_common())

    def about_tokens(self, tokens: Any, max_length: int | None, chat: Any) -> dict[str, int] | None:
        """What max_length cuts off, exactly: examples cut, learned tokens lost, examples with nothing left to learn."""
        if chat is not None:
            facts = inspect(tokens, chat)
            for kind, count in (("end_not_learned", facts.open_ended), ("double_bos", facts.double_bos)):
                if count:
                    self.findings.append(finding(kind, int(count), len(tokens), []))
            texts = (text for start in range(0, len(self.texts), 4096) for text in self.texts[start : start + 4096])
            characters, holding = dropped_characters(texts, chat)
            self.add("dropped_characters", holding, named(characters))
        if max_length is None:
            return None
        totals = np.concatenate([[0], np.cumsum(tokens.trained, dtype=np.int64)])
        starts, ends = tokens.starts[:-1], tokens.starts[1:]
        kept_to = np.minimum(ends, starts + max_length)
        lost = totals[ends] - totals[kept_to]
        first = tokens.trained[starts].astype(np.int64) if len(tokens.ids) else 0  # a first token is never a target
        nothing = np.flatnonzero(totals[kept_to] - totals[starts] - first <= 0)
        cut = np.setdiff1d(np.flatnonzero(lost > 0), nothing)
        self.add("nothing_learned", nothing.tolist())
        kind = "mostly_cut" if lost.sum() > MOST_CUT * totals[-1] else "cut_answers"
        self.add(kind, cut.tolist(), f"{int(lost.sum()):,} learned tokens are lost")
        return {
            "max_length": int(max_length),
            "examples_cut": int((ends > kept_to).sum()),
            "learned_tokens": int(totals[-1]),
            "learned_tokens_cut": int(lost.sum()),
            "nothing_left": len(nothing),
        }


def _percent(share: float) -> str:
    return f"{int(100 * share)} %"


def table(report: QualityReport) -> tuple[list[tuple[str, str]], list[tuple[str, str, str, str]]]:
    """Facts as (name, value), and findings as (severity, what, rows, what to do), for a terminal."""
    used = "all used" if report.used == report.rows else f"of which {report.used:,} become examples"
    facts = [("data", report.name), ("rows", f"{report.rows:,}, {used}")]
    for what, spread in report.lengths.items():
        facts.append((what, f"{spread['p50']:,} in the middle, {spread['p95']:,} at 95 %, at most {spread['max']:,}"))
    if cut := report.truncation:
        lost = f"{cut['examples_cut']:,} examples and {cut['learned_tokens_cut']:,} of {cut['learned_tokens']:,} learned tokens"
        facts.append((f"cut at {cut['max_length']:,}", lost if cut["examples_cut"] else "nothing"))
    if len(report.scripts) > 1:
        facts.append(("scripts", ", ".join(f"{name} {count:,}" for name, count in list(report.scripts.items())[:5])))
    if report.held_out:
        facts.append(("held out", f"{report.held_out['name']}, {report.held_out['rows']:,} rows"))
    findings = []
    for found in report.findings:
        first = f": {found.rows[0].replace(f'{report.name} ', '')}" if found.rows else ""
        findings.append((str(found.severity), KINDS[found.kind].title + first, f"{found.count:,}", found.fix))
    return facts, findings
