"""How runs look: the card of one, with its curve as far as it came, and the list of all."""

from __future__ import annotations

from typing import Any

from llm_finetune_kit.errors import KitError
from llm_finetune_kit.events import Event, Failed, Finished, Planned, Warned
from llm_finetune_kit.files import MANIFEST
from llm_finetune_kit.folder import RunFolder
from llm_finetune_kit.report import compared, words
from llm_finetune_kit.report.curve import loss_svg
from llm_finetune_kit.report.figures import Figures, caution, figures, verdict
from llm_finetune_kit.runs import Standing, standing, started
from llm_finetune_kit.ui.jobs import Job, Jobs
from llm_finetune_kit.ui.views import fault_in, fault_of, hint, piece
from llm_finetune_kit.ui.watch import Watch, pace, stage
from llm_finetune_kit.ui.workspace import Workspace

TONES = {"running": "open", "finished": "good", "interrupted": "flat", "failed": "bad"}
TOLD = {"running": "started", "interrupted": "stopped", "waiting": "waits for its turn", "beginning": "is beginning"}
OUTCOMES = {"better": "good", "worse": "bad", "no difference shown": "flat"}
WIDE, SMALL = (720, 300), (360, 260)
MOST_SHOWN = 200  # runs in the list; the folder holds the others


class RunsView:
    """The cards and the list, made anew only when a run said something or its state changed."""

    def __init__(self, workspace: Workspace, jobs: Jobs) -> None:
        self.workspace, self.jobs, self.watch = workspace, jobs, Watch()
        self._cards: dict[str, tuple[Any, str]] = {}
        self._rows: dict[str, tuple[Any, Standing]] = {}

    def followed(self, name: str) -> str:
        """The run that is meant: that of the name if it is known, else the one at work, else the last one."""
        known = [run.path.name for run in self.workspace.runs()]
        jobs = [job.name for job in self.jobs.all()]
        if name in known or name in jobs:
            return name
        at_work = [run.path.name for run in self.workspace.runs() if run.at_work]
        newest = [one["name"] for one in self._by_time(MOST_SHOWN)]
        return next((one for one in (self.jobs.current()[0], *at_work, *newest) if one), "")

    def card(self, name: str) -> str:
        """A run, or a start that waits or came to nothing, as far as is known now."""
        job = self.jobs.find(name)
        run = next((run for run in self.workspace.runs() if run.path.name == name), None)
        if run is not None:
            queued = job is not None and job.started is None
            said = self.jobs.said(job) if job is not None and self.jobs.refused(job) else ""
            return self._run_card(run, queued=queued, said=said)
        if job is None:
            return hint("No run yet", "Press Start above. The loss curve, the speed and the time left appear here.")
        if job.started is None:
            ahead = [other.name for other in self.jobs.waiting()].index(name)
            before = f"{ahead} other{'s are' if ahead > 1 else ' is'} before it. " if ahead else ""
            return piece("waiting", job, "waiting", f"{before}It begins when nothing else trains on this machine.")
        if self.jobs.current()[0] == name:
            return piece("waiting", job, "beginning", "It reads the data and makes its plan.")
        said = self.jobs.said(job)
        return piece("lost", job, fault_in(said, name), said)

    def _run_card(self, run: RunFolder, *, queued: bool, said: str) -> str:
        told = self.watch.told(run)
        key = (len(told), run.at_work, queued, said, (run.final / MANIFEST).exists(), (run.path / "report.html").exists())
        known = self._cards.get(run.path.name)
        if known is None or known[0] != key:
            known = self._cards[run.path.name] = (key, piece("run", _card(run, told, queued, said)))
        return known[1]

    def standing(self, run: RunFolder) -> Standing:
        """How a run stands, from what was read of it already."""
        told = self.watch.told(run)
        key = (len(told), run.at_work)
        known = self._rows.get(run.path.name)
        if known is None or known[0] != key:
            known = self._rows[run.path.name] = (key, standing(run, told))
        return known[1]

    def status(self, name: str) -> tuple[str, str]:
        """The state of a run or start, and a line that tells it; both empty where there is none."""
        row = next((row for row in self._by_time(MOST_SHOWN) if row["name"] == name), None)
        if row is None:
            return "", ""
        said = TOLD.get(row["state"], row["state"])
        return row["state"], f"{name} {said}" + (f" at {row['place']}" if row["state"] == "interrupted" else "")

    def history(self, chosen: str) -> str:
        """All runs, those that wait first and then the last begun."""
        return piece("history", self._by_time(MOST_SHOWN), chosen)

    def _by_time(self, most: int) -> list[dict[str, Any]]:
        """The rows of the list: starts that wait, then runs and starts that came to nothing, the last begun first."""
        known = self.workspace.runs()
        names = {run.path.name for run in known}
        jobs = [job for job in reversed(self.jobs.all()) if job.name not in names]
        lost = [job for job in jobs if job.started is not None and self.jobs.current()[0] != job.name]
        rows = [_job_row(job, self.jobs) for job in jobs if job not in lost]
        ended = [(started(run.path), _row(self.standing(run))) for run in known[:most]]
        ended += [(job.started or job.asked, _job_row(job, self.jobs)) for job in lost]
        return rows + [row for _, row in sorted(ended, key=lambda one: -one[0])]


