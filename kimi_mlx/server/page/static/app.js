document.body.append("kimi-mlx");
