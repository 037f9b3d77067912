"""What a study searches: a range `a..b` or a list `a,b,c` for each of some settings, checked by the config first."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from llm_finetune_kit.beginning import MECHANICS
from llm_finetune_kit.config import ALIASES, RunConfig, knobs
from llm_finetune_kit.errors import ConfigError
from llm_finetune_kit.settings import COMMAND_LINE, changed, expected

RATE = "training.learning_rate"
DEFAULT_FACTOR = 10  # each way of the planned learning rate, where no setting is given to search
EVENLY = ("lora.dropout", "training.warmup_ratio")  # shares; every other range is searched on a logarithmic scale
SEARCHED = ("lora.", "training.", "method", "model.dtype", "model.quantization")  # all else changes what is measured
OF_THE_STUDY = ("training.seed", "training.eval_steps", "training.early_stopping_patience", "training.profile")
NEAR = 0.1  # of a range, from its ends, that counts as its edge
RANGE = re.compile(r"(.*?\S)\s*\.\.\s*(\S.*)")


@dataclass(frozen=True)
class Range:
    """All numbers from `low` to `high`, or all whole ones, drawn evenly or, with `log`, evenly over their logarithms."""

    low: float
    high: float
    whole: bool
    log: bool

    def holds(self, value: Any) -> bool:
        return isinstance(value, (int, float)) and self.low <= value <= self.high

    def at(self, share: float) -> float:
        """The number that lies `share` (0 to 1) of the way through the range."""
        high = self.high + 1 if self.whole else self.high
        here = self.low * (high / self.low) ** share if self.log else self.low + share * (high - self.low)
        here = min(max(here, self.low), self.high)
        return int(here) if self.whole else here

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}{', on a logarithmic scale' if self.log else ''}"


@dataclass(frozen=True)
class Choices:
    """A few values of which each trial takes one."""

    values: tuple[Any, ...]

    def holds(self, value: Any) -> bool:
        return value in self.values

    def at(self, share: float) -> Any:
        """The value that lies `share` (0 to 1) of the way through the list."""
        return self.values[min(int(share * len(self.values)), len(self.values) - 1)]

    def __str__(self) -> str:
        return ", ".join(str(value) for value in self.values)


Space = dict[str, Range | Choices]


def searched_words(words: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """`knob=value` words apart: those to search, by their knob, and the fixed ones. Raises ConfigError for one given twice."""
    searched: dict[str, str] = {}
    fixed = []
    for word in words:
        name, _, text = word.partition("=")
        knob = ALIASES.get(name.strip().replace("-", "_"), name.strip().replace("-", "_"))
        if not _is_search(knob, text):
            fixed.append(word)
            continue
        if knob in searched:
            raise ConfigError(7, f"{knob} is given twice", where=COMMAND_LINE, fix="keep one of them")
        searched[knob] = text
    return searched, fixed


def _is_search(knob: str, text: str) -> bool:
    """Whether a value is a range or a list of choices; texts such as file names may hold commas and dots of their own."""
    if knob not in knobs():
        return False
    free = "str" in str(knobs()[knob].annotation) and not knob.startswith(SEARCHED) and knob != "model.name"
    return not free and (RANGE.fullmatch(text) is not None or len(_parts(text)) > 1)


def _parts(text: str) -> list[str]:
    """A text taken apart at the commas that stand in no brackets."""
    return [part.strip() for part in re.split(r",(?![^\[]*\])", text)]


def read_space(searched: Mapping[str, str], config: RunConfig) -> Space:
    """The ranges and choices that texts mean. Raises ConfigError for what no trial of `config` could take."""
    return {knob: _dimension(knob, text, config) for knob, text in searched.items()}


def _dimension(knob: str, text: str, config: RunConfig) -> Range | Choices:
    if knob not in knobs():
        changed(config, {}, [f"{knob}={text}"])  # raises, and says what was meant
    if not knob.startswith(SEARCHED) or knob in OF_THE_STUDY:
        why = "held-out losses can only be compared on the same rows, tokens and evaluations"
        fix = "give it one value, and make a study for each other one"
        raise ConfigError(80, f"{knob} cannot be searched", where=COMMAND_LINE, why=why, fix=fix)
    if knob.startswith(MECHANICS):
        why = "it says how a run is computed and kept; what is learned stays the same"
        raise ConfigError(80, f"{knob} cannot be searched", where=COMMAND_LINE, why=why, fix="give it one value, or leave it out")
    found = RANGE.fullmatch(text)
    if found is None:
        parts = _parts(text)
        if "" in parts:
            fix = "name a value between two commas; null leaves it to the plan"
            raise ConfigError(82, f"{knob}={text} has an empty place", where=COMMAND_LINE, fix=fix)
        values = [_value(knob, part, config) for part in parts]
        return Choices(tuple(value for place, value in enumerate(values) if value not in values[:place]))
    kinds = str(knobs()[knob].annotation)
    if "int" not in kinds and "float" not in kinds:
        fix = f"name the values to try: {knob}=A,B; it takes {expected(knob)}"
        raise ConfigError(81, f"{knob} is no number, so it has no range {text}", where=COMMAND_LINE, fix=fix)
    low, high = (_value(knob, part, config) for part in found.groups())
    if not all(isinstance(value, (int, float)) for value in (low, high)) or not low < high:
        fix = f"write the smaller number first: {RATE}=1e-4..3e-3"
        raise ConfigError(82, f"{knob}={text} is no range of numbers, from a smaller to a larger", where=COMMAND_LINE, fix=fix)
    return Range(low, high, whole="float" not in kinds, log=low > 0 and knob not in EVENLY)


def _value(knob: str, text: str, config: RunConfig) -> Any:
    """The value of a knob that a text means, once the config takes it."""
    value: Any = changed(config, {}, [f"{knob}={text}"]).model_dump()
    for part in knob.split("."):
        value = value[part]
    return value


def default_space(planned_rate: float) -> dict[str, str]:
    """What is searched where nothing was named: the learning rate around the planned one."""
    low, high = planned_rate / DEFAULT_FACTOR, min(1.0, planned_rate * DEFAULT_FACTOR)
    return {RATE: f"{low:.3g}..{high:.3g}"}


def at_edge(one: Range | Choices, value: Any) -> bool:
    """Whether a number is so near to an end of what was searched that better ones may lie beyond it."""
    if isinstance(one, Range):
        scale = math.log if one.log else float
        low, high, here = scale(one.low), scale(one.high), scale(value)
        return min(here - low, high - here) <= NEAR * (high - low)
    numbers = [other for other in one.values if isinstance(other, (int, float)) and not isinstance(other, bool)]
    return len(numbers) == len(one.values) > 2 and value in (min(numbers), max(numbers))


def combinations(space: Space) -> int | float:
    """How many different settings a space holds."""
    sizes = [len(one.values) if isinstance(one, Choices) else _numbers(one) for one in space.values()]
    return math.prod(sizes)


def _numbers(one: Range) -> int | float:
    return int(one.high) - int(one.low) + 1 if one.whole else math.inf
