"""The quality report on planted defects: each is found where it was planted, and clean rows stay clean."""

from __future__ import annotations

import json
import random
import string
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from llm_finetune_kit.checking import check
from llm_finetune_kit.config import RunConfig
from llm_finetune_kit.data.formats import Example, Formatted, detect, to_examples
from llm_finetune_kit.data.masks import Tokens
from llm_finetune_kit.data.quality import QualityReport, inspect_data, junk, table
from llm_finetune_kit.data.quality.alphabet import dropped_characters
from llm_finetune_kit.data.quality.tidy import tidy
from llm_finetune_kit.data.sources import Source, read_source
from llm_finetune_kit.errors import DataError
from llm_finetune_kit.material import prepare_run
from llm_finetune_kit.report.data_page import page

WORDS = [
    "river",
    "stone",
    "cloud",
    "engine",
    "paper",
    "garden",
    "silver",
    "window",
    "bridge",
    "winter",
    "letter",
    "market",
    "island",
    "candle",
    "forest",
    "mirror",
]


def clean_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    numbered = [f"{word}{index}" for word in WORDS for index in range(90)]
    return [
        {
            "instruction": "Describe " + " ".join(rng.sample(numbered, 6)),
            "output": " ".join(rng.sample(numbered, 12)),
            "id": index,
        }
        for index in range(count)
    ]


def understood(rows: Any) -> tuple[Source, Formatted]:
    source = read_source(rows)
    return source, to_examples(source, detect(source, None), on_bad_rows="drop", system_prompt=None)


def report_of(rows: Any, held_out: Any = None) -> QualityReport:
    return inspect_data(*understood(rows), held_out=understood(held_out) if held_out else None)


def kinds(report: QualityReport) -> dict[str, int]:
    return {found.kind: found.count for found in report.findings}


def test_clean_rows_have_no_findings() -> None:
    report = report_of(clean_rows(300))
    assert report.findings == []
    assert report.verdict == "good to train"
    assert (report.rows, report.used, report.dropped) == (300, 300, [])


PLANTED = {
    "mojibake": "Itâ€™s a cafÃ©",
    "lost_characters": "It\ufffds late",
    "control_characters": "one\x07two",
    "invisible_characters": "one\u200btwo",
    "markup": "Fish &amp; chips <br/> today",
    "placeholders": "My name is {{name}}",
    "blanks_to_fill": "Kind regards, [Your Name]",
    "boilerplate": "As an AI language model, I cannot taste",
    "personal_data": "write to jane.miller@posteo.de or call 212-736-5000",
    "secrets": "the key is AKIA" + "IOSFODNN7EXAMPLQ",
}


@pytest.mark.parametrize("kind", PLANTED)
def test_fault_006_junk_and_secrets_in_text_are_found_where_they_are(kind: str) -> None:
    rows = clean_rows(120)
    rows[77]["output"] += " " + PLANTED[kind]
    report = report_of(rows)
    assert kinds(report) == {kind: 1}
    assert report.findings[0].rows[0].startswith("rows[77]")


@pytest.mark.parametrize(
    "text",
    [
        "Naïve café, Ångström, “quotes”, Straße – Spaß“, CAFÉ», à la carte, 100 °C, Ð is eth",
        "Привет, как дела? Γειά σου. 你好，世界。 こんにちは हिन्दी عربي می‌خواهم",
        "Write <b>bold</b> in HTML, or &amp; in XML",
        "a family 👨‍👩‍👧 and x < y > z & more",
        "write to me@example.com or call 555-123-4567; 2021-03-04; 192.168.10.11; 1234567890123",
        "working as an AI researcher, to-do lists, [1] and [citation needed]",
    ],
)
def test_ordinary_text_is_no_junk(text: str) -> None:
    rows = clean_rows(40)
    rows[7]["output"] += " " + text
    assert set(kinds(report_of(rows))) <= {"other_script"}
    assert junk.repaired(text) == text


