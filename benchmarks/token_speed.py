"""Time to read, format, mask and tokenize a data file: the first time, and from the cache.

The clock covers `prepare.read` and `prepare.tokenize`: all between the file and token arrays, without loading the tokenizer.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

from llm_finetune_kit.config import DataSection
from llm_finetune_kit.data import prepare
from llm_finetune_kit.models.tokenizer import load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="../shared/data/sft/alpaca_data.json.gz")
    parser.add_argument("--model", type=Path, nargs="+", default=[Path("src/llm_finetune_kit/assets/demo")])
    asked = parser.parse_args()
    settings = DataSection()
    for model in asked.model:
        chat = load_tokenizer(model)
        with tempfile.TemporaryDirectory() as cache:
            os.environ["LLM_FINETUNE_KIT_CACHE"] = cache
            for label in ("first time", "from the cache"):
                started = time.perf_counter()
                encoded = prepare.tokenize(prepare.read(asked.data, settings), settings, chat, chat.fingerprint())
                seconds = time.perf_counter() - started
                tokens = encoded.tokens
                print(
                    f"{model.name}: {label} {seconds:.2f} s, {encoded.report['rows']:,} rows, {len(tokens):,} examples, "
                    f"{len(tokens.ids):,} tokens, {int(tokens.targets.sum()):,} learned",
                    flush=True,
                )


if __name__ == "__main__":
    main()
