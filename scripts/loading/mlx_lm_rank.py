"""A rank's process of the loading benchmark that runs mlx-lm's `sharded_load`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import load_tokenizer, sharded_load

from kimi_mlx.cluster.ring.messages import Message
from kimi_mlx.errors import WeightsError
from scripts.loading.rank import Loader, run

NO_FOREIGN_CODE = {"trust_remote_code": False}


def main() -> None:
    """Load with mlx-lm, as tensor or pipeline shares."""
    run(open_mlx_lm)


def open_mlx_lm(start: Message, group: mx.distributed.Group) -> Loader:
    """What loads a rank's share.

    The tokenizer is loaded once before: transformers imports most of itself then, which is no part of any figure.
    """
    folder = start["folders"][group.rank()]
    groups: dict[str, Any] = {f"{start['mode']}_group": group}

    def load() -> nn.Module:
        return sharded_load(folder, **groups, tokenizer_config=NO_FOREIGN_CODE)[0]

    _translated(start["mode"], folder, lambda: load_tokenizer(Path(folder), NO_FOREIGN_CODE))
    return lambda: _translated(start["mode"], folder, load)


def _translated(mode: str, folder: str, call: Any) -> Any:
    try:
        return call()
    except Exception as error:  # another project's code, on files that it may not know: it raises all kinds
        words = (str(error).splitlines() or [""])[0]
        raise WeightsError(
            f"mlx-lm cannot load `{folder}` ({mode}): {type(error).__name__}: {words}",
            hint="run the benchmark with --no-against",
        ) from error


if __name__ == "__main__":
    main()
