"""`kimi-mlx service`: a server that starts at login and after a crash; one file per command."""
