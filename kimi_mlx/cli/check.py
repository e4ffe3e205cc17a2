"""`kimi-mlx launch ... check`: whether a cluster answers, and always the same."""

from __future__ import annotations

import time
from contextlib import closing

import typer

from kimi_mlx.cli.open_model import launch_context, open_on_hosts
from kimi_mlx.cli.options import DtypeOption, JsonOption, ModelArgument, StrategyOption
from kimi_mlx.cli.output import print_json, stdout
from kimi_mlx.engine.request import Finished, Request, Token
from kimi_mlx.errors import RingError, UsageError
from kimi_mlx.model.config import load_config
from kimi_mlx.session.session import Session, SessionOptions
from kimi_mlx.settings import Settings
from kimi_mlx.store.locate import understand
from kimi_mlx.units import format_rate, format_seconds

TOKENS = 32
PROMPT_TOKENS = 64


def check(
    context: typer.Context,
    model: ModelArgument = None,
    strategy: StrategyOption = None,
    dtype: DtypeOption = None,
    json: JsonOption = False,
) -> None:
    """Load a model on a cluster and let it answer twice; both answers must be equal."""
    launched = launch_context(context)
    if launched is None:
        raise UsageError(
            "`check` is for clusters", hint="`kimi-mlx launch --hosts a,b check`; alone: `kimi-mlx doctor`"
        )
    target = understand(model or Settings.from_environment().model)
    begin = time.monotonic()
    with closing(open_on_hosts(launched, target, SessionOptions(None, dtype=dtype), json)) as session:
        load_s = time.monotonic() - begin
        vocab_size = load_config(session.tokenizer_folder).vocab_size
        prompt = tuple((7 * number + 3) % vocab_size for number in range(PROMPT_TOKENS))
        first, finished = _answer(session, prompt)
        session.reset()
        second, _ = _answer(session, prompt)
    if first != second:
        place = next(i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
        raise RingError(
            f"the same question had two answers; they part at token {place} of {TOKENS}",
            hint="the link or MLX corrupts data: see `kimi-mlx doctor` with the same hosts",
        )
    result = {
        "model": target.name,
        "hosts": launched.cluster.names,
        "ranks": launched.cluster.size,
        "backend": launched.cluster.backend,
        "placement": launched.choice.to_dict(),
        "load_s": round(load_s, 3),
        "answers_equal": True,
        "doctor": launched.doctor,
        "statistics": finished.statistics.to_dict(),
    }
    if json:
        print_json(result)
        return
    rate = format_rate(finished.statistics.decode_tok_per_s)
    stdout.print(f"{launched.where} answer: loaded in {format_seconds(load_s)}, {rate}, twice the same", markup=False)


def _answer(session: Session, prompt: tuple[int, ...]) -> tuple[list[int], Finished]:
    ids: list[int] = []
    for event in session.generate(Request(prompt, max_tokens=TOKENS)):
        if isinstance(event, Token):
            ids.append(event.id)
        elif isinstance(event, Finished):
            return ids, event
    raise RingError("the session ended without a result")
