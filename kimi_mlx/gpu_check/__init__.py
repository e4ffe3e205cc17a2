"""Check of the model on this machine's GPU: `kimi-mlx doctor --gpu`, and tests/gpu."""
