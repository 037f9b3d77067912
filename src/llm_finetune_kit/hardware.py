"""What this machine has. The only file that asks a driver."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import re
import shutil
import sys
import time
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llm_finetune_kit.errors import MachineError
from llm_finetune_kit.gpus import GB, GIB, gpu_named
from llm_finetune_kit.plan.memory import KERNELS
from llm_finetune_kit.plan.speed import Rates

# bfloat16's matrix products over float32's, measured: with tiles (Intel AMX, two cores) 2,795 and 417 GFLOP/s, with vectors
# (AMD EPYC of family 25, one core) 218 and 91
NARROW = {"amx_bf16": 6.7, "avx512_bf16": 2.3}
SPINS = 2000  # of a waiting thread before it sleeps; some 0.1 ms
COLLECTED = 10_000  # new objects before Python looks for garbage among them
SCALING = 0.85  # exponent of the number of cores: two did 1.8 times as much as one (SmolLM2-135M)
NATIVE = (8, 0)  # the compute capability from which NVIDIA's GPUs compute bfloat16
SIGNS = ("/proc/driver/nvidia", "/dev/nvidia0", "/dev/kfd", "/dev/dxg")  # of a GPU and its driver, on Linux and in WSL
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
    rates: Rates | None = None  # of matrix products; None where nothing is known
    price: float | None = None  # dollars an hour
    attended: bool = False  # somebody sits at a terminal
    rocm: bool = False  # a `cuda` that is AMD's
    liger: bool = False  # Liger's kernels are installed

    @property
    def device(self) -> str:
        return self.kind


def this_machine(folder: Path = Path(".")) -> Machine:
    """The machine this process runs on; `folder` is where output will go. Without a sign of a GPU torch is not imported."""
    disk = shutil.disk_usage(_existing(folder)).free
    attended = bool(sys.stdin and sys.stdin.isatty() and sys.stderr and sys.stderr.isatty())
    found = _accelerator(disk) if _may_have_gpu() else None
    if found is not None:
        return replace(found, attended=attended)
    total, free = main_memory()
    flag, why = cpu_bfloat16()
    rates = _cpu_rates(flag)
    return Machine("cpu", _cpu_name(), usable_cores(), total, free, disk, bool(flag), why, rates, attended=attended)


def machine_named(name: str) -> Machine:
    """A machine as sold, all of it free: `RTX 4090`, `A100-80`, `M2 Max 32GB`, `cpu 16GB`. Raises MachineError if unknown."""
    cores = usable_cores()
    asked = re.fullmatch(r"cpu\s+(\d+(?:\.\d+)?)\s*gi?b?", name.strip().lower())
    if asked:
        memory = int(float(asked[1]) * GIB)
        flag, why = cpu_bfloat16()  # its speed and its formats are taken to be this machine's
        return Machine("cpu", f"CPU {asked[1]}GB", cores, memory, int(0.9 * memory), 10**12, bool(flag), why, _cpu_rates(flag))
    gpu = gpu_named(name)
    memory = int(gpu.memory * GIB)
    rate = gpu.tflops * 1e12
    said = "reported for this GPU" if gpu.measured else "an estimate from the maker's figure"
    rates = Rates(rate / 4, rate, cores, f"{gpu.name}: {gpu.tflops:g} TFLOP/s, {said}")
    why = f"{gpu.name} computes it" if gpu.bfloat16 else f"{gpu.name} is too old for bfloat16"
    named = gpu.name if gpu.kind == "mps" else f"{gpu.name} of {gpu.memory:g} GiB"
    facts = (gpu.kind, named, cores, memory, memory, 10**12, gpu.bfloat16, why, rates, gpu.price)
    return Machine(*facts, liger=has_liger())  # as here


def has_liger() -> bool:
    """Whether Liger's kernels and their compiler are installed; neither is imported."""
    return all(find_spec(name) is not None for name in ("liger_kernel", "triton"))


def _may_have_gpu() -> bool:
    return sys.platform != "linux" or any(Path(sign).exists() for sign in SIGNS)


def _accelerator(disk: int) -> Machine | None:
    """The GPU that torch can use, if any; ROCm's is a `cuda` one too. Not run on a real GPU in the tests."""
    import torch

    cores = usable_cores()
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        capability = torch.cuda.get_device_capability()
        native = capability >= NATIVE or torch.version.hip is not None
        why = f"compute capability {'.'.join(map(str, capability))}"
        name = torch.cuda.get_device_name()
        rates, price = _known_rates(name, total, cores)
        rocm = torch.version.hip is not None
        return Machine("cuda", name, cores, total, free, disk, native, why, rates, price, rocm=rocm, liger=has_liger())
    if torch.backends.mps.is_available():
        total, free = main_memory()
        limit = int(torch.mps.recommended_max_memory())
        return Machine("mps", platform.processor() or "Apple", cores, limit, min(limit, free), disk, True, "Metal computes it")
    return None


