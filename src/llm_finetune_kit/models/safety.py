"""What stands in a model's folder, looked at before any of it is loaded. Needs no torch; nothing of it is run.

Only the headers of safetensors files are read, so this takes milliseconds for a model of any size.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from llm_finetune_kit.errors import ModelError

# Faults of this module:  30 damaged file   31 stand-in for a file   32 shards do not fit together   33 no weights or only pickles
#                         34 code of its own   35 damaged JSON   36 quantized already   37 number format
#                         38 not causal   41 tokenizer larger than the model

WEIGHTS, INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"
MOST_HEADER = 100_000_000  # bytes, the limit of the format itself
SMALL_JSON = 20_000_000  # bytes; of larger ones (vocabularies) only the beginning is looked at
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
FLOATS = ("F64", "F32", "F16", "BF16")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")
CAUSAL = re.compile(r"CausalLM|LMHead|ConditionalGeneration")
SUPPORTED = (
    "supported are causal language models that transformers knows by itself (GPT-2, Llama, Mistral, Phi, Qwen, Gemma, SmolLM, "
    "OLMo and others) in safetensors files of float32, bfloat16 or float16"
)
AGAIN = "download the file again: remove it first, so that it is not taken from the cache"


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file; its bytes are [start, end) of the file."""

    name: str
    dtype: str
    start: int
    end: int


def check_folder(folder: Path, *, weights: bool = True, trusted: bool = False) -> None:
    """Raise ModelError if the folder's configs are damaged or ask for code of their own, or its weights are not sound.

    With `trusted` code in the folder may be run later. Without `weights` the weights need not be there.
    """
    config = _read_json(folder / "config.json")
    for path in sorted(folder.glob("*.json")):
        _refuse_stand_in(path)
        if not trusted and path.stat().st_size < SMALL_JSON:
            _refuse_code(path, folder)
    _check_kind(config, folder / "config.json", trusted)
    if weights:
        stored = [tensor for path in weight_files(folder) for tensor in read_header(path)]
        _check_formats(stored, folder)


def check_adapter_files(folder: Path) -> None:
    """Raise ModelError if an adapter's files are not sound, or are pickles."""
    _read_json(folder / "adapter_config.json")
    if not (folder / ADAPTER).is_file():
        _refuse_without_weights(folder, ADAPTER)
    _check_formats(read_header(folder / ADAPTER), folder)


# --- weights -----------------------------------------------------------------------------------------------


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the model, complete by their index. Raises ModelError where they are not."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        _refuse_without_weights(folder, WEIGHTS)
    places = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) and Path(name).name == name for name in places.values()):
        raise ModelError(32, "has no weight_map of file names", where=str(folder / INDEX), fix=AGAIN)
    shards = sorted(set(places.values()))
    here = {path.name for path in folder.glob("model-*-of-*.safetensors")}
    faults = [_listed("missing", [name for name in shards if not (folder / name).is_file()])]
    faults += [_listed("not in the index", sorted(here - set(shards)))]
    if not any(faults):
        held = {name: {tensor.name for tensor in read_header(folder / name)} for name in shards}
        faults += [
            _listed("tensors named by the index but absent", [key for key, name in places.items() if key not in held[name]])
        ]
    if any(faults):
        raise ModelError(
            32,
            f"the parts of the model do not fit together: {'; '.join(fault for fault in faults if fault)}",
            where=str(folder),
            why=f"{INDEX} names {len(shards)} files",
            fix="download what is missing, and remove what belongs to another model",
        )
    return [folder / name for name in shards]


