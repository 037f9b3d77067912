"""Table of accelerators: memory, number formats, matrix speed and what an hour costs. Figures only, no driver is asked.

Speeds are what matrix products reach, in TFLOP/s with float32 sums. Those marked `measured` were reported for the T4 (held
down by its 70 W), A100, RTX 4090 and H200; the others are the maker's figure times the share that the A100 and the H200
reach, so they are estimates. Prices are dollars for an hour of one GPU: the cheapest offers of PRICE_SOURCE; where it has
none there is no price, and any can be given by hand.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from llm_finetune_kit.errors import MachineError, nearest

SHARE = 0.8  # of the maker's figure that large matrix products reach: 250 of 312 on an A100, 790 of 989 on an H200
PRICE_SOURCE = "lowest on-demand offer listed by akash.network on 2026-09-20 (A100-40: Lambda, 2026-11-16)"
GB = 10**9
GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """An accelerator as sold: memory in GiB, TFLOP/s in its best 16-bit format, dollars an hour if known."""

    name: str
    memory: float
    bfloat16: bool
    tflops: float
    price: float | None = None
    measured: bool = False
    kind: str = "cuda"


def _spec(name: str, memory: float, maker: float, price: float | None = None, *, bfloat16: bool = True) -> Gpu:
    return Gpu(name, memory, bfloat16, round(SHARE * maker, 1), price)


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("T4", 15, False, 24, 0.15, measured=True),
        _spec("P100", 16, 18.7, bfloat16=False),
        _spec("V100", 16, 112, 0.36, bfloat16=False),
        _spec("L4", 22.5, 121),
        _spec("A10", 22.5, 125),
        Gpu("A100-40", 40, True, 250, 1.99, measured=True),
        Gpu("A100-80", 80, True, 250, 1.71, measured=True),
        _spec("H100", 80, 989, 2.71),
        Gpu("H200", 139, True, 790, 4.45, measured=True),
        _spec("RTX 3060", 12, 25.5, 0.14),
        _spec("RTX 3070", 8, 40.6),
        _spec("RTX 3080", 10, 59.5),
        _spec("RTX 3090", 24, 71, 0.16),
        _spec("RTX 4060", 8, 30.2),
        _spec("RTX 4070", 12, 58.3),
        _spec("RTX 4080", 16, 97.5, 0.15),
        Gpu("RTX 4090", 24, True, 150, 0.39, measured=True),
        _spec("RTX 5090", 32, 209.5, 0.67),
    )
}
# Apple's chips share the computer's memory, of which the GPU may use about three quarters.
APPLE = {"m1": 2.6, "m2": 3.6, "m3": 4.1, "m4": 4.6, "m1 pro": 5.2, "m2 pro": 6.8, "m3 pro": 7.4, "m4 pro": 9.2}
APPLE |= {"m1 max": 10.4, "m2 max": 13.6, "m3 max": 16.3, "m4 max": 18.4}
APPLE_SHARE = 0.75
OTHER_NAMES = {"a100": "A100-40", "a10g": "A10", "h100 80gb": "H100"}
MEMORY = re.compile(r"(\d+(?:\.\d+)?)\s*gi?b?$")


def gpu_named(name: str) -> Gpu:
    """The accelerator a person means: `RTX 4090`, `rtx4090`, `A100-80`, `M2 Max 32GB`. Raises MachineError for unknown ones."""
    asked = re.sub(r"^(nvidia|geforce|tesla|apple)\s+", "", name.strip().lower()).removeprefix("geforce ")
    apple = _apple(asked)
    if apple is not None:
        return apple
    plain = {_plain(known): gpu for known, gpu in GPUS.items()} | {_plain(key): GPUS[known] for key, known in OTHER_NAMES.items()}
    plain |= {key.removeprefix("rtx"): gpu for key, gpu in plain.items() if key.startswith("rtx")}
    key = _plain(asked)
    found = plain.get(key) or plain.get(re.sub(r"(\d+)gb$", r"\1", key)) or plain.get(re.sub(r"\d+gb$", "", key))
    if found is not None:
        return found
    near = [plain[match].name for match in nearest(key, list(plain), 3)]
    hint = f"did you mean {' or '.join(dict.fromkeys(near))}? " if near else ""
    hint = "name its memory too, such as `cpu 16GB`; " if key.startswith("cpu") else hint
    fix = f"{hint}known are {', '.join(GPUS)}, M1 to M4 (Pro, Max) with their memory, and `cpu 16GB`"
    raise MachineError(21, f"no machine is called {name}", where="--on", fix=fix)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _apple(asked: str) -> Gpu | None:
    size = MEMORY.search(asked)
    chip = " ".join(MEMORY.sub("", asked).split())
    if chip not in APPLE:
        return None
    memory = float(size.group(1)) if size else 16.0
    return Gpu(f"Apple {chip.title()} {memory:g}GB", APPLE_SHARE * memory, True, APPLE_SHARE * APPLE[chip], kind="mps")
