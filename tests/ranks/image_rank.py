"""One rank of a ring that answers prompts with images, for several placements; see test_images.

MLX's environment variables set the rank and the hostfile. The cases are a JSON list on standard input; the answers to
each are one line on standard output. Only rank 0 gets the patches.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from kimi_mlx.engine.engine import Engine
from kimi_mlx.engine.events import Encoded, Finished, Token
from kimi_mlx.engine.request import ImageInput, Request, Sampling
from kimi_mlx.errors import KimiMlxError
from kimi_mlx.model.config import load_config
from kimi_mlx.model.vision import Encoding
from kimi_mlx.parallel.communicator import RankCommunicator
from kimi_mlx.parallel.group import Group, MlxGroup
from kimi_mlx.rank.rendezvous import pin_to_cpu
from kimi_mlx.runtime.load import load_share, prepare_device
from tests.images import make_image, make_prompt

CHUNK = 16
"""Tokens per prefill step; smaller than the largest image."""

BROKEN = make_image(5)
"""Image on which the tower fails."""

LARGE, SMALL = make_image(1, (1, 12, 10)), make_image(2)

TEXT = tuple((7 * at + at * at) % 180 for at in range(60))

Answers = list[Any]


def make_request(*parts: Sequence[int] | ImageInput, **values: Any) -> Request:
    """Return a request for a prompt of tokens and images."""
    prompt, images = make_prompt(*parts)
    return Request(prompt, images=images, **values)


REQUESTS = [
    make_request(TEXT[:5], LARGE, TEXT[5:12], max_tokens=10),
    make_request(TEXT[10:40], max_tokens=14),
    make_request(TEXT[:5], LARGE, TEXT[5:9], SMALL, max_tokens=8, sampling=Sampling(temperature=0.9, seed=11)),
    make_request(TEXT[:5], BROKEN, TEXT[5:9], max_tokens=5),
    make_request(TEXT[:5], SMALL, TEXT[5:9], SMALL, TEXT[:5], SMALL, max_tokens=12),
    make_request(LARGE, TEXT[3:9], max_tokens=3),
]


def main() -> None:
    """Join the ring and answer the cases."""
    cases = json.load(sys.stdin)
    prepare_device()
    pin_to_cpu((int(os.environ["MLX_RANK"]), int(sys.argv[1])))
    group = MlxGroup(mx.distributed.init(strict=True, backend="ring"))
    for case in cases:
        print(json.dumps(answer(case, group)), flush=True)


def answer(case: dict[str, Any], group: Group | None) -> Answers:
    """Return the tokens of each answer, one for each of REQUESTS, and at last the number of steps of the tower.

    An error is -1 after the tokens.

    Args:
        case: `folder`, `strategy`, `speculate`.
        group: ranks that share the model; None for one process.
    """
    folder = Path(case["folder"])
    model = load_share(folder, load_config(folder), "float32", group, strategy=case["strategy"])
    assert (model.vision is not None) == (group is None or group.rank == 0)
    if isinstance(model.communicator, RankCommunicator):
        model.communicator.check_every = 3
    engine = Engine(model, prefill_chunk=CHUNK, speculate=case["speculate"])
    answers: Answers = [[] for _ in REQUESTS]
    num_encoded = 0
    waiting = list(enumerate(REQUESTS))
    with _small_steps():
        while waiting or not engine.is_idle:
            if waiting:
                request_id, request = waiting.pop(0)
                has_patches = group is None or group.rank == 0
                patches = {image.digest: image.patches for image in request.images if image.patches is not None}
                engine.add(request_id, Request.from_dict(request.to_dict(), patches if has_patches else None))
            for request_id, event in engine.step():
                num_encoded += isinstance(event, Encoded)
                if isinstance(event, Token):
                    answers[request_id].append(event.id)
                elif isinstance(event, KimiMlxError):
                    answers[request_id].append(-1)
                elif isinstance(event, Finished):
                    assert event.reason == "length"
    return [*answers, num_encoded]


@contextmanager
def _small_steps() -> Iterator[None]:
    """Encode one layer at a time, send some rows at a time, and fail on BROKEN."""

    class SmallEncoding(Encoding):
        def __init__(self, tower: Any, pixels: mx.array, grid_thw: Any):
            assert BROKEN.patches is not None
            if mx.array_equal(pixels, mx.array(BROKEN.patches)):
                raise RuntimeError("broken")
            super().__init__(tower, pixels, grid_thw, part_multiply_adds=1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kimi_mlx.engine.image_encoder.Encoding", SmallEncoding)
        patch.setattr("kimi_mlx.engine.image_encoder.SLICE_BYTES", 2048)
        yield


if __name__ == "__main__":
    main()
