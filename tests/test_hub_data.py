"""Hub datasets through the real client, from a stand-in hub: splits, configs, what is refused, and a second time offline."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hub_data import COMMIT, DataHub
from loopback import serving

DIALOG = "li2017dailydialog/daily_dialog"
ASK = """
import json, sys
from llm_finetune_kit.data.sources import held_out_beside, read_source
from llm_finetune_kit.errors import KitError
answers = []
for spec in json.loads(sys.argv[1]):
    try:
        if spec.startswith("beside "):
            answers.append(held_out_beside(spec.removeprefix("beside ")))
        else:
            found = read_source(spec)
            places = [found.place(0), found.place(len(found.rows) - 1)]
            licence = found.licence.name if found.licence else None
            answers.append([found.name, found.rows, found.fingerprint, found.notes, licence, places])
    except KitError as error:
        answers.append(str(error))
print(json.dumps(answers))
"""


def table(count: int, word: str) -> pa.Table:
    return pa.table({"instruction": [f"{word} {i}?" for i in range(count)], "output": [f"{i}!" for i in range(count)]})


def dataset(folder: Path, files: dict[str, pa.Table | bytes | str]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, pa.Table):
            pq.write_table(content, path)
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub_data")


@pytest.fixture(scope="module")
def hub(place: Path) -> Iterator[DataHub]:
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/train.parquet\n"
        f"  - split: {other}\n    path: {name}/rest.parquet\n"
        for name, other in (("en", "test"), ("de", "odd_part"))
    )
    parts = {"train-00000-of-00001.parquet": table(40, "train"), "validation-00000-of-00001.parquet": table(7, "held")}
    plain = {f"data/{name}": rows for name, rows in parts.items()} | {"README.md": "---\nlicense: cc-by-nc-4.0\n---\n# x\n"}
    several = {f"{name}/{part}.parquet": table(10, name) for name in ("en", "de") for part in ("train", "rest")}
    trap = "from pathlib import Path\nPath('ran').touch()\n"
    served = {
        "own/plain": dataset(place / "plain", plain),
        "own/configs": dataset(place / "configs", several | {"README.md": f"---\nconfigs:\n{configs}---\n"}),
        "own/lines": dataset(place / "lines", {"train.json.gz": gzip.compress(b'[{"text": "one"}, {"text": "two"}]')}),
        "own/script": dataset(place / "script", {"script.py": trap, "README.md": "x"}),
        "own/pickle": dataset(place / "pickle", {"train.pkl": b"\x80\x04K\x01.", "README.md": "x"}),
        "own/pictures": dataset(place / "pictures", {"train/a.png": b"\x89PNG", "train/b.png": b"\x89PNG"}),
        "own/gated": dataset(place / "gated", {"train.jsonl": '{"text": "x"}\n'}),
        DIALOG: dataset(place / "dialog", {"daily_dialog.py": trap, "README.md": "x"}),
    }
    talk = pa.table({"dialog": [["Hi .", "Hello ."], ["Bye ."]], "act": [[1, 2], [3]]})
    copy = {"default/train/0000.parquet": talk, "default/validation/0000.parquet": talk.slice(1)}
    with serving(DataHub(served, {DIALOG: dataset(place / "converted", copy)}, gated={"own/gated"})) as running:
        yield running


def ask(place: Path, environment: dict[str, str], *specs: str) -> list[Any]:
    """What a fresh process reads, in an empty folder."""
    home = place / "empty"
    home.mkdir(exist_ok=True)
    settings = os.environ | {"HF_HOME": str(place / "home")} | environment
    words = [sys.executable, "-c", ASK, json.dumps(specs)]
    done = subprocess.run(words, capture_output=True, text=True, env=settings, cwd=home, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "nothing but the answer is said"
    assert not (home / "ran").exists(), "no code of a dataset is run"
    answers: list[Any] = json.loads(done.stdout)
    return answers


READ = (
    "own/plain",
    "own/plain:val[:3]",
    "own/plain[50%:]#5",
    "own/configs:de",
    "own/configs:de:odd_part",
    "own/lines",
    "daily_dialog",
)
BESIDE = (
    "beside own/plain",
    "beside own/plain:train[:10%]",
    "beside own/configs:de",
    "beside own/configs:en",
    "beside daily_dialog",
)


@pytest.fixture(scope="module")
def first(hub: DataHub, place: Path) -> list[Any]:
    return ask(place, hub.environment, *READ, *BESIDE)


def test_a_hub_dataset_is_its_training_split(first: list[Any]) -> None:
    name, rows, _, notes, licence, places = first[0]
    assert name == "own/plain:train" and rows == table(40, "train").to_pylist()
    assert places == ["own/plain:train row 1", "own/plain:train row 40"]
    assert licence == "cc-by-nc-4.0" and notes == []


def test_splits_slices_and_numbers_keep_the_places_of_the_split(first: list[Any]) -> None:
    assert first[1][1] == table(3, "held").to_pylist(), "val means the split that is called validation"
    _, rows, _, notes, _, places = first[2]
    numbers = [int(row["output"][:-1]) for row in rows]
    assert len(numbers) == 5 and numbers == sorted(set(numbers)) and numbers[0] >= 20
    assert places == [f"own/plain:train row {numbers[0] + 1}", f"own/plain:train row {numbers[-1] + 1}"]
    assert "5 of 40 rows of own/plain:train, chosen by seed 42" in notes
    assert len({answer[2] for answer in first[: len(READ)]}) == len(READ), "each choice has a fingerprint of its own"


def test_configs_are_named_between_colons(first: list[Any]) -> None:
    assert first[3][0] == "own/configs:de:train" and first[3][1] == table(10, "de").to_pylist()
    assert first[4][0] == "own/configs:de:odd_part"
    assert first[5][1] == [{"text": "one"}, {"text": "two"}]


def test_daily_dialog_comes_from_the_copy_that_needs_no_script(first: list[Any]) -> None:
    name, rows, _, _, licence, _ = first[6]
    assert name == f"{DIALOG}:train" and rows[0] == {"dialog": ["Hi .", "Hello ."], "act": [1, 2]}
    assert licence == "CC BY-NC-SA 4.0"


def test_the_validation_split_lies_beside(first: list[Any]) -> None:
    expected = ["own/plain:validation", "own/plain:validation", None, "own/configs:en:test", "daily_dialog:validation"]
    assert first[len(READ) :] == expected


def test_the_second_time_needs_no_network(first: list[Any], place: Path) -> None:
    nobody = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    for environment in (nobody, {"HF_HUB_OFFLINE": "1"}):
        specs = [spec for spec in READ if "odd" not in spec]
        again = ask(place, environment, *specs, "own/unseen", "alpaca")
        before = [answer for spec, answer in zip(READ, first, strict=False) if spec in specs]
        assert [answer[:3] for answer in again[:-2]] == [answer[:3] for answer in before]
        assert all("the copy on this machine is used" in answer[3][0] for answer in again[:-2])
        for name, refusal in (("own/unseen", again[-2]), ("tatsu-lab/alpaca", again[-1])):
            assert f"{name} is no file here and not in the hub's cache, and the hub cannot be reached" in refusal


def test_what_the_hub_cannot_give_is_told_with_a_way_out(hub: DataHub, place: Path) -> None:
    cases = {
        "own/none": ("DATA-070", "no such dataset", "HF_TOKEN"),
        "own/gated": ("DATA-071", "gated", "accept its terms"),
        "own/configs": ("DATA-072", "en, de", "own/configs:en"),
        "own/configs:eng": ("DATA-072", "no config 'eng'", "did you mean en?"),
        "own/configs:en:dev": ("DATA-073", "train, test", "own/configs:train"),
        "own/plain:nope": ("DATA-072", "no split 'nope'", "own/plain:train"),
        "own/script": ("DATA-074", "only a loading script", "download the data"),
        "own/pickle": ("DATA-075", "no data file", "JSON, CSV, Parquet"),
        "own/pictures": ("DATA-075", "imagefolder", "JSON, CSV, Parquet"),
        "own/plain[60:]": ("DATA-061", "rows 40 to 40 of 40", "wider slice"),
    }
    for (spec, words), answer in zip(cases.items(), ask(place, hub.environment, *cases), strict=True):
        assert isinstance(answer, str) and all(word in answer for word in words), (spec, answer)


def test_nothing_but_the_dataset_is_asked_for(hub: DataHub, place: Path) -> None:
    hub.asked.clear()
    answer = ask(place, hub.environment | {"HF_HOME": str(place / "other")}, "own/plain")
    assert len(answer[0][1]) == 40
    strange = [line for line in hub.asked if "own/plain" not in line]
    assert strange == [], "no counting, no other dataset"
    assert any(f"/resolve/{COMMIT}/data/train" in line for line in hub.asked)
