"""Peak memory of a run by part, from sizes alone. Pure arithmetic over what this engine keeps alive, and when.

The peak is that of the worst moment, so every moment is written out: loading, the forward end of a step (all activations
and the loss head), the backward end (all gradients), saving and evaluation. What autograd keeps per token was read off
the engine's own operations; tests hold it against torch's saved tensors. Measured constants stand here, each with its source;
docs/planning.md has the figures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Logits of one chunk (training/step.py), which become their slope: a CPU page-faults larger fresh blocks anew each time, and a
# GPU needs some hundred rows at once, of the largest vocabularies too, lest it do nothing but read the head's weights.
HEAD_WORKSPACE = {"cpu": 30_000_000, "cuda": 256_000_000, "mps": 256_000_000}
HEAD_SLICE = {"cpu": 2_000_000, "cuda": 256_000_000, "mps": 256_000_000}  # those in float32 at once: a CPU's stay in its cache
# Bytes that may stand between while the slopes of an MLP are formed: on a CPU they stay in its cache.
MLP_WORKSPACE = {"cpu": 4_000_000, "cuda": 256_000_000, "mps": 256_000_000}
LIBRARIES = 660_000_000  # torch, transformers, peft and their kind in resident memory: measured, Linux, CPU build
QUANTIZER = 60_000_000  # bitsandbytes on top of them
PER_TOKEN_NAME = 700  # bytes per vocabulary entry of a loaded fast tokenizer: measured
KERNELS = 48  # that oneDNN keeps, see hardware.share_the_machine
KERNEL = 330_000  # bytes of one: measured, demo model, capacities of 50 to 1,024
KERNELS_OF_A_SHAPE = 24  # that a pass of a new count of tokens needs: counted, SmolLM2-135M with LoRA
CONTEXT = 600_000_000  # CUDA's context and kernels; not measured here
# Widths of the MLP that stand at once in the backward pass of one block, with gaps; set on Qwen2.5-0.5B, 2,048 tokens. Half as
# many where the MLP is one function: 1 and some rows are in use then, instead of 3.
SLOPES = 6
GAPS = {"cpu": 0.27, "cuda": 0.05, "mps": 0.05}  # of activations: what the allocator holds between them; measured on CPUs only
MAPPED = 1 << 25  # bytes from which the C library maps a block by itself, which leaves few gaps
MAPPED_GAPS = 0.06
STATE = {"adamw": 8.0, "paged_adamw": 8.0, "adamw_8bit": 2.03, "paged_adamw_8bit": 2.03}  # optimizer bytes per trained weight
Parts = dict[str, int]


@dataclass(frozen=True)
class Work:
    """What decides the memory of a run; `tokens` and `longest` are of its largest pass."""

    method: str
    dtype: str
    tokens: int
    longest: int
    device: str = "cpu"
    r: int = 0
    targets: tuple[str, ...] = ()
    trained: int = 0
    quantization: str | None = None
    double_quantization: bool = True
    recompute: int = 0  # every n-th block; 0 for none
    frozen_layers: int = 0
    optimizer: str = "adamw"
    passes: int = 1  # of one step
    shapes: int = 1  # different counts of tokens that passes of the run may have
    data_tokens: int = 0  # of the whole data set, held in memory
    variant: str = "lora"
    dropout: bool = False  # of adapters, whose layers are then computed one by one
    compiled: bool = False  # blocks, which launch fewer kernels

    @property
    def size(self) -> int:
        return BYTES[self.dtype]

    @property
    def full(self) -> bool:
        return self.method == "full"

    @property
    def cast(self) -> bool:
        """Whether float32 weights are copied to a narrower dtype for every product."""
        return self.full and self.size < 4


def peak(model: Any, work: Work) -> tuple[str, Parts]:
    """The moment of highest memory and its bytes by part; `model` is a ModelFacts."""
    found = moments(model, work)
    worst = max(found, key=lambda name: sum(found[name].values()))
    return worst, {part: size for part, size in found[worst].items() if size}


def moments(model: Any, work: Work) -> dict[str, Parts]:
    """Bytes by part at every moment that can be the worst."""
    trained, size = work.trained, work.size
    state = {"optimizer": round(trained * STATE[work.optimizer])}
    base = _always(model, work)
    head = 4 * model.head_parameters if work.full and not (work.frozen_layers and model.tied) else 0
    kept = activations(model, work)
    copies = size * (model.linear_parameters if work.cast else 0) + (2 * trained if not work.full and size == 2 else 0)
    workspace = _head_workspace(model, work)
    before = 4 * trained if work.passes > 1 else 0
    share = GAPS[work.device]
    gaps = round(share * kept["activations"] + (MAPPED_GAPS if _mapped(model, work) else share) * kept["attention"])
    early = {"gradients": before, "weight copies": copies, "loss head": workspace, "gaps": gaps}
    late = {"gradients": 4 * trained, "loss head": head, "block": block_bytes(model, work)}
    on_its_way = {"checkpoint being written": _checkpoint_copy(work)}
    found = {
        "forward": base | state | kept | early | on_its_way,
        "backward": base | state | late | on_its_way,
        "saving": base | state | {"copies while saving": _saving(model, work)},
    }
    if work.device == "cpu":
        found["loading"] = base | {"files": _loading(model, work)}
    return found


def _always(model: Any, work: Work) -> Parts:
    parts = {"weights": weight_bytes(model, work), "unpacked weights": _unpacked(model, work)}
    if not work.full:
        parts["adapter"] = 4 * work.trained
    if work.device != "cpu":
        return parts | {"context": CONTEXT}
    libraries = LIBRARIES + (QUANTIZER if work.quantization or "8bit" in work.optimizer else 0)
    parts["kernels"] = KERNEL * min(KERNELS, KERNELS_OF_A_SHAPE * work.shapes)
    return parts | {"libraries": libraries, "tokenizer and data": PER_TOKEN_NAME * model.vocabulary + 5 * work.data_tokens}


def weight_bytes(model: Any, work: Work) -> int:
    """The base model's weights as they are kept: float32 where all are trained, packed where quantized."""
    if work.full:
        return 4 * int(model.parameters)
    rest = (model.parameters - model.linear_parameters) * work.size
    return int(rest + model.linear_parameters * bytes_per_weight(work.quantization, work.double_quantization, work.size))


