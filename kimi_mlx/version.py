"""The version of kimi-mlx. Modules import it from here, not from the package itself."""

__version__ = "0.2.0"