def test_a_secret_is_never_shown() -> None:
    token = "ghp_" + "a1B2" * 9
    rows = clean_rows(20)
    rows[3]["output"] = f"use {token} and https://ann:hunter22@example.org/x"
    report = report_of(rows)
    assert kinds(report)["secrets"] == 1
    everything = json.dumps(report.to_dict()) + page(report.to_dict())
    assert token not in everything and token[4:12] not in everything and "hunter22" not in everything


@pytest.mark.parametrize("text", ["It’s", "“quoted”", "é à ü", "😀 and – more", "Привет всем", "日本語です"])
def test_mojibake_is_undone_exactly(text: str) -> None:
    broken = "".join(bytes([byte]).decode("cp1252", "ignore") or chr(byte) for byte in text.encode())
    assert broken != text and junk.MOJIBAKE.search(broken)
    assert junk.repaired(f"{broken} plain") == f"{text} plain"


def test_fault_019_empty_and_one_word_answers_are_counted() -> None:
    rows = clean_rows(50)
    rows[4]["output"], rows[5]["output"], rows[6]["output"] = "", "  \n", "Yes."
    report = report_of(rows)
    assert kinds(report) == {"empty_answers": 2, "short_answers": 1}
    assert report.used == 48 and report.dropped[0]["count"] == 2


def test_fault_018_role_faults_and_other_faults_are_told_apart() -> None:
    good = [{"role": "user", "content": "Hello there"}, {"role": "assistant", "content": "Good day to you"}]
    rows = [{"messages": good}, {"messages": [{"role": "wizard", "content": "x"}, good[1]]}, {"messages": None}]
    report = report_of(rows)
    assert kinds(report) == {"role_faults": 1, "faulty_rows": 1}
    assert report.verdict.startswith("cannot be trained")
    assert "wizard" in next(found for found in report.findings if found.kind == "role_faults").rows[0]


def test_fault_027_duplicates_and_leakage_are_reported_with_both_places() -> None:
    rows = clean_rows(400)
    rows[300] |= {"output": rows[10]["output"].upper(), "instruction": rows[10]["instruction"]}
    rows[301] |= {"output": rows[20]["output"] + " indeed", "instruction": rows[20]["instruction"]}
    held_out = [*clean_rows(100, seed=5), {**rows[30]}, {**rows[40], "output": rows[40]["output"] + " indeed"}]
    held_out.append({"instruction": rows[50]["instruction"], "output": "quite another answer to what was asked before"})
    report = report_of(rows, held_out)
    assert kinds(report) == {"leakage": 2, "exact_duplicates": 1, "near_duplicates": 1, "prompt_leakage": 1}
    places = {found.kind: found.rows for found in report.findings}
    assert places["exact_duplicates"] == ["rows[300] (as rows[10])"]
    assert places["near_duplicates"][0].startswith("rows[301] (") and places["near_duplicates"][0].endswith("as rows[20])")
    assert places["leakage"][0] == "rows[30] = rows[100], 100 %"
    assert "1 word for word, 1 nearly, of 103" in next(found.sentence for found in report.findings if found.kind == "leakage")


def test_answers_that_do_not_belong_to_their_prompts() -> None:
    rows = clean_rows(60)
    for row in rows[10:17]:
        row["output"] = "Thank you for contacting our support team."
    rows[30]["output"] = rows[30]["instruction"].upper()
    assert kinds(report_of(rows)) == {"repeated_answer": 7, "answer_is_prompt": 1}