def _job_row(job: Job, jobs: Jobs) -> dict[str, str]:
    begun = jobs.current()[0] == job.name
    state = "waiting" if job.started is None else "beginning" if begun else "did not begin"
    return {"name": job.name, "state": state, "tone": "bad" if state == "did not begin" else "open", "place": "", "result": ""}


def _row(one: Standing) -> dict[str, str]:
    place = f"step {one.step:,}" + (f" of {one.total_steps:,}" if one.total_steps and one.state != "finished" else "")
    result = ""
    if one.held_out_before is not None and one.held_out_best is not None:
        result = f"held-out loss {one.held_out_before:.2f} → {one.held_out_best:.2f}"
    return {"name": one.name, "state": one.state, "tone": TONES[one.state], "place": place, "result": result}


def _card(run: RunFolder, told: list[Event], queued: bool, said: str) -> dict[str, Any]:
    """What the template shows of a run; `said` is what its command line said where it would not go on."""
    how, found = standing(run, told), figures(told)
    planned = next((event.plan for event in told if isinstance(event, Planned)), None)
    total = found.total_steps or (planned or {}).get("steps", 0)
    step = found.steps[-1].step if found.steps else 0
    running = how.state == "running"
    saved = how.state == "finished" or (run.final / MANIFEST).is_file()
    warned = {event.message: event.fix for event in told if isinstance(event, Warned)}
    ended = found.ended
    return {
        "name": how.name, "state": how.state, "tone": TONES[how.state], "queued": queued, "about": _about(planned, told),
        "step": step, "total": total, "percent": round(100 * step / total, 1) if total else 0,
        "stage": stage(told) if running else how.why if how.state != "failed" else "", "place": f"step {step:,} of {total:,}",
        "tiles": _tiles(found, told, running),
        "fault": None if running else _fault(ended, how.state, said),
        "verdict": verdict(found) if how.state == "finished" else None,
        "curve": loss_svg(found, *WIDE) if step else "", "small": loss_svg(found, *SMALL) if step else "",
        "warnings": list(warned.items()),
        "can_go_on": how.go_on.startswith("finetune resume"), "report": (run.path / "report.html").is_file(),
        "model": saved, "kind": kind(run), "command": "" if running else how.go_on.replace(str(run.path), f"outputs/{how.name}"),
    }  # fmt: skip


def kind(run: RunFolder) -> str:
    """What `final/` holds, in a word."""
    return "adapter" if (run.final / "adapter_config.json").is_file() else "model"


def _about(plan: dict[str, Any] | None, told: list[Event]) -> str:
    if plan is None:
        return ""
    asked = plan["config"]
    data = asked["data"]["train_file"] or ", ".join(asked["data"]["mix"] or ())
    named = words.name(data) if isinstance(data, str) else "rows given in Python"
    return f"{words.name(str(asked['model']['name']))} on {named}, {asked['method']}"


def _fault(ended: Finished | Failed | None, state: str, said: str) -> KitError | None:
    """Why the run failed, or would not go on."""
    if said:
        return fault_in(said, "the run")
    if not isinstance(ended, Failed) or state != "failed":
        return None
    return fault_of(ended.code, ended.problem, "", ended.fix)


def _tiles(found: Figures, told: list[Event], running: bool) -> list[tuple[str, str, str]]:
    going = pace(told)
    loss = words.loss(found.smooth[-1].loss) if found.smooth else "–"
    before, best = found.compared.get("loss_before"), found.compared.get("loss_after")
    first = words.loss(before) if before is not None else "–"
    held = f"{first} → {words.loss(best)}" if best is not None else first
    speed = "–" if going.tokens_per_second is None else f"{going.tokens_per_second:,.0f}"
    tiles = [
        ("Training loss", loss, "nats per learned token, smoothed"),
        ("Held-out loss", held, "before, and at its best"),
        ("Tokens per second", speed, "over the last steps"),
    ]
    if running:
        left = "–" if going.seconds_left is None else words.duration(going.seconds_left)
        return [*tiles, ("Time left", left, "of training, at this speed")]
    return [*tiles, ("Trained for", words.duration(found.seconds), f"{found.tokens:,} tokens")]


def comparison(run: RunFolder, found: dict[str, Any] | None) -> str:
    """Base against tuned with intervals, and what there is to take away."""
    report = (run.path / "report.html").is_file()
    about = {"name": run.path.name, "report": report, "model": (run.final / MANIFEST).is_file(), "kind": kind(run)}
    if found is None:
        return hint("No comparison", "This run made none: it had no held-out rows, or has not finished.") + piece("links", about)
    outcome = {"better": "good", "worse": "bad"}.get(found["outcome"], "flat")
    rows = found["rows"]
    asked = f"Answers to {rows['answered']:,} of {rows['of']:,} held-out prompts: {rows['why']}."
    more = [asked, found["general"]["sentence"]]
    tables = {"table": compared.table(found), "tones": OUTCOMES, "sentence": found["sentence"], "more": more, "tone": outcome}
    tables["caution"] = caution(figures(run.replay()))
    return piece("comparison", about | tables)
