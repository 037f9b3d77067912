"""The GPU and its driver, the processor, memory and limits of this process."""

from __future__ import annotations

import ast
import importlib.util
import locale
import os
import re
import subprocess
import sys
from pathlib import Path

from llm_finetune_kit.doctor.check import Check
from llm_finetune_kit.hardware import NATIVE, allowed_cores, asked_threads, cpu_bfloat16

OLDEST_DRIVER = {11: (450, 80), 12: (525, 60), 13: (580, 65)}  # by CUDA's major version, NVIDIA's compatibility table
CUDA_TORCH = "pip install --force-reinstall --index-url https://pypi.org/simple torch"  # its Linux builds carry CUDA
FEW_HANDLES = 256
LITTLE_MEMORY = 2e9
LITTLE_SHARED = 64e6


def gpu() -> Check:
    """Whether there is one, and whether torch, the driver and other programs let it be used."""
    if sys.platform == "darwin":
        return Check("gpu", "ok", "Apple's GPU is used through Metal where torch finds it")
    cards, trouble = _nvidia()
    driver = cards[0][1] if cards else _kernel_driver()
    build = _torch_build()
    if driver is None:
        if Path("/dev/kfd").exists():
            return _amd(build)
        if trouble:
            return Check(
                "gpu", "warn", f"nvidia-smi fails: {trouble}", "install or load the NVIDIA driver, or restart the machine"
            )
        return Check("gpu", "ok", "none found; training runs on the CPU")
    name = cards[0][0] if cards else "an NVIDIA GPU"
    if not build.get("cuda"):
        return Check("gpu", "warn", f"{name} is here, but torch is built without CUDA, so it runs on the CPU", CUDA_TORCH)
    cuda = str(build["cuda"])
    oldest = OLDEST_DRIVER.get(int(cuda.partition(".")[0]))
    if oldest and tuple(map(int, re.findall(r"\d+", driver)[:2])) < oldest:
        needed = ".".join(map(str, oldest))
        fix = f"install driver {needed} or newer, or a torch built for an older CUDA"
        return Check("gpu", "fail", f"driver {driver} is too old for CUDA {cuda} of this torch, which needs {needed}", fix)
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1"):
        return Check("gpu", "warn", f"{name} is hidden by CUDA_VISIBLE_DEVICES", "unset CUDA_VISIBLE_DEVICES")
    busy = [f"{used:,} of {total:,} MB of {card}" for card, _, used, total in cards if used > total / 2]
    if busy and len(busy) == len(cards):
        fix = "stop the programs that `nvidia-smi` lists, or wait for them"
        return Check("gpu", "warn", f"busy: {', '.join(busy)} are in use", fix)
    return Check("gpu", "ok", f"{name}, driver {driver}, CUDA {cuda}")


def _nvidia() -> tuple[list[tuple[str, str, int, int]], str]:
    """Name, driver, used and total megabytes of every card, and nvidia-smi's complaint if it has one."""
    lines, trouble = _asked("name,driver_version,memory.used,memory.total")
    cards = []
    for line in lines:
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == 4 and parts[2].isdigit() and parts[3].isdigit():
            cards.append((parts[0], parts[1], int(parts[2]), int(parts[3])))
    return cards, trouble


def _asked(what: str) -> tuple[list[str], str]:
    """nvidia-smi's answer, a line for every card, and its complaint if it has one; neither where there is no nvidia-smi."""
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], "" if isinstance(error, FileNotFoundError) else str(error)
    if done.returncode:
        return [], (done.stdout.strip() or done.stderr.strip() or f"code {done.returncode}").splitlines()[0]
    return done.stdout.splitlines(), ""


def _kernel_driver() -> str | None:
    """The version of the loaded NVIDIA driver, by the kernel."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", text)
    return found.group() if found else None


def _amd(build: dict[str, str | None]) -> Check:
    if build.get("hip"):
        return Check("gpu", "ok", f"an AMD GPU, ROCm {build['hip']}")
    fix = "install torch from the ROCm index that https://pytorch.org/get-started names"
    return Check("gpu", "warn", "an AMD GPU is here, but torch is built without ROCm, so it runs on the CPU", fix)


def _torch_build() -> dict[str, str | None]:
    """What torch/version.py says torch was built for; torch itself is not imported."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return {}
    text = (Path(spec.submodule_search_locations[0]) / "version.py").read_text(encoding="utf-8")
    return {name: ast.literal_eval(value) for name, value in re.findall(r"^(cuda|hip)\b[^=\n]*= *(.+)$", text, re.MULTILINE)}