def test_preference_examples() -> None:
    def talk(answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": "Tell me about the winter garden"}, {"role": "assistant", "content": answer}]

    source = read_source([{"text": "x"}] * 4)
    same = Example(talk("It is warm inside"), None, 0, rejected=[{"role": "assistant", "content": "It is  WARM inside"}])
    other = Example(talk("It is cold outside"), None, 1, rejected=[{"role": "assistant", "content": "No idea"}])
    good, bad = Example(talk("Roses grow there"), None, 2, label=True), Example(talk("Roses grow there"), None, 3, label=False)
    found = kinds(inspect_data(source, Formatted([same, other, good, bad], [], [])))
    assert found["chosen_is_rejected"] == 1 and found["contradicting_labels"] == 1
    assert "exact_duplicates" not in found


def test_fault_022_truncation_is_counted_exactly() -> None:
    rng = np.random.default_rng(3)
    lengths = rng.integers(2, 60, 200)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    trained = np.zeros(starts[-1], dtype=bool)
    for first, last, share in zip(starts[:-1], starts[1:], rng.uniform(0.05, 0.95, 200), strict=True):
        trained[last - max(1, int(share * (last - first))) : last] = True
    tokens = Tokens(np.zeros(starts[-1], np.int32), trained, starts, np.arange(200, dtype=np.int32))
    source, formatted = understood(clean_rows(200))
    report = inspect_data(source, formatted, tokens=tokens, max_length=30)
    cut, rows_cut, targets_cut = tokens.cut(30)
    assert report.truncation == {
        "max_length": 30,
        "examples_cut": rows_cut,
        "learned_tokens": int(trained.sum()),
        "learned_tokens_cut": targets_cut,
        "nothing_left": int((cut.targets == 0).sum()),
    }
    assert report.lengths["tokens"]["max"] == lengths.max()
    assert kinds(report)["nothing_learned"] == report.truncation["nothing_left"] > 0
    assert inspect_data(source, formatted, tokens=tokens, max_length=60).truncation["learned_tokens_cut"] == 0  # type: ignore[index]


def test_the_report_is_json_and_fits_a_terminal() -> None:
    rows = clean_rows(60)
    rows[8]["output"] += " <script>alert(1)</script> {{name}} <b>"
    rows.append(dict(rows[0]))
    tree = json.loads(json.dumps(report_of(rows).to_dict()))
    assert {"name", "rows", "used", "dropped", "lengths", "truncation", "scripts", "held_out", "findings", "verdict"} <= set(tree)
    assert set(tree["findings"][0]) == {"kind", "severity", "count", "share", "rows", "sentence", "fix"}
    order = [found["severity"] for found in tree["findings"]]
    assert order == sorted(order, key=["error", "warning", "note"].index)
    facts, findings = table(report_of(rows))
    assert ("rows", "61, all used") in facts and all(len(row) == 4 for row in findings)


def test_the_page_escapes_what_data_says() -> None:
    report = report_of(clean_rows(30)).to_dict() | {"name": "<script>alert(1)</script>"}
    html = page(report, samples=["<img src=x onerror=alert(1)>"])
    assert "<script" not in html and "<img" not in html
    assert "&lt;script&gt;" in html and "&lt;img" in html
    assert "http://" not in html and "https://" not in html


# --- the cleaned copy --------------------------------------------------------------------------------------


def dirty_file(folder: Path) -> Path:
    rows: list[Any] = clean_rows(200)
    rows[50]["output"] = ""
    rows[51]["output"] = None
    rows[60] = {**rows[3], "output": rows[3]["output"] + " indeed", "id": 60}
    rows[61] = {**rows[4], "id": 61}
    rows[62] = {**rows[5], "output": rows[5]["output"] + "\u200b", "id": 62}
    rows[70]["output"] += " Itâ€™s \x07 good"
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_check_of_the_cleaned_copy_finds_none_of_the_defects(tmp_path: Path) -> None:
    path = dirty_file(tmp_path)
    before = path.read_bytes()
    held_out = [clean_rows(200)[9], *clean_rows(20, seed=8)]
    done = tidy(*understood(str(path)), out=tmp_path / "clean.jsonl", held_out=understood(held_out))
    assert done["removed"] == {
        "without an answer": 1, "faulty": 1, "in the held-out data": 1, "exact duplicates": 2, "near duplicates": 1,
    }  # fmt: skip
    assert done["repaired"] == {"mojibake": 1, "control characters": 1}
    assert (done["rows"], done["written"]) == (200, 194)
    assert path.read_bytes() == before
    rows = [json.loads(line) for line in (tmp_path / "clean.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["id"] for row in rows] == [n for n in range(200) if n not in (50, 51, 60, 61, 62, 9)], "all columns, same order"
    assert rows[64]["output"].endswith(" It’s  good")
    after = report_of(str(tmp_path / "clean.jsonl"), held_out)
    assert after.findings == []
    assert list(tmp_path.glob(".*")) == []


def test_a_cleaned_copy_overwrites_nothing(tmp_path: Path) -> None:
    path = dirty_file(tmp_path)
    before = path.read_bytes()
    for out, number in ((path, 100), (tmp_path, 100), (tmp_path / "no" / "clean.jsonl", 101)):
        with pytest.raises(DataError) as caught:
            tidy(*understood(str(path)), out=out)
        assert caught.value.number == number and caught.value.fix
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_set_that_would_be_empty_is_not_written(tmp_path: Path) -> None:
    rows = clean_rows(3)
    with pytest.raises(DataError) as caught:
        tidy(*understood(rows), out=tmp_path / "clean.jsonl", held_out=understood(rows))
    assert caught.value.number == 103 and not list(tmp_path.iterdir())


# --- real sets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected", "absent"),
    [
        ("gsm8k_train.jsonl.gz", {"invisible_characters": 1}, {"mojibake", "markup", "secrets", "near_duplicates"}),
        ("llamafactory/alpaca_en_demo.json", {"exact_duplicates": 14}, {"mojibake", "secrets"}),
        ("llamafactory/identity.json", {"placeholders": 85}, {"mojibake", "secrets"}),
    ],
)
def test_real_sets(shared: Path, name: str, expected: dict[str, int], absent: set[str]) -> None:
    found = kinds(report_of(str(shared / "sft" / name)))
    assert expected.items() <= found.items()
    assert not absent & set(found)


@pytest.mark.parametrize(("part", "as_written", "found"), [("dev", 54, 56), ("test", 77, 87)])
def test_fault_027_leakage_between_real_files(shared: Path, part: str, as_written: int, found: int) -> None:
    """Of the held-out dialogues, 54 and 77 stand in the training file as they are, and a few more in other case."""
    train = str(shared / "dialogue" / "dailydialog_text_8096.txt.gz")
    report = report_of(train, str(shared / "dialogue" / f"dailydialog_{part}.tsv.gz"))
    leakage = next(one for one in report.findings if one.kind == "leakage")
    assert f"{found} word for word" in leakage.sentence and found >= as_written
    assert kinds(report)["exact_duplicates"] == 521, "497 as they are"


def folding(*steps: Any) -> SimpleNamespace:
    """A tokenizer that knows the bytes of a little ASCII text, after these steps of normalising."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.Sequence(list(steps))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    known = [*string.ascii_letters, *string.digits, *" .,!?'"]
    backend.train_from_iterator(known, trainers.BpeTrainer(vocab_size=len(known), show_progress=False))
    return SimpleNamespace(backend=backend, tokenizer=SimpleNamespace(unk_token_id=None), decode=backend.decode)


def test_characters_that_the_tokenizer_drops_are_told_and_those_it_folds_are_not() -> None:
    folds = folding(normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase(), normalizers.Replace("\u201c", "'"))
    texts = ["Caf\u00e9 \u201cBAR\u201c, \uff11 e\u0301\x07", "two\u00a0words", "C# or C++?", "1+1 = 2", "F#"]
    assert dropped_characters(texts, folds) == ("#+=", [2, 3, 4])
    assert dropped_characters(texts[:2], folds) == ("", [])
    assert dropped_characters(["\u201cHi\u201c"], folding()) == ("\u201c", [0])


def test_dropped_characters_are_a_finding_and_a_warning_with_a_place(shared: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"What is {n}?", "response": "A number." if n < 5 else "It is #6 of them."} for n in range(7)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = str(shared / "models" / "TinyStories-656K")
    found = {one.kind: one for one in check(str(path), RunConfig(), model=model).report.findings}["dropped_characters"]
    assert (found.count, found.rows[0]) == (2, f"{path} line 6") and "(#)" in found.sentence
    config = RunConfig().with_values({"model.name": model, "data.train_file": str(path)})
    (told,) = [text for text in prepare_run(config).warnings if "drops" in text]
    assert f"drops # (2 of 7 rows looked at, the first: {path} line 6)" in told
