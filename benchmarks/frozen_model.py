"""The parts of the frozen inputs that make up the model: weights, tokenizer and the first adapter."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2Tokenizer, LlamaTokenizer
from transformers.convert_slow_tokenizer import generate_merges

from shapes import Shape

DEMO = Path(__file__).resolve().parents[1] / "src/llm_finetune_kit/assets/demo"
DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout")
SEED = 20260101
LORA_B_STD = 0.02  # B = 0, the usual start, would hide a contender that gets A wrong


def build_model(shape: Shape, data: Path) -> Any:
    """The model in the number format it is stored in, without dropout anywhere."""
    if not shape.config:
        return AutoModelForCausalLM.from_pretrained(DEMO, dtype=shape.stored)
    config = AutoConfig.from_pretrained(data / "configs" / shape.config)
    config.name_or_path = ""  # PEFT would look there for the weights
    for name in DROPOUTS:
        if hasattr(config, name):
            setattr(config, name, 0.0)
    torch.manual_seed(SEED)
    return AutoModelForCausalLM.from_config(config, dtype=shape.stored)


def build_tokenizer(shape: Shape, data: Path) -> Any:
    """The shape's tokenizer, with a token to pad with."""
    folder = data / "tokenizers" / shape.tokenizer
    if not shape.tokenizer:
        tokenizer = AutoTokenizer.from_pretrained(DEMO)
    elif (folder / "tokenizer.bin").exists():
        tokenizer = llama_tokenizer(folder / "tokenizer.bin")
    else:
        tokenizer = GPT2Tokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def llama_tokenizer(path: Path) -> LlamaTokenizer:
    """Llama's tokenizer from llama2.c's file: an int32, then for each token a float32 score, an int32 length and its bytes."""
    raw, place, scores = path.read_bytes(), 4, {}
    while place < len(raw):
        score, size = struct.unpack_from("<fi", raw, place)
        place += 8 + size
        scores[raw[place - size : place].decode("utf-8").strip("\n").replace(" ", "▁")] = score
    ids = {piece: index for index, piece in enumerate(scores)}
    apart = {piece for piece in scores if piece in ("<unk>", "<s>", "</s>") or piece.startswith("<0x")}
    return LlamaTokenizer(vocab=ids, merges=generate_merges(ids, scores, skip_tokens=apart), add_bos_token=True)


def save_adapter(model: Any, lora: dict[str, Any], folder: Path) -> None:
    """Write the first adapter in PEFT's layout, float32, with a small random A and a small random B."""
    torch.manual_seed(SEED + 1)
    wrapped: Any = get_peft_model(model, LoraConfig(**lora))
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=LORA_B_STD)
    wrapped.save_pretrained(folder)
