"""What `--help` says of commands that share a file: a paragraph or two, and examples. The first line is in COMMANDS."""

from __future__ import annotations

from llm_finetune_kit.arguments import Parser

TEXTS: dict[str, str] = {
    "train": """\
Every setting may come from a YAML file, from a flag, or as section.key=value; the later word wins. What is left open the
plan decides, and says why. The run goes into a folder of its own under outputs/, with checkpoints that `finetune resume`
goes on from. Plans and results are printed to stdout, progress to stderr.""",
    "demo": """\
Trains the small model inside the package on 20 sample conversations, and shows what changed. It takes the same settings
as train.""",
    "plan": """\
Says what would be decided and why, what it needs of memory, disk, time and money, and what would make it fit where it
does not. Weights are not downloaded, and nothing is written. --on plans for another machine, --probe runs some real
steps here first.""",
    "models": """\
Sizes and licences of the models that a short name is known for, and how each could be fine-tuned on this machine or
another. Any other hub id or local folder works as well.""",
    "doctor": """\
Looks at processor, GPU, memory, disk, packages and caches, and says how to mend what is wrong. Exits with 5 where
training would fail.""",
    "generate": """\
Answers one prompt, or all of a file together: lines of text, or rows with prompts or conversations in any format that
training reads. The same seed gives the same answer.""",
    "eval": """\
Loss, perplexity and bits per byte over the answers in the data; of a tuned model also its base's, with the adapter
switched off.""",
    "compare": """\
Asks and measures both on the same held-out rows, and says in one sentence whether the tuned model is better, worse, or
shows no difference. A run knows its held-out rows; other models need --data.""",
    "data check": """\
Reads all rows as training would and reports what would spoil it: where, and what to do. Exits with 3 where training
would refuse the data. --fix writes a cleaned copy.""",
    "data preview": """\
Shows real examples as the model would see them, with every token marked: learned, only read, or cut off.""",
    "data convert": """\
Writes the rows in another format or kind of file. What the new shape cannot hold is told, and refused where it would
change the meaning.""",
    "data cache": """\
Tokenized data is kept by content, so that a second run starts at once. It may be deleted at any time.""",
}

EXAMPLES: dict[str, tuple[str, ...]] = {
    "train": (
        "finetune --model gpt2 --data sample:chat --max-steps 100",
        "finetune train configs/training_config.yaml training.learning_rate=1e-4",
        "finetune --model tinyllama --data train.jsonl --eval-data eval.jsonl",
        "finetune train finetune.yaml --dry-run",
    ),
    "demo": ("finetune demo", "finetune demo --max-steps 48 --run-name longer"),
    "plan": (
        "finetune plan --model tinyllama --data train.jsonl",
        'finetune plan --model mistral-7b --on "RTX 4090" --price 0.5',
        "finetune plan finetune.yaml --probe",
        "finetune plan finetune.yaml --json",
    ),
    "models": ("finetune models", "finetune models --fits", 'finetune models --on "cpu 16GB" --json'),
    "doctor": ("finetune doctor", "finetune doctor --deep --online"),
    "generate": (
        'finetune generate outputs/final --prompt "How do I reset my password?"',
        "finetune generate outputs/final --prompts questions.jsonl --json",
        'finetune generate demo --prompt "Hello" --temperature 0.8 --seed 1 --stream',
    ),
    "eval": ("finetune eval outputs/final --data eval.jsonl", "finetune eval gpt2 --data sample:chat --json"),
    "compare": (
        "finetune compare outputs/final",
        "finetune compare gpt2 outputs/final --data eval.jsonl",
        "finetune compare outputs/final --fail-if-worse --json",
    ),
    "data check": (
        "finetune data check train.jsonl",
        "finetune data check train.jsonl --eval test.jsonl --model gpt2",
        "finetune data check train.jsonl --fix --out clean.jsonl",
    ),
    "data preview": (
        "finetune data preview train.jsonl --model tinyllama",
        "finetune data preview sample:chat --model demo --count 1",
    ),
    "data convert": (
        "finetune data convert chats.json --to messages --out rows.jsonl",
        "finetune data convert train.csv --to alpaca --out train.json",
    ),
    "data cache": ("finetune data cache", "finetune data cache clear"),
}

RUNNING = (0, 2, 3, 4, 5, 6, 7, 70, 130, 143)  # exit codes of commands that train
EXITS_OF: dict[str, tuple[int, ...]] = {
    "train": RUNNING,
    "demo": RUNNING,
    "plan": (0, 2, 3, 4, 5),
    "doctor": (0, 5),
    "generate": (0, 2, 3, 4, 5),
    "eval": (0, 2, 3, 4, 5),
    "compare": (0, 2, 3, 4, 5, 6),
    "data check": (0, 2, 3),
    "data preview": (0, 2, 3, 4),
    "data convert": (0, 2, 3),
}


def parser_of(command: str, summary: str) -> Parser:
    """A parser with the help of a command that is named in the tables above; `summary` is its first line."""
    text, examples, exits = TEXTS[command], EXAMPLES[command], EXITS_OF.get(command, ())
    return Parser(prog=f"finetune {command}", description=f"{summary}\n\n{text}", examples=examples, exits=exits)
