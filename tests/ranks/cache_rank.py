"""One rank of a ring with a prompt cache on disk: print its answer and the number of cached prompt tokens.

MLX's environment variables set the rank and the hostfile.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import mlx.core as mx

from kimi_mlx.engine.engine import Engine
from kimi_mlx.engine.events import Finished, Token
from kimi_mlx.engine.request import Request
from kimi_mlx.model.config import load_config
from kimi_mlx.parallel.group import MlxGroup
from kimi_mlx.rank.rendezvous import pin_to_cpu
from kimi_mlx.runtime.load import fingerprint, load_share, prepare_device
from kimi_mlx.runtime.prompt_cache import open_prompt_cache


def main() -> None:
    """Join the ring and answer one request."""
    case = json.load(sys.stdin)
    rank = int(os.environ["MLX_RANK"])
    prepare_device()
    pin_to_cpu((rank, case["ranks"]))
    group = MlxGroup(mx.distributed.init(strict=True, backend="ring"))
    folder = Path(case["folder"])
    config = load_config(folder)
    model = load_share(folder, config, "float32", group, strategy=case["strategy"])
    identity = fingerprint(folder, config, rank, group.size, case["strategy"])
    blocks = open_prompt_cache(Path(case["cache_dir"]), 10**9, model, identity, group, case["ranks"], warn=sys.exit)
    events = list(Engine(model, blocks=blocks).generate(Request(tuple(case["prompt"]), 8)))
    blocks.close()
    end = events[-1]
    assert isinstance(end, Finished)
    tokens = [event.id for event in events if isinstance(event, Token)]
    print(json.dumps([tokens, end.statistics.cached_tokens]), flush=True)


if __name__ == "__main__":
    main()
