"""One training process: `python -m scripts.mini.rank SETTINGS_JSON`, started by `scripts/mini/launch.py`."""

from __future__ import annotations

import json
import os
import sys

import mlx.core as mx

from scripts.mini.training import Settings, Trainer
from scripts.mini.vision_training import VisionTrainer


def main() -> None:
    """Join the ring, if there is one, and train."""
    mx.set_default_device(mx.cpu)
    group = mx.distributed.init(backend="ring") if "MLX_HOSTFILE" in os.environ else mx.distributed.init()
    settings = Settings(**json.loads(sys.argv[1]))
    (VisionTrainer if settings.vision else Trainer)(settings, group).run()


if __name__ == "__main__":
    main()
