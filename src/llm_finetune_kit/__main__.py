"""`python -m llm_finetune_kit` is `finetune`."""

from llm_finetune_kit.cli import main

raise SystemExit(main())
