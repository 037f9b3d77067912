"""`finetune export`: an adapter merged into its base. Holds no logic of its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from llm_finetune_kit.arguments import Parser
from llm_finetune_kit.cli_evaluate import checked_model
from llm_finetune_kit.errors import UsageError

TEXT = """\
merge an adapter into its base: a model for other programs

The folder is in transformers' layout: safetensors, config, tokenizer with its chat template, and a card. It loads without
PEFT, in vLLM, llama.cpp's converter and others. The base is taken in full precision, also where the adapter learned on a
quantized one. Before anything is written, the merged model's logits are held against the adapter's.
"""
EXAMPLES = (
    "finetune export outputs/final --out merged",
    "finetune export outputs/demo --out merged --dtype bfloat16 --overwrite",
)


def export_command(words: Sequence[str]) -> int:
    """`finetune export ADAPTER --out FOLDER`; returns the exit code."""
    parser = Parser(prog="finetune export", description=TEXT, examples=EXAMPLES, exits=(0, 2, 4, 5))
    parser.add_argument("model", nargs="?", help="a run, its final folder or a checkpoint, for example outputs/final")
    parser.add_argument("--out", metavar="FOLDER", help="where the merged model goes")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of its weights (default: as trained)")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier export wrote there")
    parser.add_argument("--json", action="store_true", help="print JSON")
    asked = parser.parse_all(list(words))
    if asked.model is None or asked.out is None:
        missing = "no model is named" if asked.model is None else "--out is missing"
        raise UsageError(2, missing, fix=f"for example: {EXAMPLES[0]}")
    name = checked_model(asked.model)
    from llm_finetune_kit.export.merged import export_merged

    found = export_merged(name, Path(asked.out), dtype=asked.dtype, overwrite=asked.overwrite)
    if asked.json:
        print(json.dumps({**vars(found), "folder": str(found.folder)}, indent=2))
        return 0
    from llm_finetune_kit.report import words as say
    from llm_finetune_kit.terminal import print_pairs

    near = f"{found.difference:.3g} at most, where the largest logit is {found.largest:.3g}"
    pairs = [
        ("model", str(found.folder), f"{say.size(found.size_bytes)}, {found.dtype}"),
        ("differs from the adapter by", near, ""),
    ]
    if found.quantized:
        learned = f"it learned on a base in {found.quantized}, and this is on the base in full precision"
        pairs.append(("mind", learned, "compare both before you rely on it"))
    print_pairs([*pairs, ("try it", f'finetune generate {found.folder} --prompt "…"', "")])
    return 0
