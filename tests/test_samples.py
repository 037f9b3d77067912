"""The sample sets: twenty rows each, in one style, each row different, and what they say is right."""

from __future__ import annotations

import io
import itertools
import re
import shutil
import sqlite3
import subprocess
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from llm_finetune_kit.config import DataSection
from llm_finetune_kit.data.prepare import read
from llm_finetune_kit.data.sources import read_source
from llm_finetune_kit.data.sources.files import sample_names

FORMAT = {
    "chat": "prompt-response", "code": "prompt-response", "instruct": "alpaca", "summarization": "alpaca",
    "translation": "messages",
}  # fmt: skip
SPLIT = re.compile(r"(?<=[.!?]) ")


def rows(name: str) -> list[dict[str, Any]]:
    return list(read_source(f"sample:{name}").rows)


def parts(row: dict[str, Any]) -> tuple[str, str]:
    """All that is asked and all that is answered in a row."""
    if "messages" in row:
        said = {role: [m["content"] for m in row["messages"] if m["role"] == role] for role in ("user", "assistant")}
        return "\n".join(said["user"]), "\n".join(said["assistant"])
    asked = row.get("prompt") or f"{row['instruction']}\n{row['input']}".strip()
    return str(asked), str(row.get("response") or row["output"])


def test_there_are_these_sets() -> None:
    assert sample_names() == sorted(FORMAT)


@pytest.mark.parametrize("name", FORMAT)
def test_twenty_rows_are_read_without_a_remark(name: str) -> None:
    data = read(f"sample:{name}", DataSection())
    assert data.formatted is not None and len(data.formatted.examples) == 20
    assert data.report["format"] == FORMAT[name]
    assert not data.report["dropped"] and not data.report["warnings"]


@pytest.mark.parametrize("name", FORMAT)
def test_no_row_repeats_another(name: str) -> None:
    """Word by word, no two rows of a set share half of what they ask and answer, shared openings aside."""
    found = [{text for part in parts(row) for text in _triples(part)} for row in rows(name)]
    common = {triple for triple in set().union(*found) if sum(triple in one for one in found) > 5}
    for (i, one), (j, other) in itertools.combinations(enumerate(found), 2):
        one, other = one - common, other - common
        assert len(one & other) < 0.5 * min(len(one), len(other)), (name, i, j)


