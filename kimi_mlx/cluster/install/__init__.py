"""Install kimi-mlx on hosts that lack it."""