def _known_rates(name: str, memory: int, cores: int) -> tuple[Rates | None, float | None]:
    """Speed and price of a GPU by its driver's name, such as `NVIDIA A100-SXM4-80GB`; nothing where the table has none."""
    words = re.sub(r"-(sxm\d?|pcie|hbm\w*)", "", name.lower()).replace("nvidia", "").strip()
    for asked in (
        words,
        re.sub(r"[\s-]*\d+\s*gb.*$", "", words) + (f"-{round(memory / GB / 40) * 40}" if "a100" in words else ""),
    ):
        try:
            gpu = gpu_named(asked)
        except MachineError:
            continue
        return Rates(
            gpu.tflops * 0.25e12, gpu.tflops * 1e12, cores, f"{gpu.name}: {gpu.tflops:g} TFLOP/s from the table"
        ), gpu.price
    return None, None


@cache
def _cpu_rates(flag: str) -> Rates:
    """What matrix products reach here: float32 measured in some 20 ms without torch, the narrow format by a known ratio.

    The products are so small that one core computes each, and the best of many counts: other programs then disturb the
    figure little, where a product on all cores may take 25 times as long as alone.
    """
    import numpy as np

    side = np.random.default_rng(0).standard_normal((16, 64, 64), dtype=np.float32)
    side @ side
    times = []
    for _ in range(100):
        started = time.perf_counter()
        side @ side
        times.append(time.perf_counter() - started)
    rate = 2 * side.size * 64 / min(times) * usable_cores() ** SCALING
    return Rates(rate, rate * NARROW.get(flag, 1.0), usable_cores(), "a short measurement of this CPU's float32 products")


def allowed_cores() -> int:
    """Cores that this process may be run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def asked_threads() -> int | None:
    """What OMP_NUM_THREADS asks for; None where it says nothing that counts."""
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return int(asked) if asked.isdecimal() and int(asked) > 0 else None


def usable_cores() -> int:
    """Cores this process may use: those it is allowed, or fewer where OMP_NUM_THREADS asks for that."""
    return min(filter(None, (allowed_cores(), asked_threads())))


def share_the_machine() -> None:
    """How torch treats the rest of this machine; what the environment says already stays. Only before torch is loaded.

    OpenMP's threads spin for a moment while they wait for each other and then sleep: those that spin on hold the cores that
    other programs want, and steps on two busy cores took 5 to 13 times as long; those that sleep at once lose 14 % of a quiet
    machine. And oneDNN keeps few kernels, and torch's own store of them one: both make
    some for every new count of tokens and would keep 1,024, which lay between the tensors and grew a run by 12 MB a step.
    """
    if "torch" not in sys.modules:
        if "OMP_WAIT_POLICY" not in os.environ:
            os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KERNELS))
        os.environ.setdefault("LRU_CACHE_CAPACITY", "1")


def start_quickly() -> None:
    """For a process of ours alone: the libraries make some 300,000 objects that stay, and Python's collector would look at
    them after every 700 new ones; after every 10,000, importing them takes 3.3 s instead of 3.7.
    """
    gc.set_threshold(max(COLLECTED, gc.get_threshold()[0]), *gc.get_threshold()[1:])


def _existing(folder: Path) -> Path:
    folder = folder.resolve()
    while not folder.exists():
        folder = folder.parent
    return folder


def main_memory() -> tuple[int, int]:
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


def cpu_bfloat16() -> tuple[str, str]:
    """The instructions that compute bfloat16 here ("" for none), and that in words."""
    try:
        flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
    except OSError:
        flags = []
    for flag in NARROW:
        if flag in flags:
            return flag, f"the CPU has {flag}"
    return "", "the CPU has neither amx_bf16 nor avx512_bf16"


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


def resident_memory() -> int:
    """Bytes this process holds now; 0 where the system does not tell (all but Linux)."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return 0


def held_memory() -> int | None:
    """Bytes this process holds now: on a GPU what torch has reserved there, else resident memory; None where nobody knows.

    Neither waits for the device.
    """
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.memory_reserved())
    return resident_memory() or None


def release_memory() -> None:
    """Give memory that the C library keeps for nothing back to the system (glibc only).

    Passes of ever new sizes leave holes between blocks: without this a long run on a CPU grew from 0.7 to 7 GB.
    """
    global _trim
    if _trim is None:
        library = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
        _trim = getattr(library, "malloc_trim", None) or (lambda pad: 0)
    _trim(0)
