"""The version of kimi-mlx, for every module; nothing below the command line imports the package itself."""

__version__ = "0.1.0"
