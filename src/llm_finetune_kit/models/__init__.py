"""Models: where their files are, facts about them, loading, adapters, tokenizer and attention."""