def bfloat16() -> Check:
    """Whether what will train computes it: the GPU where torch is built for one that is here, else the processor."""
    build = _torch_build()
    if sys.platform == "darwin":
        return Check("bfloat16", "ok", "Metal computes it")
    if build.get("hip") and Path("/dev/kfd").exists():
        return Check("bfloat16", "ok", "ROCm computes it")
    capability = _capability() if build.get("cuda") else None
    if capability is None:
        flag, why = cpu_bfloat16()
        native, instead = bool(flag), "float32 is used: twice the memory, and slower"
    else:
        native, why = capability >= NATIVE, f"compute capability {'.'.join(map(str, capability))}"
        instead = f"{'.'.join(map(str, NATIVE))} is needed, so float16 with loss scaling is used"
    if native:
        return Check("bfloat16", "ok", why)
    return Check("bfloat16", "warn", f"{why}; {instead}", "nothing needs to be done; a newer machine is faster")


def _capability() -> tuple[int, int] | None:
    """What the first card can do; None where there is none, or its driver is too old to tell."""
    lines, _ = _asked("compute_cap")
    found = re.fullmatch(r"(\d+)\.(\d+)", lines[0].strip()) if lines else None
    return (int(found[1]), int(found[2])) if found else None


def threads() -> Check:
    cores, allowed, asked = os.cpu_count() or 1, allowed_cores(), asked_threads()
    quota = _cpu_quota()
    if quota is not None and quota < allowed and asked is None:
        count = max(1, int(quota))
        finding = f"the container may use {quota:g} processors, and {allowed} threads would share them"
        return Check("threads", "warn", finding, f"training.threads={count}, or export OMP_NUM_THREADS={count}")
    if asked is not None and asked < min(allowed, quota or allowed):
        finding = f"OMP_NUM_THREADS={asked}, so {allowed - asked} of {allowed} usable cores stay idle"
        return Check("threads", "warn", finding, f"unset OMP_NUM_THREADS, or set training.threads={allowed}")
    return Check("threads", "ok", f"{allowed} of {cores} cores may be used")


def _cpu_quota() -> float | None:
    """Processors that the container may use, where it is limited (cgroup version 2)."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
        return int(quota) / int(period)
    except (OSError, ValueError):
        return None


def memory() -> Check:
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
    except OSError:
        return Check("memory", "ok", "not told by this system")
    sizes = {name: int(text.split()[0]) * 1024 for name, text in lines.items()}
    total, free = sizes["MemTotal"], sizes["MemAvailable"]
    swap, swapped = sizes.get("SwapTotal", 0), sizes.get("SwapTotal", 0) - sizes.get("SwapFree", 0)
    limit = ""
    try:
        most = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8"))
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="utf-8"))
        free, limit = min(free, most - used), f", the container may use {most / 1e9:.1f}"
    except (OSError, ValueError):
        pass  # no limit, or none that is told
    finding = f"{free / 1e9:.1f} of {total / 1e9:.1f} GB are free{limit}, swap {swap / 1e9:.1f} GB"
    if free < LITTLE_MEMORY:
        return Check("memory", "warn", finding, "close other programs; `finetune plan` tells what a run needs")
    if swapped > swap / 2 > 0:
        return Check(
            "memory", "warn", f"{finding}, {swapped / 1e9:.1f} of it in use: training would crawl", "close other programs"
        )
    return Check("memory", "ok", finding)


def shared_memory() -> Check:
    try:
        size = os.statvfs("/dev/shm")
    except OSError:
        return Check("shared memory", "ok", "not told by this system")
    total = size.f_blocks * size.f_frsize
    if total < LITTLE_SHARED:
        finding = f"{total / 1e6:.0f} MB, which only runs on several GPUs would miss"
        return Check("shared memory", "warn", finding, "docker run --shm-size=1g ...")
    return Check("shared memory", "ok", f"{total / 1e9:.1f} GB")


def file_handles() -> Check:
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < FEW_HANDLES:
        return Check("file handles", "warn", f"only {soft} files may be open at once", "ulimit -n 1024")
    return Check("file handles", "ok", "without limit" if soft == resource.RLIM_INFINITY else f"{soft:,}")


def encoding() -> Check:
    names = {"text": locale.getpreferredencoding(False), "file names": sys.getfilesystemencoding()}
    names["output"] = getattr(sys.stdout, "encoding", None) or "utf-8"
    other = [f"{what} {name}" for what, name in names.items() if name.lower().replace("-", "").replace("_", "") != "utf8"]
    if other:
        return Check(
            "encoding", "warn", f"{', '.join(other)}: letters beyond English may be lost on the screen", "export PYTHONUTF8=1"
        )
    return Check("encoding", "ok", "UTF-8")
