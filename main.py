"""Train, evaluate or ask a model from a YAML config; the same doors as the `finetune` command.

    python main.py --mode train
    python main.py --mode train --config configs/custom_config.yaml
    python main.py --mode eval --model_path outputs/checkpoint-1000
    python main.py --mode inference --model_path outputs/final --prompt "Explain machine learning"

Any setting can be changed at the end of the line: training.learning_rate=1e-4
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "src"))  # works without installing the package

from llm_finetune_kit.arguments import EXITS, Parser
from llm_finetune_kit.cli import dashed, guarded, main, start
from llm_finetune_kit.cli_evaluate import checked_model, show_evaluation
from llm_finetune_kit.errors import UsageError
from llm_finetune_kit.settings import load_config

DEFAULT_CONFIG = "configs/training_config.yaml"


def parse(words: list[str]) -> argparse.Namespace:
    """The command line of this script; dashes and underscores in flags are the same."""
    parser = Parser(prog="python main.py", description=__doc__ or "", exits=EXITS)
    parser.add_argument("--mode", required=True, choices=["train", "eval", "evaluate", "inference"])
    parser.add_argument("--config", default=DEFAULT_CONFIG, help=f"YAML config (default {DEFAULT_CONFIG})")
    parser.add_argument(
        "--model-path",
        "--model_path",
        default="outputs/final",
        help="a run, a model folder, outputs/final or outputs/checkpoint-N",
    )
    parser.add_argument("--prompt", help="what to ask (inference)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_all([dashed(word) for word in words])


def run(asked: argparse.Namespace) -> int:
    """Do what the command line asks and return the exit code."""
    if asked.mode == "inference":
        if not asked.prompt:
            raise UsageError(2, "no prompt is given", fix='python main.py --mode inference --prompt "Explain machine learning"')
        return main(["generate", asked.model_path, "--prompt", asked.prompt])
    config, notes = load_config(asked.config, asked.overrides)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if asked.mode == "train":
        return start(config)
    data = config.data.eval_file or config.data.train_file
    return show_evaluation(
        checked_model(asked.model_path), str(data), max_length=config.model.max_length, dtype=config.model.dtype, as_json=False
    )


if __name__ == "__main__":
    raise SystemExit(guarded(lambda: run(parse(sys.argv[1:]))))
