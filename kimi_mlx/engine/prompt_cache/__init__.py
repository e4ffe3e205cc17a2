"""The prompt cache on disk, in blocks of tokens."""
