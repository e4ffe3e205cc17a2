#!/usr/bin/env python3
"""Benchmark of pauses: the longest pause of eight running answers while four prompts come, with an image or without.

python scripts/bench_image_pauses.py            kimi-mini-vl's own tower, then a wider one with random weights
python scripts/bench_image_pauses.py 1008       images of 1008 x 1008 pixels instead of 504 x 504

Everything runs on an engine in this process. A prompt comes every ten steps; prompts without an image have as many
tokens. For each case a line shows the longest time between two tokens of an answer and the median; then both in
processor time of this process, which depends less on what else runs.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

import kimi_mlx
from kimi_mlx.engine.engine import Engine
from kimi_mlx.engine.events import Token
from kimi_mlx.engine.request import Request
from kimi_mlx.images.resize import PATCH_SIZE
from kimi_mlx.model.config import load_config
from kimi_mlx.runtime.load import load_share, prepare_device
from tests.checkpoints import write_checkpoint
from tests.images import make_image

STREAMS, PROMPTS, STEPS_BETWEEN, STEPS_AFTER = 8, 4, 10, 120
MINI = Path(kimi_mlx.__file__).parent / "models" / "kimi-mini-vl"
WIDER = {"vt_hidden_size": 512, "mm_hidden_size": 512, "vt_intermediate_size": 1912, "vt_num_attention_heads": 8}


def make_request(seed: int, side: int, placeholder: int, *, has_image: bool) -> Request:
    """Return a prompt with one image of side x side pixels, or with as many tokens of text."""
    image = make_image(seed, (1, side // PATCH_SIZE, side // PATCH_SIZE))
    if has_image:
        return Request((placeholder,) * image.num_tokens, max_tokens=1, images=(image,))
    return Request(tuple(20 + (at * at + seed) % 1499 for at in range(image.num_tokens)), max_tokens=1)


def measure(folder: Path, side: int, *, has_image: bool) -> str:
    """Add a request every ten steps to an engine with running answers; return the pauses as text."""
    model = load_share(folder, load_config(folder))
    assert model.config.vision is not None
    engine = Engine(model, cache_bytes=2 * 10**9)
    for stream in range(STREAMS):
        engine.add(stream, Request((20 + stream, 30, 40), max_tokens=10**4))
    for _ in range(5):
        list(engine.step())
    pauses: list[tuple[float, float]] = []
    last = time.perf_counter(), time.process_time()
    for step in range(PROMPTS * STEPS_BETWEEN + STEPS_AFTER):
        if step % STEPS_BETWEEN == 0 and step < PROMPTS * STEPS_BETWEEN:
            placeholder = model.config.vision.media_placeholder_token_id
            engine.add(STREAMS + step, make_request(step, side, placeholder, has_image=has_image))
        ids = [request_id for request_id, event in engine.step() if isinstance(event, Token)]
        assert set(range(STREAMS)) <= set(ids)
        now = time.perf_counter(), time.process_time()
        pauses.append((now[0] - last[0], now[1] - last[1]))
        last = now
    columns = list(zip(*pauses, strict=True))
    times = [f"{max(column) * 1e3:7.1f} ({statistics.median(column) * 1e3:5.1f})" for column in columns]
    return f"pause {times[0]} ms, cpu {times[1]} ms"


def main(side: int) -> None:
    """Run all cases."""
    prepare_device()
    with tempfile.TemporaryDirectory() as parent:
        config = json.loads((MINI / "config.json").read_text())
        wider = {**config, "vision_config": {**config["vision_config"], **WIDER}}
        del wider["quantization"], wider["quantization_config"]
        folders = {"kimi-mini-vl": MINI, "wider tower": write_checkpoint(Path(parent), wider, seed=1)}
        for name, folder in folders.items():
            for has_image in (False, True):
                case = f"{name}, {PROMPTS} prompts with {'an image' if has_image else 'text'}"
                print(f"{case:40} {measure(folder, side, has_image=has_image)}", end="", flush=True)
                print(f", load {os.getloadavg()[0]:.1f}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 504)
