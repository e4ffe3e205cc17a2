"""What a model needs of machines, and how fast it will be there: arithmetic on published figures. Never imports MLX."""
