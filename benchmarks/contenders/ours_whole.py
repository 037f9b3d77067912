"""llm_finetune_kit without sharing what prompts begin with alike (`training.share_prompts=false`)."""

from ours import measure

if __name__ == "__main__":
    measure(sharing=False)
