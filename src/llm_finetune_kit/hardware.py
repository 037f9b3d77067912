"""What this machine has. The only file that asks a driver."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_trim: Any = None  # the C library's function, looked up once


@dataclass(frozen=True)
class Machine:
    """Facts the plan decides by. Sizes are in bytes; `memory` is what the model's device has in all."""

    kind: str  # cpu, cuda (ROCm too) or mps
    name: str
    cores: int
    memory: int
    free_memory: int
    free_disk: int
    bfloat16: bool  # computes it natively
    why_bfloat16: str

    @property
    def device(self) -> str:
        return self.kind


def this_machine(folder: Path = Path(".")) -> Machine:
    """The machine this process runs on; `folder` is where output will go."""
    import torch

    disk = shutil.disk_usage(_existing(folder)).free
    cores = usable_cores()
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        native = torch.cuda.get_device_capability() >= (8, 0)
        why = f"compute capability {'.'.join(map(str, torch.cuda.get_device_capability()))}"
        return Machine("cuda", torch.cuda.get_device_name(), cores, total, free, disk, native, why)
    total, free = _memory()
    if torch.backends.mps.is_available():
        return Machine("mps", platform.processor() or "Apple", cores, total, free, disk, True, "Metal computes it")
    native, why = _cpu_bfloat16()
    return Machine("cpu", _cpu_name(), cores, total, free, disk, native, why)


def usable_cores() -> int:
    """Cores this process may use, which in a container can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _existing(folder: Path) -> Path:
    folder = folder.resolve()
    while not folder.exists():
        folder = folder.parent
    return folder


def _memory() -> tuple[int, int]:
    """Total and available bytes, held down to the container's limit where there is one."""
    page = os.sysconf("SC_PAGE_SIZE")
    total = page * os.sysconf("SC_PHYS_PAGES")
    free = total
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        total, free = min(total, limit), min(free, limit - used)
    except (OSError, ValueError):
        pass
    return total, free


def _cpu_bfloat16() -> tuple[bool, str]:
    try:
        flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
    except OSError:
        flags = []
    for flag in ("amx_bf16", "avx512_bf16"):
        if flag in flags:
            return True, f"the CPU has {flag}"
    return False, "the CPU has neither amx_bf16 nor avx512_bf16"


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Python and the packages that decide results."""
    found = {"python": platform.python_version()}
    for package in ("llm-finetune-kit", "torch", "transformers", "peft", "tokenizers", "safetensors", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def peak_memory() -> int:
    """Most bytes this process has held: on a GPU what was allocated there, else resident memory."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def release_memory() -> None:
    """Give memory that the C library keeps for nothing back to the system (glibc only).

    Passes of ever new sizes leave holes between blocks: without this a long run on a CPU grew from 0.7 to 7 GB.
    """
    global _trim
    if _trim is None:
        library = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
        _trim = getattr(library, "malloc_trim", None) or (lambda pad: 0)
    _trim(0)
