"""Putting checkpoints and the final model into the run folder, beside the training, and removing those no longer needed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llm_finetune_kit.errors import MachineError
from llm_finetune_kit.events import Listen, Noted, Saved, Saving, Warned
from llm_finetune_kit.files import MANIFEST, about_to, commit, remove, write_whole
from llm_finetune_kit.folder import RunFolder
from llm_finetune_kit.hardware import versions
from llm_finetune_kit.material import Material
from llm_finetune_kit.models.facts import read_config
from llm_finetune_kit.models.loading import DTYPES
from llm_finetune_kit.models.quantization import quantization_facts
from llm_finetune_kit.report.card import About, model_card
from llm_finetune_kit.training import checkpoint
from llm_finetune_kit.training.checkpoint import Progress, Snapshot

CARD = "README.md"
RETRY = 2.0  # seconds between trials to write what could not be written
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Saver:
    """Saves a run's state. Call it with the progress; adapters are written by a thread while training goes on.

    One checkpoint is written at a time. What went wrong with it is told by `poll` or `finish`, in the caller's
    thread: where the disk is full or gone, the run pauses with its state in memory or stops, as the config says.
    """

    def __init__(
        self,
        folder: RunFolder,
        material: Material,
        model: Any,
        optimizer: Any,
        say: Listen,
        asked_to_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.folder = folder
        self.training = material.plan.config.training
        self.model = model
        self.optimizer = optimizer
        self.say = say
        self.asked_to_stop = asked_to_stop
        self.facts = _facts(material, model)
        self.beside = _tokenizer_files(material.chat)
        self._writing: _Writing | None = None

    def __call__(self, progress: Progress) -> None:
        """Save the state of now."""
        began = time.perf_counter()
        self.finish()
        snapshot = checkpoint.take(self.model, self.optimizer, progress)
        self.say(Saving(progress.step, f"checkpoint-{progress.step}", progress.evaluated))
        self._writing = _Writing(snapshot, lambda: self._put(snapshot))
        if snapshot.copied:
            self._writing.held_up = time.perf_counter() - began
        else:
            self.finish()

    def poll(self) -> None:
        """Tell of a checkpoint that has been written meanwhile."""
        if self._writing is not None and not self._writing.is_alive():
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written. Raises MachineError if it cannot be."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        began = time.perf_counter()
        size, spared = writing.outcome(lambda error: self._until_written(writing.target, writing.work, error))
        held_up = writing.held_up + time.perf_counter() - began
        self.say(Saved(writing.snapshot.step, writing.target, size, writing.seconds, held_up))
        for name in spared:
            self.say(Warned(f"{name} is no longer needed and cannot be removed", "remove it by hand"))

    @contextmanager
    def to_the_end(self) -> Iterator[None]:
        """A checkpoint that is being written when the block ends, well or by an error, is written to its end."""
        try:
            yield
        except Exception:
            with suppress(Exception):  # the error that came first is the one to tell
                self.finish()
            raise
        except BaseException:  # a second signal: nobody waits for room now, but the run is given up whole
            if self._writing is not None:
                self._writing.join()
            raise
        self.finish()

    def _put(self, snapshot: Snapshot) -> tuple[int, list[str]]:
        """Write a checkpoint, then remove the ones too many; its bytes, and what could not be removed."""

        def write(draft: Path) -> None:
            snapshot.write(draft)
            self._write_beside(draft)

        target = self.folder.path / f"checkpoint-{snapshot.step}"
        size = commit(target, write, self.facts | {"step": snapshot.step})
        return size, _rotate(self.folder, self.training.save_total_limit, snapshot.step, snapshot.best_step)

    def _write_beside(self, draft: Path) -> None:
        for name, content in self.beside.items():
            about_to("write", draft / name)
            (draft / name).parent.mkdir(parents=True, exist_ok=True)
            (draft / name).write_bytes(content)

    def final(self, material: Material, step: int) -> None:
        """`final/`: what other tools load. A fully trained model goes back to the dtype its base was stored in."""
        began = time.perf_counter()
        stored = str(getattr(read_config(material.located.folder), "dtype", None) or "float32").removeprefix("torch.")
        write_weights = checkpoint.weights_writer(self.model, DTYPES.get(stored))

        def write(draft: Path) -> None:
            write_weights(draft)
            self._write_beside(draft)
            write_whole(draft / CARD, self._card(material, step))

        def put() -> int:
            return commit(self.folder.final, write, self.facts | {"step": step})

        try:
            size = put()
        except OSError as error:
            size = self._until_written(self.folder.final.name, put, error)
        self.say(Saved(step, self.folder.final.name, size, time.perf_counter() - began))

    def renew_card(self, material: Material, step: int) -> None:
        """Put what is known by now into the card of `final/`, which stays whole and sealed at every instant.

        The weights were saved before the comparison, as its fault must not cost them. Here the folder is written once
        more, its files as links to those that are there already; if that fails, the card stays as it was.
        """

        def write(draft: Path) -> None:
            for path in self.folder.final.rglob("*"):
                if path.is_file() and path.name not in (MANIFEST, CARD):
                    _link(path, draft / path.relative_to(self.folder.final))
            write_whole(draft / CARD, self._card(material, step))

        try:
            commit(self.folder.final, write, self.facts | {"step": step})
        except OSError as error:
            fix = "the model is whole; the figures are in comparison.md"
            self.say(Warned(f"final/{CARD} was not renewed with the comparison: {_why(error, self.folder.path)}", fix))

    def _card(self, material: Material, step: int) -> str:
        about = About(self.facts["versions"], material.report.get("train", {}).get("licence"))
        return model_card(material.plan.config, material.located.name, self.folder.replay(), step, about)

    def _until_written(self, name: str, work: Callable[[], Any], error: OSError) -> Any:
        """What `work` gives once it succeeds; raises MachineError where the run is not to wait for that."""
        if self.training.on_disk_full == "pause":
            reason, fix = _why(error, self.folder.path), f"mend that ({_remedy(error)}): the run then goes on by itself"
            self.say(Warned(f"{name} cannot be written: {reason}; the run waits, and its state is in memory", fix))
            while not self.asked_to_stop():
                time.sleep(RETRY)
                try:
                    found = work()
                except OSError:
                    continue
                self.say(Noted(f"{name} is written now; the run goes on"))
                return found
        whole = [path.name for path in self.folder.checkpoints()]
        why = f"{whole[0]} is the last that was saved" if whole else "nothing was saved before"
        fix = f"{_remedy(error)}, then: finetune resume {self.folder.path}"
        problem = f"{name} cannot be written: {_why(error, self.folder.path)}"
        raise MachineError(10, problem, where=str(self.folder.path), why=why, fix=fix) from error


class _Writing(threading.Thread):
    """A checkpoint on its way to the disk. No process waits for it at its end: half a checkpoint is none."""

    def __init__(self, snapshot: Snapshot, work: Callable[[], tuple[int, list[str]]]) -> None:
        super().__init__(name="saving", daemon=True)
        self.snapshot = snapshot
        self.work = work
        self.target = f"checkpoint-{snapshot.step}"
        self.seconds = self.held_up = 0.0
        self._found: tuple[int, list[str]] | None = None
        self._error: Exception | None = None
        self.start()

    def run(self) -> None:
        began = time.perf_counter()
        try:
            self._found = self.work()
        except Exception as error:
            self._error = error
        self.seconds = time.perf_counter() - began

    def outcome(self, mend: Callable[[OSError], tuple[int, list[str]]]) -> tuple[int, list[str]]:
        """Wait for the end; `mend` is asked for the outcome where the disk failed."""
        self.join()
        if isinstance(self._error, OSError):
            return mend(self._error)
        if self._error is not None:
            raise self._error
        assert self._found is not None
        return self._found


def _tokenizer_files(chat: Any) -> dict[str, bytes]:
    """The tokenizer's files by name, serialized once: for a large vocabulary that takes a second."""
    with tempfile.TemporaryDirectory(prefix="finetune-tokenizer-") as name:
        chat.save(Path(name))
        files = [path for path in sorted(Path(name).rglob("*")) if path.is_file()]
        return {str(path.relative_to(name)): path.read_bytes() for path in files}


