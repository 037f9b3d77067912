"""Where the time of a step goes: a few steps under torch's profiler, as a table by kind of work and a trace for a viewer."""

from __future__ import annotations

import gzip
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llm_finetune_kit.events import Event, Listen, Profiled, Stepped, Warned

WARM, WATCHED = 3, 3  # steps that pass first (kernels are made, memory is taken), and steps that are watched
TRACE = "profile_trace.json.gz"

# Kinds of work, and the operations that count to each; the first that matches. What is left is bookkeeping of small operations.
WORK = {
    "matrix products": r"aten::(mm|addmm|bmm|baddbmm|_addmm_activation)$|mkldnn.*linear|onednn|gemm|cutlass|cublas",
    "quantized weights": r"bitsandbytes|dequantize|kQuantize|kDequantize|gemm_4bit",
    "attention": r"scaled_dot_product|flash|efficient_attention|fmha|varlen",
    "optimizer and clipping": r"_fused_adam|_foreach|linalg_vector_norm|multi_tensor|adam",
    "softmax of the loss": r"log_softmax|HeadLoss|aten::(exp_|gather|scatter_add_)$",
    "norms and activations": r"layer_norm|rms_norm|gelu|silu|swi(sh|glu)|aten::(tanh|sigmoid|rsqrt|pow|mean|sub|div)|norm_kernel",
    "copies and number formats": r"aten::(copy_|_to_copy|cat|clone|fill_|zero_|index|embedding|select|slice)|Memcpy|Memset",
    "additions and products": r"aten::(add|add_|mul|mul_|neg|sum|sqrt)$|elementwise|reduce_kernel|triton_rope",
}
REST = "bookkeeping and Python"


@contextmanager
def profiled(asked: bool, folder: Path, listen: Listen, objective: Any) -> Iterator[Listen]:
    """A listener that also watches some steps where that is `asked` for, writes a trace of the last one into `folder`,
    and says Profiled; the mathematics of the steps is not touched.
    """
    if not asked:
        yield listen
        return
    watch = _Watch(folder, listen, objective.device.type)
    hook = objective.decoder.register_forward_pre_hook(watch.computing)
    try:
        yield watch
    finally:
        hook.remove()
        watch.tell()


class _Watch:
    """Passes events on. After WARM steps each of WATCHED steps is watched, from its first pass in training to its end."""

    def __init__(self, folder: Path, listen: Listen, device: str) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would write to the terminal
        self.folder, self.listen, self.device = folder, listen, device
        self.seen = self.watched = 0
        self.seconds = self.products = 0.0
        self.parts: Counter[str] = Counter()
        self.profiler: Any = None

    def computing(self, model: Any, _: Any) -> None:
        """A pass begins: of a step, if the model is in training."""
        from torch.profiler import ProfilerActivity, profile

        if self.profiler is None and model.training and self.seen >= WARM and self.watched < WATCHED:
            kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.device == "cuda" else [])]
            self.profiler = profile(activities=kinds, with_flops=True)
            self.profiler.start()

    def __call__(self, event: Event) -> None:
        if isinstance(event, Stepped):
            self.seen += 1
            self._stepped(event.seconds)
        self.listen(event)

    def _stepped(self, seconds: float) -> None:
        profiler, self.profiler = self.profiler, None
        if profiler is None:
            return
        profiler.stop()
        parts, products = parts_of(profiler.key_averages(), seconds, self.device)
        self.parts.update(parts)
        self.products += products
        self.seconds += seconds
        self.watched += 1
        if self.watched == WATCHED:
            self._write_trace(profiler)

    def _write_trace(self, profiler: Any) -> None:
        whole, packed = self.folder / "profile_trace.json", self.folder / TRACE
        try:
            profiler.export_chrome_trace(str(whole))
            with whole.open("rb") as source, gzip.open(packed, "wb", compresslevel=5) as target:
                shutil.copyfileobj(source, target)
        except OSError as error:
            self.listen(Warned(f"{TRACE} cannot be written: {error.strerror}", "free some disk space"))
        finally:
            with suppress(OSError):
                whole.unlink()

    def tell(self) -> None:
        """Say what was seen; a run too short to be watched says so."""
        if self.profiler is not None:  # the run ended within a step
            self.profiler.stop()
        if not self.watched:
            self.listen(Warned(f"nothing was profiled: the first {WARM} steps are never watched", "take more steps"))
            return
        parts = {name: part / self.watched for name, part in self.parts.items()}
        rate = self.products / self.parts["matrix products"] if self.parts["matrix products"] else 0.0
        self.listen(Profiled(self.watched, self.seconds / self.watched, parts, rate))


def parts_of(operations: Any, seconds: float, device: str) -> tuple[dict[str, float], int]:
    """Seconds by kind of work, which add up to `seconds`, and the FLOP of the matrix products.

    `operations` are torch's `key_averages()`. On a GPU its kernels are counted, and the rest is time in which it waits.
    """
    parts = dict.fromkeys([*WORK, REST], 0.0)
    for operation in operations:
        spent = operation.self_device_time_total if device == "cuda" else operation.self_cpu_time_total
        parts[next((name for name, pattern in WORK.items() if re.search(pattern, operation.key)), REST)] += spent / 1e6
    parts[REST] = max(0.0, seconds - sum(part for name, part in parts.items() if name != REST))
    return {name: part for name, part in parts.items() if part > 0}, sum(operation.flops or 0 for operation in operations)
