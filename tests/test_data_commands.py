"""`finetune data …` as a person types it: what it prints, what it writes, and what it never touches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llm_finetune_kit.cli import main

ROWS = [
    {"prompt": f"What is the colour of thing number {index}?", "response": f"It is shade {index * 31}."} for index in range(30)
]


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    told = capsys.readouterr()
    assert "Traceback" not in told.err
    return code, told.out, told.err


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def flawed(tmp_path: Path) -> Path:
    rows = [*ROWS, ROWS[3], {"prompt": "Why?", "response": ""}, {"prompt": "How?", "response": None}]
    return write(tmp_path / "train.jsonl", rows)


def test_check_tells_what_is_wrong_where_and_what_to_do(flawed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "data", "check", flawed)
    assert code == 3, "what would stop training is an error for scripts too"
    assert (
        "exact duplicates: line 31 (as line 4)" in out.replace("\n", " ").replace("  ", " ") or "exact duplicates: line 31" in out
    )
    assert "empty answers" in out and "--fix --out clean.jsonl" in out
    assert out.splitlines()[-1] == "cannot be trained as it is: 1 thing to correct first"


def test_check_as_json_holds_the_same(flawed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "data", "check", flawed, "--json", "--model", "demo")
    found = {one["kind"]: one["count"] for one in json.loads(out)["findings"]}
    assert found["exact_duplicates"] == 1 and found["empty_answers"] == 1


def test_a_fixed_copy_is_clean_and_the_original_untouched(flawed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, clean = flawed.read_bytes(), flawed.with_name("clean.jsonl")
    code, out, _ = run(capsys, "data", "check", flawed, "--fix", "--out", clean)
    assert code == 0 and "30 of 33 rows" in out and flawed.read_bytes() == before
    assert [json.loads(line) for line in clean.read_text().splitlines()] == ROWS
    code, _, err = run(capsys, "data", "check", flawed, "--fix", "--out", clean)
    assert code == 3 and "clean.jsonl" in err, "what exists is not overwritten"
    _, out, _ = run(capsys, "data", "check", clean, "--json")
    assert not {one["kind"] for one in json.loads(out)["findings"]} & {"exact_duplicates", "empty_answers", "faulty_rows"}


def test_a_line_that_cannot_be_read_is_an_error_and_the_copy_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    half, clean = write(tmp_path / "half.jsonl", ROWS), tmp_path / "clean.jsonl"
    lines = half.read_text(encoding="utf-8").splitlines()
    half.write_text("\n".join([*lines[:10], lines[10][:20], *lines[11:]]), encoding="utf-8")
    code, out, _ = run(capsys, "data", "check", half)
    assert code == 3 and "unreadable lines: line 11" in out and "30, of which 29 become examples" in out
    assert "read as" in out and "prompt-response: found prompt + response" in out
    assert out.splitlines()[-1] == "cannot be trained as it is: 1 thing to correct first"
    assert run(capsys, "data", "preview", half, "--model", "demo")[0] == 3, "training would stop too"
    found = json.loads(run(capsys, "data", "check", half, "--json")[1])
    assert found["format"] == "prompt-response" and found["dropped"][0]["places"] == [f"{half} line 11"]
    code, out, _ = run(capsys, "data", "check", half, "--fix", "--out", clean)
    assert code == 0 and "1  unreadable" in out and "half.jsonl line 11: broken JSON" in out and "29 of 30 rows" in out
    assert "line 11" in run(capsys, "data", "convert", half, "--to", "messages", "--out", tmp_path / "talks.jsonl")[2]


def test_leakage_into_the_eval_set_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, apart = (
        write(tmp_path / "train.jsonl", ROWS),
        write(tmp_path / "eval.jsonl", [ROWS[5], {"prompt": "x y z?", "response": "No."}]),
    )
    _, out, _ = run(capsys, "data", "check", train, "--eval", apart)
    assert "leak" in out and "line 6" in out


def test_pages_are_written_without_network_or_scripts(flawed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (("check", flawed), ("preview", "sample:chat")):
        page = tmp_path / f"{words[0]}.html"
        code, _, _ = run(capsys, "data", *words, "--model", "demo", "--html", page)
        html = page.read_text(encoding="utf-8")
        assert (
            code == (3 if words[0] == "check" else 0)
            and "<script" not in html
            and "://" not in html
            and str(tmp_path) not in html
        )
        assert 'class="xray"' in html


def test_preview_marks_what_is_learned(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "data", "preview", "sample:chat", "--model", "demo", "--count", "2")
    assert code == 0 and out.count("⟦") == 3, "the legend and one answer in each of two examples"
    assert "20 examples" in out and "the gate lets it pass" in out
    _, out, _ = run(capsys, "data", "preview", "sample:chat", "--model", "demo", "--json", "--count", "1")
    (example,) = json.loads(out)["examples"]
    learned = "".join(token["text"] for token in example["tokens"] if token["state"] == "trained")
    rows = json.loads((Path("src/llm_finetune_kit/assets/samples/chat.json")).read_text(encoding="utf-8"))
    assert learned.removesuffix("<|end|>") in [row["response"] for row in rows]


def test_preview_shows_what_the_gate_would_refuse(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "data", "preview", "sample:chat", "--model", "demo", "--max-length", "20", "--count", "1")
    assert code == 0 and "⟨" in out and "training would stop here: error[DATA-13" in out


@pytest.mark.parametrize("ending", ["jsonl", "json.gz", "csv", "parquet"])
def test_converted_rows_are_the_same_rows(flawed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], ending: str) -> None:
    out = tmp_path / f"rows.{ending}"
    code, said, err = run(capsys, "data", "convert", flawed, "--to", "prompt-response", "--out", out)
    assert code == 0 and said.startswith("31 rows written") and "2 rows could not be used" in err
    from llm_finetune_kit import load_dataset

    assert [dict(row) for row in load_dataset(str(out))][:30] == ROWS
    code, _, err = run(capsys, "data", "convert", flawed, "--to", "messages", "--out", out)
    assert code == 3 and "exists" in err


def test_the_settings_of_a_config_are_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = write(tmp_path / "odd.jsonl", [{"frage": row["prompt"], "antwort": row["response"]} for row in ROWS])
    assert run(capsys, "data", "check", odd)[0] == 3
    code, out, _ = run(capsys, "data", "check", odd, "data.columns={prompt: frage, response: antwort}")
    assert code == 0 and "30, all used" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data", "chekc", "x"], "did you mean `finetune data check`?"),
        (["data", "check"], "no data is named"),
        (["data", "check", "a.jsonl", "b.jsonl"], "more than one data set"),
        (["data", "check", "a.jsonl", "--fix"], "--fix needs --out"),
        (["data", "preview", "sample:chat"], "--model is missing"),
    ],
)
def test_a_wrong_command_line_is_a_usage_error(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, *words)
    assert code == 2 and said in err


def test_the_cache_is_listed_and_cleared(flawed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "data", "preview", write(flawed.with_name("good.jsonl"), ROWS), "--model", "demo")
    assert "good.jsonl" in run(capsys, "data", "cache", "--json")[1]  # the table folds a long path
    assert "entries" in run(capsys, "data", "cache")[1]
    code, out, _ = run(capsys, "data", "cache", "clear")
    assert code == 0 and "removed" in out
    assert run(capsys, "data", "cache", "list")[1].startswith("0 entries")


def test_settings_of_data_are_flags_too(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "rows.jsonl").write_text('{"q": "Where?", "b": "Here."}\n{"q": "Why?", "b": "So."}\n')
    assert main(["data", "check", str(tmp_path / "rows.jsonl"), "--columns", "{prompt: q, response: b}"]) == 0
    assert "good to train" in capsys.readouterr().out
