"""Load a checkpoint: its model, tokenizer, grammars and prompt cache."""
