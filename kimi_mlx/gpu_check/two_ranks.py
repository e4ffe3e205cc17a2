"""Two ranks on this machine generate the same text as one process, with each kind of placement."""

from __future__ import annotations

from contextlib import closing

from kimi_mlx.engine.events import Token
from kimi_mlx.engine.request import Request
from kimi_mlx.gpu_check.context import Context
from kimi_mlx.gpu_check.random_model import random_tokens
from kimi_mlx.model.config import load_config
from kimi_mlx.model.device import has_gpu
from kimi_mlx.session.open import open_session
from kimi_mlx.session.session import SessionOptions
from kimi_mlx.store.locate import ensure_downloaded

STRATEGIES = ("hybrid", "pipeline")
PROMPT_TOKENS, NEW_TOKENS = 80, 16


def check(context: Context) -> None:
    """Generate greedily in float32, where rounding does not change the text."""
    if context.device == "cpu" and has_gpu():
        context.skip("ranks compute on the GPU, because there is one")
        return
    folder = ensure_downloaded("kimi-mini", 1, "hybrid", None)
    tokens = random_tokens(PROMPT_TOKENS, load_config(folder).vocab_size)
    prompt = tuple(int(token) for token in tokens[0].tolist())  # pyright: ignore[reportArgumentType, reportGeneralTypeIssues]
    request = Request(prompt, max_tokens=NEW_TOKENS)
    context.progress("one process")
    with context.on_device():
        expected = _text(SessionOptions(folder, dtype="float32"), request)
    context.require(f"one process: {NEW_TOKENS} tokens", len(expected) == NEW_TOKENS)
    for strategy in STRATEGIES:
        context.progress(strategy)
        options = SessionOptions(folder, ranks=2, dtype="float32", strategy=strategy, check_every=1)
        context.require(f"{strategy}: the text of one process", _text(options, request) == expected)


def _text(options: SessionOptions, request: Request) -> list[int]:
    with closing(open_session(options)) as session:
        return [event.id for event in session.generate(request) if isinstance(event, Token)]