def _facts(material: Material, model: Any) -> dict[str, Any]:
    config = json.dumps(material.plan.config.model_dump(mode="json"), sort_keys=True)
    facts = {
        "base_model": material.located.name,
        "config_sha256": hashlib.sha256(config.encode()).hexdigest(),
        "data_fingerprints": {name: part["fingerprint"] for name, part in material.report.items() if "fingerprint" in part},
        "versions": versions(),
    }
    packed = quantization_facts(model)
    return facts | ({"quantization": packed} if packed else {})


def _link(path: Path, place: Path) -> None:
    """The same file at another place, or a copy where the file system has no links."""
    about_to("write", place)
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(path, place)
    except OSError:
        shutil.copyfile(path, place)


def _why(error: OSError, folder: Path) -> str:
    reason = error.strerror or str(error)
    if error.errno not in FULL:
        return reason
    try:
        return f"{reason}, {shutil.disk_usage(folder).free / 1e6:,.0f} MB are free"
    except OSError:
        return reason


def _remedy(error: OSError) -> str:
    if error.errno in FULL:
        return "free some disk space"
    if error.errno == errno.ENOENT:
        return "put the run's folder back"
    return "mend the disk or the rights of the folder"


def _rotate(folder: RunFolder, keep: int, step: int, best_step: int | None) -> list[str]:
    """Remove the oldest checkpoints beyond `keep`, never that of `step` and never the best; names of those that stayed.

    Checkpoints of later steps were passed over when the run went on: they are damaged and go first.
    """
    folders = folder.checkpoints()
    this = folders.index(folder.path / f"checkpoint-{step}")
    spare = [path for path in folders[this + 1 :] if path.name != f"checkpoint-{best_step}"]
    unneeded = folders[:this] + spare[::-1][: max(0, len(folders) - this - keep)]
    return [path.name for path in unneeded if not remove(path)]