def _triples(text: str) -> list[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return list(zip(words, words[1:], words[2:], strict=False))


@pytest.mark.parametrize("name", FORMAT)
def test_texts_are_clean(name: str) -> None:
    for row in rows(name):
        for text in parts(row):
            assert text == text.strip() and "  \n" not in text and "\t" not in text
            assert not re.search(r"[\x00-\x09\x0b-\x1f\u200b\ufffd]|lorem|TODO|\{\{", text)


# --- code --------------------------------------------------------------------------------------------------


def code(language: str) -> list[str]:
    found = []
    for row in rows("code"):
        match = re.fullmatch(r"[A-Z].+\.\n\n```(\w+)\n(.+)\n```\n\nNote: .+\.", row["response"], re.DOTALL)
        assert match, row["prompt"]
        found += [match[2]] if match[1] == language else []
    return found


def test_code_is_in_three_languages() -> None:
    counts = {language: len(code(language)) for language in ("python", "sql", "bash")}
    assert counts == {"python": 12, "sql": 4, "bash": 4}


PYTHON_CHECKS = {
    "is_palindrome": "is_palindrome('Never odd or even') and not is_palindrome('ab') and is_palindrome('')",
    "fib": "[fib(n) for n in range(8)] == [0, 1, 1, 2, 3, 5, 8, 13]",
    "merge": "merge([1, 4, 4], [0, 4, 9]) == [0, 1, 4, 4, 4, 9] and merge([], [2]) == [2]",
    "top_words": "top_words(\"It is. Is it? It isn't!\", 2) == [('it', 3), ('is', 2)]",
    "binary_search": "[binary_search([2, 3, 5, 7], n) for n in (2, 7, 4, 9)] == [0, 3, -1, -1] and binary_search([], 1) == -1",
    "balanced": "balanced('f(a[0], {1: 2})') and not any(map(balanced, ['((', '(]', ')']))",
    "flatten": "list(flatten([1, [2, [3, []]], 'ab'])) == [1, 2, 3, 'ab']",
    "to_roman": "[to_roman(n) for n in (1, 4, 14, 1994, 3999)] == ['I', 'IV', 'XIV', 'MCMXCIV', 'MMMCMXCIX']",
    "primes": "primes(30) == [2, 3, 5, 7, 11, 13, 17, 19, 23, 29] and primes(2) == [2] and primes(1) == primes(0) == []",
    "retry": "works_at_third(3) == 'done' and fails_of_two(2)",
    "group_anagrams": "group_anagrams(['Tea', 'eat', 'tan', 'ate', 'nat']) == [['Tea', 'eat', 'ate'], ['tan', 'nat']]",
    "clock": "[clock(3725), clock(0), clock(129600)] == ['1h 02m 05s', '0h 00m 00s', '36h 00m 00s']",
}


def retry_helpers(space: dict[str, Any]) -> dict[str, Any]:
    """Functions that call a function wrapped by `retry`, which fails twice and then works."""

    def attempt(times: int) -> str:
        left = [ValueError(), ValueError()]

        @space["retry"](times)
        def work() -> str:
            if left:
                raise left.pop()
            return "done"

        return str(work())

    def fails(times: int) -> bool:
        with pytest.raises(ValueError):
            attempt(times)
        return True

    return {"works_at_third": attempt, "fails_of_two": fails}


@pytest.mark.parametrize("name", PYTHON_CHECKS)
def test_python_answers_do_what_they_say(name: str) -> None:
    source = next(text for text in code("python") if f"def {name}(" in text)
    space: dict[str, Any] = {}
    exec(compile(source, name, "exec"), space)
    if name == "retry":
        space |= retry_helpers(space)
    assert eval(PYTHON_CHECKS[name], space)


def test_every_python_answer_has_a_check() -> None:
    defined = [re.findall(r"^def (\w+)\(", text, re.MULTILINE)[-1] for text in code("python")]
    assert sorted(defined) == sorted(PYTHON_CHECKS)


def test_sql_answers_do_what_they_say() -> None:
    base = sqlite3.connect(":memory:", isolation_level=None)
    base.executescript("""
        CREATE TABLE customers(id, name); CREATE TABLE orders(id, customer_id, amount); CREATE TABLE users(id, email);
        CREATE TABLE employees(name, department, salary); CREATE TABLE accounts(id, balance);
        INSERT INTO customers VALUES (1, 'Ana'), (2, 'Bo'), (3, 'Cy'); INSERT INTO orders VALUES (1, 2, 10), (2, 2, 5), (3, 1, 7);
        INSERT INTO users VALUES (1, 'a@x'), (2, 'b@x'), (3, 'a@x');
        INSERT INTO employees VALUES ('Ed', 'it', 5), ('Flo', 'it', 5), ('Gus', 'it', 4), ('Hu', 'hr', 1);
        INSERT INTO accounts VALUES (1, 80), (2, 0);""")
    totals, repeated, best, transfer = code("sql")
    assert base.execute(totals).fetchall() == [("Bo", 15), ("Ana", 7), ("Cy", 0)]
    assert base.execute(repeated).fetchall() == [("a@x", 2)]
    assert base.execute(best).fetchall() == [("Hu", "hr", 1), ("Ed", "it", 5), ("Flo", "it", 5)]
    base.executescript(transfer)
    assert base.execute("SELECT balance FROM accounts ORDER BY id").fetchall() == [(30,), (50,)]


@pytest.mark.skipif(not shutil.which("bash"), reason="there is no bash here")
def test_shell_answers_do_what_they_say(tmp_path: Path) -> None:
    def bash(script: str, *words: str) -> tuple[int, str]:
        done = subprocess.run(["bash", "-c", script, "me", *words], cwd=tmp_path, capture_output=True, text=True, timeout=120)
        return done.returncode, done.stdout

    largest, rename, count, folder = code("bash")
    for size in range(1, 8):
        (tmp_path / f"f{size}").write_bytes(b"x" * size)
    if "GNU" in bash("find --version")[1]:
        assert bash(largest)[1].split("\n")[:5] == [f"{size} ./f{size}" for size in (7, 6, 5, 4, 3)]
    for name, text in {"a b.jpeg": "1", "c.jpeg": "2", "c.jpg": "kept"}.items():
        (tmp_path / name).write_text(text)
    bash(rename)
    assert (tmp_path / "a b.jpg").read_text() == "1" and (tmp_path / "c.jpg").read_text() == "kept"
    (tmp_path / "access.log").write_text("1.1.1.1 GET /\n2.2.2.2 GET /\n1.1.1.1 GET /x\n")
    assert [line.split() for line in bash(count)[1].splitlines()] == [["2", "1.1.1.1"], ["1", "2.2.2.2"]]
    assert bash(folder)[0] == 2 and bash(folder, "gone")[0] == 1 and bash(folder, ".") == (0, "checking .\n")


# --- the other sets ----------------------------------------------------------------------------------------


def test_instruct_examples_print_what_their_comments_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for row in rows("instruct"):
        match = re.fullmatch(r"[A-Z].+\.\n\nExample:\n```python\n(.+)\n```", row["output"], re.DOTALL)
        assert match, row["instruction"]
        expected = re.findall(r"^(?:print\(.*\)  )?# (.*)$", match[1], re.MULTILINE)
        printed = io.StringIO()
        with redirect_stdout(printed):
            exec(compile(match[1], row["instruction"], "exec"), {})
        assert printed.getvalue().splitlines() == expected, row["instruction"]


def test_summaries_are_short_and_hold_to_their_text() -> None:
    for row in rows("summarization"):
        text, summary = row["input"], row["output"]
        assert 60 <= len(text.split()) <= 120 and len(summary.split()) <= 45
        assert summary.startswith("In short, ") and 1 <= len(SPLIT.split(summary)) <= 2
        assert set(re.findall(r"\d+", summary)) <= set(re.findall(r"\d+", text)), summary


def test_translations_keep_to_the_language_that_is_asked_for() -> None:
    small = {
        "French": "le la les du de des nous l j ne s ma mes une un",
        "German": "die der das wir bitte sie ist im nach meinem eine nummer",
        "Spanish": "el la los de por para nadie que tu me y",
        "Dutch": "de het een mijn ze dan u is van er",
    }
    asked: list[str] = []
    for row in rows("translation"):
        turns = row["messages"]
        assert turns[0]["content"].startswith("Translate into ") and len(turns) in (2, 4)
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            language = next(word for word in small if f"into {word}" in question["content"])
            words = set(re.findall(r"\w+", answer["content"].lower()))
            scores = {name: len(words & set(some.split())) for name, some in small.items()}
            assert scores[language] == max(scores.values()) > 0, (language, answer, scores)
            asked.append(language)
    assert len(asked) == 24 and all(asked.count(language) >= 5 for language in small)
