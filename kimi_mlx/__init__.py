"""kimi-mlx: Moonshot's Kimi K2 family on Apple Silicon.

import kimi_mlx
model, tokenizer = kimi_mlx.load("kimi-mini")
for delta in kimi_mlx.stream(model, tokenizer, [{"role": "user", "content": "Hello"}]):
    print(delta.text, end="")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kimi_mlx.version import __version__

if TYPE_CHECKING:
    from kimi_mlx.runtime.load import load
    from kimi_mlx.session.stream import stream

__all__ = ["__version__", "load", "stream"]


def __getattr__(name: str) -> Any:
    """Import `load` and `stream` at their first use, so that `import kimi_mlx` stays cheap."""
    if name == "load":
        from kimi_mlx.runtime.load import load

        return load
    if name == "stream":
        from kimi_mlx.session.stream import stream

        return stream
    raise AttributeError(f"module `kimi_mlx` has no attribute `{name}`")
