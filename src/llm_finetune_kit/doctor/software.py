"""Python, the packages this one needs, and the extras: their versions, and whether they can be imported."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version

from llm_finetune_kit.doctor.check import Check
from llm_finetune_kit.errors import MachineError

PACKAGE = "llm-finetune-kit"
# Optional packages: what each is for, and how to get it.
EXTRAS = {
    "bitsandbytes": ("4- and 8-bit weights (QLoRA) and 8-bit optimizers", 'pip install "llm-finetune-kit[quantization]"'),
}
PATIENCE = 60.0  # seconds for the imports: a cold disk takes long
IMPORTS = """\
import importlib, json, sys
for name in sys.argv[1:]:
    print(json.dumps(["start", name, ""]), flush=True)
    try:
        importlib.import_module(name)
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
    shown = [f"{need.package} {need.found}" for need in found if need.package in ("torch", "transformers", "peft")]
    return Check("packages", "ok", f"{', '.join(shown)}; all {len(found)} are in range")


def start_imports() -> subprocess.Popen[str]:
    """A child that imports torch and the extras that are installed, so that a crash of theirs is only its own."""
    names = ["torch", *(name for name in EXTRAS if importlib.util.find_spec(name) is not None)]
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}  # bitsandbytes may look for kernels on the hub
    return subprocess.Popen(
        [sys.executable, "-c", IMPORTS, *names], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=offline
    )


def imported(child: subprocess.Popen[str]) -> list[Check]:
    """What became of the imports: one check for torch and each extra."""
    try:
        said, complaint = child.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        child.kill()
        said, complaint = child.communicate()
        complaint = f"it took longer than {PATIENCE:.0f} s"
    fate = {}
    for line in said.splitlines():
        if line.startswith("["):  # packages may print, too
            state, name, why = json.loads(line)
            fate[name] = (state, why)
    last = (complaint.strip().splitlines() or [f"the process ended with code {child.returncode}"])[-1]
    return [_fate(name, *fate.get(name, ("absent", "")), last) for name in ("torch", *EXTRAS)]


def _fate(name: str, state: str, why: str, last: str) -> Check:
    purpose, install = EXTRAS.get(name, ("everything", "pip install --force-reinstall torch"))
    if state == "done":
        return Check(name, "ok", f"{version(name)} can be imported")
    serious = "fail" if name == "torch" else "warn"
    if state == "absent":
        return Check(name, serious, f"not installed; it is for {purpose}", install)  # type: ignore[arg-type]
    why = why if state == "broken" else last
    finding = f"installed and broken: {' '.join(why.split())[:200]}"
    return Check(name, serious, finding, f"pip install --force-reinstall {name}")  # type: ignore[arg-type]
