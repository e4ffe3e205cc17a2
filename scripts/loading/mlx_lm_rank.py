"""A rank of the loading benchmark that runs mlx-lm's `sharded_load`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import load_tokenizer, sharded_load

from kimi_mlx.cluster.channel.messages import Message
from kimi_mlx.errors import WeightsError
from scripts.loading.rank import Loader, run

NO_REMOTE_CODE = {"trust_remote_code": False}


def main() -> None:
    """Load with mlx-lm, in tensor or pipeline mode."""
    run(open_mlx_lm)


def open_mlx_lm(start: Message, group: mx.distributed.Group) -> Loader:
    """Return a function that loads this rank's share.

    The tokenizer is loaded once before, so that the imports of transformers are not measured.
    """
    folder = start["folders"][group.rank()]
    groups: dict[str, Any] = {f"{start['mode']}_group": group}

    def load() -> nn.Module:
        return sharded_load(folder, **groups, tokenizer_config=NO_REMOTE_CODE)[0]

    _convert_errors(start["mode"], folder, lambda: load_tokenizer(Path(folder), NO_REMOTE_CODE))
    return lambda: _convert_errors(start["mode"], folder, load)


def _convert_errors(mode: str, folder: str, call: Any) -> Any:
    try:
        return call()
    except Exception as error:  # mlx-lm may raise anything
        first_line = (str(error).splitlines() or [""])[0]
        raise WeightsError(
            f"mlx-lm cannot load `{folder}` ({mode}): {type(error).__name__}: {first_line}",
            hint="run the benchmark with --no-against",
        ) from error


if __name__ == "__main__":
    main()
