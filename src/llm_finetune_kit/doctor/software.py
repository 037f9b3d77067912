"""Python, the packages this one needs, and the extras: their versions, and whether they are whole and can be used."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, metadata, requires, version
from pathlib import Path
from typing import Literal

from llm_finetune_kit.doctor.check import Check
from llm_finetune_kit.errors import MachineError

PACKAGE = "llm-finetune-kit"


@dataclass(frozen=True)
class Compiled:
    """A package with compiled parts: what it is for, how to get it, and which library of it must load."""

    purpose: str
    install: str
    library: str  # in the package's folder, without the system's ending
    lacking: Literal["warn", "fail"]


COMPILED = {
    "torch": Compiled("everything", "pip install --force-reinstall torch", "lib/libtorch_cpu", "fail"),
    "bitsandbytes": Compiled(
        "4- and 8-bit weights (QLoRA) and 8-bit optimizers",
        'pip install "llm-finetune-kit[quantization]"',
        "libbitsandbytes_cpu",
        "warn",
    ),
}
PATIENCE = 60.0  # seconds for imports: a cold disk takes long
TRIAL = """\
import ctypes, importlib, json, sys
for name, library in json.loads(sys.argv[1]):
    print(json.dumps(["started", name, ""]), flush=True)
    try:
        ctypes.CDLL(library) if library else importlib.import_module(name)
        print(json.dumps(["done", name, ""]), flush=True)
    except BaseException as error:
        print(json.dumps(["broken", name, f"{type(error).__name__}: {error}"]), flush=True)
"""


@dataclass(frozen=True)
class Need:
    """A package that must be there: the range of its versions, and the one found."""

    package: str
    wanted: str
    found: str | None
    fits: bool


def needs() -> list[Need]:
    """What this package says it needs. Raises PackageNotFoundError where it is not installed itself."""
    from packaging.requirements import Requirement

    metadata(PACKAGE)  # `requires` of a package that is not there raises nothing on some Pythons
    found = []
    for line in requires(PACKAGE) or []:
        need = Requirement(line)
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        try:
            here: str | None = version(need.name)
        except PackageNotFoundError:
            here = None
        fits = here is not None and need.specifier.contains(here, prereleases=True)
        found.append(Need(need.name, str(need.specifier), here, fits))
    return found


def check_versions() -> None:
    """Raise MachineError with what was found and what is needed, before an unfit package fails somewhere deep."""
    try:
        unfit = [need for need in needs() if not need.fits]
    except (PackageNotFoundError, ImportError):
        return  # run from a copy that was never installed: nothing is known, so nothing is claimed
    if unfit:
        raise MachineError(36, _unfit(unfit), where="packages", fix=_install(unfit))


def _unfit(unfit: list[Need]) -> str:
    return "; ".join(f"{need.package} {need.found or 'is missing'}, needed {need.wanted or 'in any version'}" for need in unfit)


def _install(unfit: list[Need]) -> str:
    return "pip install " + " ".join(f'"{need.package}{need.wanted}"' for need in unfit)


def python() -> Check:
    here = platform.python_version()
    try:
        wanted = metadata(PACKAGE)["Requires-Python"]
        from packaging.specifiers import SpecifierSet
    except (PackageNotFoundError, ImportError):
        return Check("python", "ok", here)
    if SpecifierSet(wanted).contains(here, prereleases=True):
        return Check("python", "ok", f"{here} ({wanted} is needed)")
    return Check("python", "fail", f"{here}, and {wanted} is needed", "install a newer Python and make a new environment with it")


def packages() -> Check:
    try:
        found = needs()
    except PackageNotFoundError:
        return Check("packages", "warn", "this copy is not installed, so the versions it needs are not known", "pip install -e .")
    unfit = [need for need in found if not need.fits]
    if unfit:
        return Check("packages", "fail", _unfit(unfit), _install(unfit))
    harmed = [need.package for need in found if need.package not in COMPILED and spoiled(need.package)]
    if harmed:
        finding = f"files of {', '.join(harmed)} are missing or have another size than when they were installed"
        return Check("packages", "warn", finding, f"pip install --force-reinstall {' '.join(harmed)}")
    shown = [f"{need.package} {need.found}" for need in found if need.package in ("torch", "transformers", "peft")]
    return Check("packages", "ok", f"{', '.join(shown)}; all {len(found)} are in range and whole")


def start_trial(*, deep: bool = False) -> subprocess.Popen[str]:
    """A child that loads the main library of each compiled package, or with `deep` imports them: a crash is only its own.

    Imports take seconds, as they bring in all of torch; the libraries alone take a fraction of one.
    """
    there = {name: found for name in COMPILED if (found := _folder(name)) is not None}
    return _child([(name, "" if deep else _library(name, folder)) for name, folder in there.items()])


def _child(trials: list[tuple[str, str]]) -> subprocess.Popen[str]:
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}  # bitsandbytes may look for kernels on the hub
    command = [sys.executable, "-c", TRIAL, json.dumps(trials)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=offline)


def _folder(name: str) -> Path | None:
    """Where a package is (of a single module: the folder that holds it); None where it is not installed."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        return None
    return Path(next(iter(spec.submodule_search_locations or ()), Path(str(spec.origin)).parent))


