"""What the machine is, and how busy others kept it while a child process ran."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INTERESTING_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def describe() -> dict[str, Any]:
    lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
    fields = {key.strip(): value.strip() for key, _, value in lines}
    flags = fields.get("flags", "").split()
    return {
        "cpu": fields.get("model name", platform.processor()),
        "cores": os.cpu_count(),
        "flags": [flag for flag in INTERESTING_FLAGS if flag in flags],
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


@dataclass(frozen=True)
class Child:
    """How a child process ended and what else kept the processors busy meanwhile, in cores."""

    exit_code: int
    wall_seconds: float
    foreign_load: float
    stolen: float


def run_child(command: list[str], log: Path, env: dict[str, str]) -> Child:
    """Run a command with its output in `log`, charging all processor time it did not use to others."""
    busy, stolen = processor_seconds()
    start = time.perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=env)
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - start
    busy_after, stolen_after = processor_seconds()
    foreign = busy_after - busy - used.ru_utime - used.ru_stime
    return Child(process.returncode, wall, max(foreign, 0.0) / wall, (stolen_after - stolen) / wall)


def processor_seconds() -> tuple[float, float]:
    """Processor time since boot that the machine was (busy, kept waiting by its hypervisor)."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    user, nice, system, _, _, irq, softirq, steal = fields
    ticks = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + irq + softirq) / ticks, steal / ticks