def bytes_per_weight(quantization: str | None, double: bool, size: int) -> float:
    """4 bits have a scale for each 64 weights: a float32, or a byte and a float32 for each 256 of those."""
    if quantization is None:
        return size
    if quantization == "int8":
        return 1.0
    return 0.5 + (1 / 64 + 4 / (64 * 256) if double else 4 / 64)


def _unpacked(model: Any, work: Work) -> int:
    """Room for the largest layer's weight in the dtype of products, which packed layers share; a GPU has two."""
    if work.quantization is None:
        return 0
    rooms = 2 if work.device == "cuda" else 1
    return rooms * work.size * max(int(inputs * outputs) for _, inputs, outputs in model.linear_shapes)


def _head_workspace(model: Any, work: Work) -> int:
    """A chunk's logits, a slice of them in float32; with a trained head its gradient, and copies in the products' dtype."""
    states = 2 * work.tokens * model.hidden * (4 if work.full else work.size)
    rooms = ((HEAD_WORKSPACE, work.size), (HEAD_SLICE, 4))
    chunk = sum(max(room[work.device], size * model.vocabulary) for room, size in rooms)
    if not work.full or (work.frozen_layers and model.tied):
        return int(states + chunk)
    matrix = 0 if work.size == 4 else work.size * model.head_parameters
    product = model.head_parameters * (4 if work.size == 4 else 4 + work.size)
    return int(states + chunk + matrix + 4 * model.head_parameters + product)


def _checkpoint_copy(work: Work) -> int:
    """An adapter and its optimizer's state are copied, and written while training goes on; the copy of a GPU's is the host's."""
    return round(work.trained * (4 + STATE[work.optimizer])) if work.device == "cpu" and not work.full else 0


def _saving(model: Any, work: Work) -> int:
    """A checkpoint holds a copy of the optimizer's state, the final model one of the weights in the dtype of its files."""
    final = BYTES.get(model.stored_dtype, 4) * model.parameters if work.full else 4 * work.trained
    return max(round(work.trained * STATE[work.optimizer]), final)


def _loading(model: Any, work: Work) -> int:
    """Files are mapped into memory, and what is converted from them stands beside them until loading ends."""
    stored = BYTES.get(model.stored_dtype, 4)
    same = not work.full and work.quantization is None and stored == work.size
    return 0 if same else stored * int(model.parameters)


# --- activations -------------------------------------------------------------------------------------------


