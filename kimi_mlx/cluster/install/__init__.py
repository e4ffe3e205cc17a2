"""Put kimi-mlx on hosts that lack it."""
