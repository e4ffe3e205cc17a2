"""The model in MLX: configuration, attention, experts, decoder, and the names of its weights."""