def activations(model: Any, work: Work) -> Parts:
    """Bytes kept for the backward pass of the largest pass."""
    block = block_bytes(model, work)
    attention = attention_bytes(model, work)
    again = math.ceil(model.layers / work.recompute) if work.recompute else 0
    whole = model.layers - again
    stream = work.tokens * model.hidden * (4 if work.full else work.size)
    inside = block - attention
    # a block that is computed again has the gradients of its gated product beside its activations
    widths = SLOPES // 2 if _whole_mlp(model, work) else SLOPES
    slopes = widths * work.tokens * model.intermediate * work.size if again and model.gated else 0
    return {
        "activations": whole * inside + again * stream + 2 * stream + _transient(model, work) + (inside if again else 0) + slopes,
        "attention": whole * attention + (attention if again else 0),
    }


def block_bytes(model: Any, work: Work) -> int:
    """Bytes that one block keeps for its backward pass."""
    return work.tokens * _per_token(model, work) + attention_bytes(model, work)


def _whole_mlp(model: Any, work: Work) -> bool:
    """Whether a block's MLP is one function, which forms its gated product again (models/together.py)."""
    one_by_one = work.full or work.compiled or work.dropout or work.variant == "dora"
    return not one_by_one and any(name == "gate_proj" for name, _, _ in model.block_shapes)


def _per_token(model: Any, work: Work) -> int:
    """Bytes of one block per token, attention's core left out."""
    size, hidden, inner = work.size, model.hidden, model.intermediate
    query, key = model.heads * model.head_dim, model.kv_heads * model.head_dim
    whole = _whole_mlp(model, work)
    shared = 2 * hidden + query + (0 if whole else inner)
    own = sum(width for _, width, _ in model.block_shapes)
    inputs = size * (own if work.cast else shared)  # where weights are cast, every layer casts its input for itself
    twice = 2 if work.full else 1  # a trained scale needs the normalised input too
    norms = 4 * hidden * model.norms * twice if model.gated else (4 if work.full else size) * hidden * model.norms
    if model.query_key_norm:
        norms += 4 * (query + key) * twice
    middle = size * inner * (2 if whole else 3 if model.gated else 1)
    noise = 2 * size * hidden if drops(model) else 0
    wrapped = sum(name in work.targets for name, _, _ in model.block_shapes)
    factor = 2 if work.variant == "dora" else 1
    narrow = size * work.r * wrapped
    wide = size * sum(outputs for name, _, outputs in model.block_shapes if name in work.targets) * (factor - 1)
    return int(inputs + norms + middle + noise + narrow + wide)


def drops(model: Any) -> bool:
    """GPT-2 is made with dropout in its attention and its residuals; its successors have none."""
    return str(model.architecture).startswith("GPT2")


def attention_bytes(model: Any, work: Work) -> int:
    """Bytes of one block's attention core: queries, keys, values and result; with dropout or capped scores all pairs too."""
    query = int(model.heads * model.head_dim)
    size = 4 if work.device == "cpu" else work.size  # a CPU computes it in float32, see models/attention.py
    pairs = int(model.heads) * work.longest * work.tokens
    if drops(model) and work.device == "cpu":  # scores, noise and their product: no fused kernel there drops
        return (3 if work.size < 4 else 5) * size * query * work.tokens + 12 * pairs  # float32 values keep queries and keys alive
    if str(model.architecture).startswith("Gemma2"):  # capped scores
        return 4 * size * query * work.tokens + 8 * pairs
    return 4 * size * query * work.tokens + 4 * int(model.heads) * work.tokens


def _mapped(model: Any, work: Work) -> bool:
    """Whether attention's largest blocks are those of all pairs, and beyond the C library's heap."""
    return drops(model) and work.device == "cpu" and 4 * int(model.heads) * work.longest**2 >= MAPPED


def _transient(model: Any, work: Work) -> int:
    """What the first block of the backward pass needs while all activations still stand."""
    query = int(model.heads * model.head_dim)
    size = 4 if work.device == "cpu" else work.size
    pairs = 8 * model.heads * work.longest**2 if drops(model) and work.device == "cpu" else 0
    width = work.tokens * model.intermediate * work.size
    inside = width + min(MLP_WORKSPACE[work.device], 2 * width) if _whole_mlp(model, work) else 4 * width
    return int(max(inside, 6 * size * query * work.tokens + pairs) + 8 * model.hidden * work.tokens)
