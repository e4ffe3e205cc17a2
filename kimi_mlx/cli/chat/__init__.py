"""The command `kimi-mlx chat`: a conversation in the terminal, or one answer."""
