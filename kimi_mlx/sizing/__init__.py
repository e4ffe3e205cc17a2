"""Arithmetic of memory: the KV cache, prefill, the overhead, and how many hosts hold a model. Does not import MLX."""
