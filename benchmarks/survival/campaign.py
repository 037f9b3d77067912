"""The campaign against runs: killed, stopped, out of disk and damaged, again and again; none may be lost.

    python benchmarks/survival/campaign.py --seed 1 --kills 1000 --stops 200 --damages 1000 --points

Every trial is a real `finetune` run of a tiny model in a process of its own. It counts as survived if, after however
many faults and resumes, its losses (hexadecimal), evaluations, answers, final weights and last checkpoint (weights
and optimizer, by SHA-256) are those of the same run without a fault. What is found goes to a result file, which is
written anew after each trial, so a campaign can be stopped at any time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import shutil
import signal
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm_finetune_kit.events import Resumed, Stepped
from llm_finetune_kit.files import damage, write_json
from llm_finetune_kit.folder import RunFolder
from llm_finetune_kit.hardware import versions
from nursery import Nursery
from runs_to_kill import KINDS, command, make_material
from story import story

MOST_KILLS = 5  # of one run
IN_A_SAVE = 0.3  # share of the kills that wait for a save to begin


@dataclass
class Campaign:
    """Where trials work, what they are compared with and what came of them."""

    place: Path
    seed: int
    nursery: Nursery
    stories: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    found: dict[str, Any] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    child: int = 0  # the process of the trial

    @property
    def outputs(self) -> Path:
        return self.place / "outputs"

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.outputs / "run")

    @property
    def said(self) -> Path:
        return self.place / "said"

    def fresh(self) -> None:
        shutil.rmtree(self.outputs, ignore_errors=True)
        self.said.write_text("")

    def start(self, words: list[str], fault: str | None = None) -> int:
        return self.nursery.start(*words, output=self.said, fault=fault)

    def run(self, words: list[str], fault: str | None = None) -> int:
        self.start(words, fault)
        return self.nursery.end()

    def words_to_go_on(self, kind: str) -> list[str]:
        """Resume the run; one that had not begun, and lost nothing, is started again."""
        if not (self.folder.path / "resolved.json").is_file():
            shutil.rmtree(self.outputs, ignore_errors=True)
            return command(self.place, kind, self.outputs)
        return ["resume", str(self.folder.path)]

    def reference(self, kind: str) -> dict[str, Any]:
        """The story of a run of a kind that nothing happened to, and how long it took."""
        if kind not in self.stories:
            self.fresh()
            self.run(command(self.place, kind, self.outputs))  # fills the caches
            self.fresh()
            began = time.monotonic()
            code = self.run(command(self.place, kind, self.outputs))
            assert code == 0, self.said.read_text()
            self.seconds[kind] = time.monotonic() - began
            self.stories[kind] = story(self.folder)
        return self.stories[kind]

    def judge(self, kind: str, code: int, what: str) -> bool:
        """Whether the run ended as the reference did; what is lost is kept for a look."""
        try:
            good = code == 0 and story(self.folder) == self.stories[kind]
        except Exception as error:
            good, what = False, f"{what}: {error!r}"
        if not good:
            kept = self.place / f"lost-{len(self.lost)}"
            shutil.copytree(self.outputs, kept, dirs_exist_ok=True)
            shutil.copy(self.said, kept / "said")
            self.lost.append(f"{kind}, {what}, exit {code}, kept in {kept.name}")
        return good

    def keep(self, out: Path) -> None:
        facts = {
            "date": time.strftime("%Y-%m-%d"),
            "seed": self.seed,
            "versions": versions(),
            "system": platform.platform(),
            "kinds": list(KINDS),
            "seconds_of_a_run": {kind: round(seconds, 2) for kind, seconds in self.seconds.items()},
        }
        write_json(out, facts | self.found | {"lost": self.lost})


# --- killed at random --------------------------------------------------------------------------------------


def where_it_is(campaign: Campaign) -> str:
    """What the run is doing now, as far as its folder tells."""
    path = campaign.folder.path
    if any(path.glob(".tmp-*")) or any(path.glob(".old-*")) or any(path.glob(".trash-*")):
        return "in a save"
    if not (path / "resolved.json").is_file():
        return "before it began"
    told = (path / "events.jsonl").read_text(errors="replace") if (path / "events.jsonl").is_file() else ""
    if '{"event": "Stepped"' not in told:
        return "before the first step"
    return "after the last step" if '"name": "best"' in told or '"folder": "final"' in told else "between or in steps"


def kill_at_random(campaign: Campaign, chance: random.Random, kind: str, number: int) -> str:
    """Send a signal at a random moment; where the run was then."""
    wait = chance.uniform(0, 1.05 * campaign.seconds[kind])
    until = time.monotonic() + wait
    if chance.random() < IN_A_SAVE:  # from that moment on, when a save begins
        last = until + 2 * campaign.seconds[kind]
        while time.monotonic() < last and not (time.monotonic() > until and any(campaign.folder.path.glob(".tmp-*"))):
            time.sleep(0.0005)
        time.sleep(chance.uniform(0, 0.008))
    else:
        time.sleep(wait)
    place = where_it_is(campaign)
    with suppress(ProcessLookupError):  # it has ended meanwhile
        os.kill(campaign.child, number)
    return place


def kills(campaign: Campaign, chance: random.Random, count: int, out: Path) -> None:
    """SIGKILL at random moments, inside saves too, up to five times a run."""
    places: Counter[str] = Counter()
    runs = 0
    while places.total() < count:
        kind = chance.choice(list(KINDS))
        campaign.reference(kind)
        campaign.fresh()
        words, hit = command(campaign.place, kind, campaign.outputs), 0
        while True:
            campaign.child = campaign.start(words)
            if hit >= MOST_KILLS or (hit and chance.random() < 0.4):
                code = campaign.nursery.end()
                break
            place = kill_at_random(campaign, chance, kind, signal.SIGKILL)
            code = campaign.nursery.end()
            if code != -signal.SIGKILL:
                break
            places[place] += 1
            hit += 1
            words = campaign.words_to_go_on(kind)
        runs += 1
        campaign.judge(kind, code, f"after {hit} kills")
        campaign.found["kills"] = {"kills": places.total(), "runs": runs, "places": dict(places)}
        campaign.keep(out)


def stops(campaign: Campaign, chance: random.Random, count: int, out: Path) -> None:
    """SIGTERM at random moments: saved at a step boundary, none lost, 143, and the same end after the resume."""
    places: Counter[str] = Counter()
    slowest, steps_lost, wrong_codes = 0.0, 0, Counter()
    while places.total() < count:
        kind = chance.choice(list(KINDS))
        campaign.reference(kind)
        campaign.fresh()
        campaign.child = campaign.start(command(campaign.place, kind, campaign.outputs))
        place = kill_at_random(campaign, chance, kind, signal.SIGTERM)
        began = time.monotonic()
        code = campaign.nursery.end()
        slowest = max(slowest, time.monotonic() - began)
        if code == 0:  # it had ended already
            continue
        if code not in (143, -signal.SIGTERM):  # the second: before the program could hear signals
            wrong_codes[code] += 1
        places[place] += 1
        told = campaign.folder.replay()
        reached = max((event.step for event in told if isinstance(event, Stepped)), default=0)
        code = campaign.run(campaign.words_to_go_on(kind))
        went_on = [event.step for event in campaign.folder.replay() if isinstance(event, Resumed)]
        steps_lost += reached - went_on[-1] if went_on else 0  # without one it had come to its end
        campaign.judge(kind, code, "after SIGTERM")
        campaign.found["stops"] = {
            "stops": places.total(),
            "places": dict(places),
            "slowest_seconds": round(slowest, 2),
            "steps_lost": steps_lost,
            "wrong_exit_codes": dict(wrong_codes),
        }
        campaign.keep(out)


# --- every step on the disk --------------------------------------------------------------------------------


def steps_on_the_disk(campaign: Campaign, kind: str) -> int:
    """How many steps on the disk a whole run of a kind takes: each is a point to crash at."""
    campaign.reference(kind)
    campaign.fresh()
    assert campaign.run(command(campaign.place, kind, campaign.outputs), "any:1000000:kill") == 0
    return int(re.findall(r"STEPS ON THE DISK (\d+)", campaign.said.read_text())[-1])


def points(campaign: Campaign, kind: str, effects: list[str], every: int, out: Path) -> None:
    """A fault at every `every`-th step on the disk of a run, from its beginning over its saves to its report.

    A save takes some 25 of these steps; those from 100 to 140 hold a whole one, and are all tried.
    """
    total = steps_on_the_disk(campaign, kind)
    tried = sorted({*range(1, total + 1, every), *(range(100, min(total, 140) + 1) if every < 10 else ())})
    codes: dict[str, Counter[str]] = {effect: Counter() for effect in effects}
    for effect in effects:
        for point in tried:
            campaign.fresh()
            code = campaign.run(command(campaign.place, kind, campaign.outputs), f"any:{point}:{effect}")
            codes[effect][str(code)] += 1
            again = campaign.words_to_go_on(kind)
            if code != 0 or not campaign.folder.finished:
                code = campaign.run(again)
            campaign.judge(kind, code, f"{effect} at step {point} of {total} on the disk")
            told = {name: dict(counted) for name, counted in codes.items()}
            campaign.found.setdefault("points", {})[kind] = {"steps_on_the_disk": total, "tried": len(tried), "exit_codes": told}
            campaign.keep(out)


# --- damaged checkpoints -----------------------------------------------------------------------------------


def harm(folder: Path, chance: random.Random) -> str:
    """Damage a checkpoint in one of eight ways; which."""
    path = chance.choice(sorted(path for path in folder.iterdir() if path.is_file()))
    content = bytearray(path.read_bytes())
    way = chance.choice(["flip", "cut", "lose", "zero", "swap", "lengthen", "overwrite", "empty"])
    if way == "flip":
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    elif way == "cut":
        del content[chance.randrange(len(content)) :]
    elif way in ("zero", "overwrite"):
        start = chance.randrange(len(content))
        size = min(len(content) - start, chance.randint(1, 4096))
        before = bytes(content[start : start + size])
        content[start : start + size] = bytes(size) if way == "zero" else chance.randbytes(size)
        if content[start : start + size] == before:
            content[start] ^= 255
    elif way == "lengthen":
        content += b"x"
    elif way == "empty":
        content.clear()
    elif way == "swap":
        other = chance.choice(sorted(p for p in folder.iterdir() if p.is_file() and p != path))
        content[:], same = other.read_bytes(), path.read_bytes()
        if bytes(content) == same:
            content += b"x"
    if way == "lose":
        path.unlink()
    else:
        path.write_bytes(content)
    return f"{way} {path.name}"


def damages(campaign: Campaign, chance: random.Random, count: int, out: Path) -> None:
    """Checkpoints damaged at random: each has to be noticed; every fiftieth run is resumed, from the one before."""
    kind = "lora"
    campaign.reference(kind)
    campaign.fresh()
    campaign.run(command(campaign.place, kind, campaign.outputs))
    shutil.rmtree(campaign.folder.final)  # as if it had died before its end
    original = campaign.place / "original"
    shutil.rmtree(original, ignore_errors=True)
    shutil.copytree(campaign.folder.path, original)
    ways: Counter[str] = Counter()
    silent, resumed = [], 0
    for number in range(count):
        newest = campaign.folder.checkpoints()[0]
        shutil.rmtree(newest)
        shutil.copytree(original / newest.name, newest)
        assert damage(newest) is None
        way = harm(newest, chance)
        ways[way.partition(" ")[0]] += 1
        if damage(newest) is None:
            silent.append(way)
        if number % 50 == 0:
            resumed += 1
            campaign.judge(kind, campaign.run(["resume", str(campaign.folder.path)]), f"damaged: {way}")
            shutil.rmtree(campaign.folder.path)
            shutil.copytree(original, campaign.folder.path)
        campaign.found["damages"] = {
            "damages": ways.total(),
            "ways": dict(ways),
            "unnoticed": silent,
            "resumed": resumed,
        }
    campaign.keep(out)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**9)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--stops", type=int, default=0)
    parser.add_argument("--damages", type=int, default=0)
    parser.add_argument("--points", action="store_true", help="a fault at every step on the disk of a run")
    parser.add_argument("--point-kinds", nargs="*", default=["lora"])
    parser.add_argument("--every", type=int, default=1, help="only every n-th of these steps")
    parser.add_argument("--effects", nargs="*", default=["kill", "ENOSPC", "EIO"])
    parser.add_argument("--work", type=Path, default=Path("campaign"), help="folder to work in")
    parser.add_argument("--out", type=Path, default=Path("survival.json"))
    asked = parser.parse_args(words)
    place = asked.work.resolve()
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    print(f"seed {asked.seed}", flush=True)
    make_material(place)
    campaign = Campaign(place, asked.seed, Nursery(place / "cache"))
    try:
        damages(campaign, random.Random(asked.seed + 1), asked.damages, asked.out) if asked.damages else None
        for kind in asked.point_kinds if asked.points else []:
            points(campaign, kind, asked.effects, asked.every, asked.out)
        stops(campaign, random.Random(asked.seed + 2), asked.stops, asked.out)
        kills(campaign, random.Random(asked.seed), asked.kills, asked.out)
    finally:
        campaign.nursery.close()
    print(json.dumps(campaign.found, indent=2))
    print(f"lost: {campaign.lost or 'none'}")
    return 1 if campaign.lost else 0


if __name__ == "__main__":
    raise SystemExit(main())
