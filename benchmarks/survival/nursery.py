"""Command lines as processes of their own, forked from one that has imported everything: a trial takes a second, not seven."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SERVER = """
import json, os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it starts in the background
import torch
torch.set_num_threads(1)
import matplotlib.figure, peft, transformers
import matplotlib.backends.backend_agg
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, LlamaForCausalLM
try:
    import bitsandbytes
except ImportError:
    pass
from llm_finetune_kit import cli, cli_runs, files, run
from llm_finetune_kit.models import facts, loading, tokenizer
from llm_finetune_kit.report import write
from llm_finetune_kit.training import assembly, checkpoint, loop, optimizer, saving
print("ready", flush=True)
for line in sys.stdin:
    words, output, fault = json.loads(line)
    child = os.fork()
    if child == 0:
        handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        files.armed = files.fault_from(fault)
        code = cli.main(words)
        if files.armed is not None:
            print(f"STEPS ON THE DISK {files.armed.done}")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Nursery:
    """Starts `finetune` with given words, one process at a time."""

    def __init__(self, cache: Path) -> None:
        environment = os.environ | {"LLM_FINETUNE_KIT_CACHE": str(cache), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self.process.stdout is not None and self.process.stdin is not None
        self.said, self.told = self.process.stdout, self.process.stdin
        line = self.said.readline()
        assert line == "ready\n", line

    def start(self, *words: str, output: Path, fault: str | None = None) -> int:
        """Start a command line, what it prints going to `output`, with a fault armed; returns the process id."""
        print(json.dumps([list(words), str(output), fault]), file=self.told, flush=True)
        return int(self.said.readline())

    def end(self) -> int:
        """Wait for the process to end; returns its exit code, negative for a signal that killed it."""
        return int(self.said.readline())

    def close(self) -> None:
        self.told.close()
        self.process.wait(30)
