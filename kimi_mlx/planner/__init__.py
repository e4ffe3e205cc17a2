"""Predict the memory and speed of a model on given machines, from published measurements. Never imports MLX."""