def _listed(what: str, names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{what}: {', '.join(names[:4])}{more}" if names else ""


def read_header(path: Path) -> list[Stored]:
    """The tensors of a safetensors file. Raises ModelError, with the sizes found and expected, if it is not whole."""
    size = path.stat().st_size
    _refuse_stand_in(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8:
            raise _damaged(path, f"is cut off: it has {size} bytes, and a header alone has more")
        if length > MOST_HEADER:
            raise _damaged(path, f"is no safetensors file: its header would have {length:,} bytes")
        if size < 8 + length:
            raise _damaged(path, f"is cut off: it has {size:,} bytes, and its header alone has {8 + length:,}")
        raw = file.read(length)
    try:
        tensors = list(_tensors(json.loads(raw), 8 + length))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(path, "has a damaged header") from error
    expected = max((tensor.end for tensor in tensors), default=8 + length)
    if size != expected:
        problem = "is cut off" if size < expected else "has more at its end than belongs there"
        raise _damaged(path, f"{problem}: it has {size:,} bytes and should have {expected:,}")
    return tensors


def _tensors(tree: dict[str, Any], base: int) -> Iterator[Stored]:
    for name, entry in tree.items():
        if name == "__metadata__":
            continue
        start, end = entry["data_offsets"]
        width = BYTES.get(entry["dtype"])
        if not 0 <= start <= end or (width is not None and end - start != width * prod(entry["shape"])):
            raise ValueError(name)
        yield Stored(name, entry["dtype"], base + start, base + end)


def _damaged(path: Path, problem: str) -> ModelError:
    return ModelError(30, problem, where=str(path), fix=AGAIN)


def _refuse_stand_in(path: Path) -> None:
    """Raise ModelError for an empty file, a git-lfs pointer or a web page under the name of a model's file."""
    with open(path, "rb") as file:
        head = file.read(400)
    if not head:
        raise _damaged(path, "is empty (0 bytes)")
    if head.startswith(b"version https://git-lfs"):
        size = re.search(rb"size (\d+)", head)
        why = f"the file itself has {int(size[1]):,} bytes" if size else ""
        fix = "fetch the files themselves: git lfs pull, or download them from the hub"
        raise ModelError(31, "is a git-lfs pointer, not the file it stands for", where=str(path), why=why, fix=fix)
    if re.match(rb"\s*(<\?xml|<!doctype|<html|<head)", head, re.IGNORECASE):
        why = "a download that was refused often leaves the page that says so"
        raise ModelError(31, "is a web page, not a model's file", where=str(path), why=why, fix=AGAIN)


def _refuse_without_weights(folder: Path, wanted: str) -> None:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES and path.stat().st_size)
    if pickles:
        raise ModelError(
            33,
            f"holds its weights only as {', '.join(pickles[:4])}",
            where=str(folder),
            why="such files can run any code when they are opened, so they are never read here",
            fix=f"use a revision of the model that has {wanted}, or convert the file on a machine that you can spare, with "
            "torch.load(..., weights_only=True) and safetensors.torch.save_file",
        )
    raise ModelError(33, f"holds no weights: {wanted} is missing", where=str(folder), fix="download the whole model")


def _check_formats(stored: list[Stored], folder: Path) -> None:
    strange = sorted({tensor.dtype for tensor in stored if tensor.dtype not in BYTES})
    if not strange and any(tensor.dtype in FLOATS for tensor in stored):
        return
    kinds = ", ".join(strange) or "integers only"
    fix = "use the model in full precision that it was made from"
    raise ModelError(37, f"stores its weights as {kinds}", where=str(folder), why=SUPPORTED, fix=fix)


def check_vocabulary(chat: Any, vocabulary: int) -> None:
    """Raise ModelError if texts can become token ids that a model with `vocabulary` embeddings does not know.

    `chat` is a ChatTokenizer. Special tokens that neither its template nor its settings use never come up: as text
    they are spelled out.
    """
    used = {chat.eos_id, chat.bos_id, chat.pad_id}
    beyond = {text: index for text, index in chat.backend.get_vocab(with_added_tokens=True).items() if index >= vocabulary}
    harmful = sorted(text for text in beyond if text not in chat.specials or text in chat.template or beyond[text] in used)
    if not harmful:
        return
    only_pad = all(beyond[text] == chat.pad_id not in (chat.eos_id, chat.bos_id) for text in harmful)
    pad_fix = "remove pad_token from tokenizer_config.json: the end of text is used instead"
    raise ModelError(
        41,
        f"the tokenizer knows {len(beyond)} tokens more than the model, which has embeddings for {vocabulary:,}: "
        + ", ".join(harmful[:4]),
        where="model.name",
        why="a text with one of them cannot be computed",
        fix=pad_fix
        if only_pad
        else "take the tokenizer of the same revision as the weights, or train the embeddings of new "
        "tokens too: lora.modules_to_save",
    )


# --- configs -----------------------------------------------------------------------------------------------


def _read_json(path: Path) -> dict[str, Any]:
    try:
        _refuse_stand_in(path)
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(35, "is missing", where=str(path), fix="download the whole model") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(35, "is not valid JSON", where=str(path), why=str(error)[:200], fix=AGAIN) from None
    if not isinstance(tree, dict):
        raise ModelError(35, "does not hold a JSON object", where=str(path), fix=AGAIN)
    return tree


def _refuse_code(path: Path, folder: Path) -> None:
    """Raise ModelError if a config asks for code of the model's own that transformers could not do without.

    Many models carry such code from the time before transformers knew them; for those its own classes are used.
    """
    if b"auto_map" not in (raw := path.read_bytes()):
        return
    try:
        asking = list(_asking_for_code(json.loads(raw), ""))
    except (ValueError, RecursionError):
        asking = [("", "code")]
    for kind, code in asking:
        if path.name == "config.json" and _known(kind):
            continue
        if path.name == "tokenizer_config.json" and (folder / "tokenizer.json").is_file():
            continue
        raise ModelError(
            34,
            f"asks to run code of its own: {code}",
            where=str(path),
            why="whoever wrote that code could do anything on this machine",
            fix="use a model that transformers knows by itself; or read the code, then set model.trust_remote_code: true "
            "and model.revision to the commit that you read",
        )


def _asking_for_code(tree: Any, kind: str) -> Iterator[tuple[str, str]]:
    """(model type, what is asked for) for every `auto_map`, however deep."""
    if isinstance(tree, dict):
        kind = str(tree.get("model_type", kind))
        if tree.get("auto_map"):
            asked = tree["auto_map"]
            yield kind, ", ".join(map(str, asked.values() if isinstance(asked, dict) else [asked]))
        for part in tree.values():
            yield from _asking_for_code(part, kind)
    elif isinstance(tree, list):
        for part in tree:
            yield from _asking_for_code(part, kind)


def _known(kind: str) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return kind in CONFIG_MAPPING_NAMES


def _check_kind(config: dict[str, Any], path: Path, trusted: bool) -> None:
    method = config.get("quantization_config")
    if method:
        name = str(method.get("quant_method", "")) if isinstance(method, dict) else ""
        raise ModelError(
            36,
            f"is quantized already{f' ({name})' if name else ''}",
            where=str(path),
            why=SUPPORTED,
            fix="use the model in full precision that it was made from; model.quantization: nf4 makes it as small while it loads",
        )
    named = [str(name) for name in config.get("architectures") or []]
    if config.get("is_encoder_decoder") or (named and not trusted and not any(CAUSAL.search(name) for name in named)):
        kind = ", ".join(named) or str(config.get("model_type", "it"))
        fix = "choose a causal language model: `finetune models` lists some"
        raise ModelError(38, f"{kind} does not continue text from left to right", where=str(path), why=SUPPORTED, fix=fix)
