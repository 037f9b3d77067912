"""Golden token sets: what fixed conversations become under each family of templates, token for token."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from families import SHARED
from golden import make

pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="the folder with real templates is not here")


def test_there_is_a_set_for_each_family_and_no_other() -> None:
    assert {path.name for path in make.HERE.glob("*.json")} == {make.path_of(name).name for name in make.NAMES}
    assert len(make.NAMES) >= 12


@pytest.mark.parametrize("name", make.NAMES)
def test_tokens_and_learned_flags_are_those_written_down(name: str) -> None:
    path: Path = make.path_of(name)
    assert make.token_set(name) == json.loads(path.read_text(encoding="utf-8"))
