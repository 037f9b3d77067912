"""From files to checked examples: sources, formats, masks, batches."""
