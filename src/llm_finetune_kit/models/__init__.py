"""Models: where their files are, facts about them, loading, adapters, tokenizer and attention."""

import logging
import warnings

# it is imported by peft wherever it is installed, and would say on every machine which kernels it has not got
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# peft reads a property that transformers calls by another name now; with `python -W error` that would end every run
warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated", category=FutureWarning)