def _library(name: str, folder: Path) -> str:
    """The library that must load; empty where this build has none of that name, so that only an import tells."""
    wanted = folder / COMPILED[name].library
    found = sorted(path for path in wanted.parent.glob(f"{wanted.name}.*") if path.suffix in (".so", ".dylib", ".dll"))
    return str(found[0]) if found else ""


def spoiled(name: str) -> list[str]:
    """Files of a package that are missing or have another size than when they were installed."""
    try:
        files = distribution(name).files or []
    except PackageNotFoundError:
        return []
    found = []
    for file in files:
        if file.size is None or file.suffix == ".pyc":
            continue
        try:
            size = os.path.getsize(str(file.locate()))
        except OSError:
            size = -1
        if size != file.size:
            found.append(str(file))
    return found


def compiled(trial: subprocess.Popen[str], *, deep: bool = False) -> list[Check]:
    """One check for torch and each extra. What looks wrong without an import is imported, to be sure."""
    fates = _fates(trial)
    harmed = {name: spoiled(name) for name in fates}
    if not deep:
        doubtful = [name for name, (state, _) in fates.items() if state != "done" or harmed[name]]
        fates |= _fates(_child([(name, "") for name in doubtful])) if doubtful else {}
        deep_ones = set(doubtful)
    else:
        deep_ones = set(fates)
    return [_verdict(name, fates.get(name), harmed.get(name, []), name in deep_ones) for name in COMPILED]


def _fates(child: subprocess.Popen[str]) -> dict[str, tuple[str, str]]:
    """What became of each package in a trial: `done` or `broken`, and why."""
    try:
        said, complaint = child.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        child.kill()
        said, _ = child.communicate()
        complaint = f"it took longer than {PATIENCE:.0f} s"
    last = (complaint.strip().splitlines() or [f"the process ended with code {child.returncode}"])[-1]
    found = {}
    for line in said.splitlines():
        if line.startswith('["'):  # packages may print, too
            state, name, why = json.loads(line)
            found[name] = ("broken", last) if state == "started" else (state, why)
    return found


def _verdict(name: str, fate: tuple[str, str] | None, harmed: list[str], imported: bool) -> Check:
    about = COMPILED[name]
    if fate is None:
        return Check(name, about.lacking, f"not installed; it is for {about.purpose}", about.install)
    again = f"pip install --force-reinstall {name}"
    listed = f"{len(harmed)} of its files are not as installed ({', '.join(harmed[:2])}{', …' if len(harmed) > 2 else ''})"
    state, why = fate
    if state == "broken":
        finding = f"installed and broken: {' '.join(why.split())[:200]}"
        return Check(name, about.lacking, f"{finding}; {listed}" if harmed else finding, again)
    if harmed:
        return Check(name, "warn", f"{version(name)} can be imported, but {listed}", again)
    return Check(name, "ok", f"{version(name)} can be imported" if imported else f"{version(name)}, whole, and its library loads")
