"""The table of what the quality report may find: how grave it is, what it means for a learner, what to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "note"]
GRAVEST_FIRST: tuple[Severity, ...] = ("error", "warning", "note")
EMPTY = {"empty answer", "empty text"}  # reasons of rows that were left out and are no fault
SHOWN = 10  # places listed with a finding

REMOVE = "--fix --out clean.jsonl writes a copy without them"
REPAIR = "--fix --out clean.jsonl writes a repaired copy"
FAULTS = f"correct them, or {REMOVE}; data.on_bad_rows=drop trains without them"
KEEP_APART = f"{REMOVE} (with the same --eval)"


@dataclass(frozen=True)
class Kind:
    """One thing to look for. `sentence` goes on after "they "; where hardly any row has it, it is only a note."""

    severity: Severity
    title: str
    sentence: str
    fix: str
    rare: float = 0.0  # a share of rows up to which it is only a note


KINDS: dict[str, Kind] = {
    # what stops training, or trains the wrong thing
    "faulty_rows": Kind("error", "faulty rows", "cannot be read as training examples", FAULTS),
    "unreadable_lines": Kind("error", "unreadable lines", "cannot be read at all, so they are no rows", FAULTS),
    "role_faults": Kind("error", "wrong roles", "have turns with unknown roles or in an order no chat has", FAULTS),
    "nothing_learned": Kind("error", "nothing to learn", "have no answer left within max_length, so nothing is learned from them",
                            "raise max_length, or shorten the prompts"),
    "end_not_learned": Kind("error", "no end", "never learn to end an answer, so the model would not stop",
                            "use a chat template that closes each answer with the end-of-turn token"),
    "double_bos": Kind("error", "double BOS", "begin with two BOS tokens", "remove the BOS text from the rows"),
    "chosen_is_rejected": Kind("error", "chosen = rejected", "prefer an answer to itself, which teaches nothing",
                               "correct or remove these pairs"),
    # what spoils results
    "leakage": Kind("warning", "leakage", "are in the held-out data too, so held-out results flatter the model", KEEP_APART),
    "prompt_leakage": Kind("note", "shared prompts", "ask what the held-out data asks as well, with another answer",
                           "fine for common openings; otherwise split the data by prompt"),
    "exact_duplicates": Kind("warning", "exact duplicates", "repeat an earlier row, which weighs it double", REMOVE, 0.001),
    "near_duplicates": Kind("warning", "near duplicates", "say almost the same as an earlier row", REMOVE, 0.001),
    "contradicting_labels": Kind("warning", "opposite labels", "rate an answer good that another row rates bad, or vice versa",
                                 "decide for one of the labels"),
    "empty_answers": Kind("warning", "empty answers", "have no answer and are left out", REMOVE),
    "cut_answers": Kind("warning", "cut answers", "are longer than max_length, so the ends of their answers are not learned",
                        "raise max_length if memory allows, or shorten the rows"),
    "mostly_cut": Kind("error", "most is cut off", "lose together more than half of what is to be learned: training would stop",
                       "raise max_length as far as the model can read, shorten or split the rows, or train on those that are "
                       "whole: data.on_bad_rows=drop"),
    "repeated_answer": Kind("warning", "one answer for many", "give one and the same answer to different prompts",
                            "check that the answers belong to their prompts; the model may learn to say this always"),
    "answer_is_prompt": Kind("warning", "echo", "answer with a copy of the prompt, which teaches to repeat the question",
                             "correct or remove these rows", 0.001),
    "secrets": Kind("warning", "possible secrets", "seem to hold keys, passwords or tokens; a model can repeat what it learned",
                    "remove them from the rows, and make them void where they are in use"),
    "personal_data": Kind("note", "personal data", "hold e-mail addresses or phone numbers; a model can repeat what it learned",
                          "replace them unless they are invented or public"),
    # what is not as it was written
    "mojibake": Kind("warning", "broken accents", "hold text decoded with the wrong encoding (such as â€™ for ’)", REPAIR),
    "lost_characters": Kind("warning", "lost characters", "hold the replacement character �: something was lost",
                            "export the data again as UTF-8, or remove the rows", 0.001),
    "dropped_characters": Kind("warning", "dropped characters", "hold characters that the tokenizer drops, so the model can "
                               "neither read nor write them", "choose a model that knows them, or write them in words"),
    "control_characters": Kind("warning", "control characters", "hold control characters, which nobody types", REPAIR, 0.001),
    "invisible_characters": Kind("note", "invisible characters", "hold characters of no width, which become odd tokens", REPAIR),
    "markup": Kind("note", "web page leftovers", "hold HTML tags or entities although they are not about HTML",
                   "strip the markup if the model should not write it"),
    "placeholders": Kind("warning", "placeholders", "hold text that was to be filled in (such as {{name}}, TODO, lorem ipsum)",
                         "fill in or remove it: the model would learn to say it", 0.001),
    "blanks_to_fill": Kind("note", "blanks to fill in", "have answers with blanks such as [Your Name]",
                           "fine where a form letter is wanted; otherwise fill them in"),
    "boilerplate": Kind("warning", "boilerplate", "have answers that speak of being an AI language model",
                        "remove them unless this is how the model should speak", 0.001),
    # what to know
    "short_answers": Kind("note", "one-word answers", "have an answer of one word: fine for labels, thin for conversation",
                          "check that short answers are what you want"),
    "other_script": Kind("note", "other scripts", "are mostly in another script than the rest",
                         "fine if several languages are meant; otherwise remove them"),
    "long_conversations": Kind("note", "uneven lengths", "are more than ten times as long as the median and weigh as much more",
                               "fine if meant; otherwise shorten them"),
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """What was found in `count` rows, `share` of all; `rows` are the first places, as a person finds them."""

    kind: str
    severity: Severity
    count: int
    share: float
    rows: list[str]
    sentence: str
    fix: str


def finding(kind: str, count: int, total: int, places: list[str], detail: str = "") -> Finding:
    """A finding of the table; `total` rows were looked at, and `detail` is added to the sentence."""
    what = KINDS[kind]
    share = count / max(1, total)
    severity: Severity = "note" if share <= what.rare else what.severity
    sentence = f"they {what.sentence}{f' ({detail})' if detail else ''}"
    return Finding(kind, severity, count, round(share, 6), places[:SHOWN], sentence, what.fix)


def verdict(findings: list[Finding]) -> str:
    """One line for all findings."""
    errors = sum(found.severity == "error" for found in findings)
    warnings = sum(found.severity == "warning" for found in findings)
    if errors:
        return f"cannot be trained as it is: {errors} thing{'s' if errors > 1 else ''} to correct first"
    if warnings:
        return f"look at {warnings} thing{'s' if warnings > 1 else ''} first"
    return "good to train"
