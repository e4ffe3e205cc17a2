"""`kimi-mlx launch ... check`: let a cluster answer the same prompt twice and compare the answers."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import typer

from kimi_mlx.cli.options import DtypeOption, ExpertMemoryOption, JsonOption, ModelArgument, RunOptions, StrategyOption
from kimi_mlx.errors import RingError, UsageError

if TYPE_CHECKING:
    from kimi_mlx.engine.events import Finished
    from kimi_mlx.session.session import Session

TOKENS = 32
PROMPT_TOKENS = 64


def check(
    context: typer.Context,
    model: ModelArgument = None,
    strategy: StrategyOption = None,
    dtype: DtypeOption = None,
    expert_memory: ExpertMemoryOption = "auto",
    json: JsonOption = False,
) -> None:
    """Check that a cluster gives equal answers."""
    # heavy imports: not for `--help` or a usage error
    from kimi_mlx.cli.open_model import launch_context, open_session, prepare_model, session_options
    from kimi_mlx.cli.output import closing_with_status, hides_messages, print_json, slow_status, stdout
    from kimi_mlx.model.config import load_config
    from kimi_mlx.store.model_ref import resolve_model_name
    from kimi_mlx.units import format_rate, format_seconds

    launch = launch_context(context)
    if launch is None:
        raise UsageError(
            "`check` needs hosts", hint="run `kimi-mlx launch --hosts a,b check`, or `kimi-mlx doctor` for this machine"
        )
    run = RunOptions(model, strategy=strategy, dtype=dtype, expert_memory=expert_memory)
    target = resolve_model_name(run.model_name)
    begin = time.monotonic()
    is_quiet = hides_messages(json)
    prepared = prepare_model(launch, target, run, is_quiet=is_quiet)
    opened = open_session(prepared, session_options(run), run.ranks, is_quiet)
    with closing_with_status(opened.session, is_quiet) as session, slow_status(is_quiet) as set_status:
        load_s = time.monotonic() - begin
        vocab_size = load_config(opened.tokenizer_folder).vocab_size
        prompt = tuple((7 * number + 3) % vocab_size for number in range(PROMPT_TOKENS))
        set_status("computing an answer")
        first, finished = _answer(session, prompt)
        session.reset()
        set_status("computing the same answer again")
        second, _ = _answer(session, prompt)
    if first != second:
        position = first_difference(first, second)
        raise RingError(
            f"two answers to the same prompt differ from token {position} of {TOKENS} on",
            hint="the link or MLX corrupts data: run `kimi-mlx doctor` with the same hosts",
        )
    result = {
        "model": target.name,
        "hosts": launch.cluster.names,
        "ranks": launch.cluster.size,
        "backend": launch.cluster.backend,
        "placement": launch.choice.to_dict(),
        "experts": None if opened.expectation is None else opened.expectation.to_dict(),
        "load_s": round(load_s, 3),
        "answers_equal": True,
        "doctor": launch.doctor,
        "statistics": finished.statistics.to_dict(),
    }
    if json:
        print_json(result)
        return
    rate = format_rate(finished.statistics.decode_tok_per_s)
    stdout.print(
        f"{launch.description}: two answers to the same prompt are equal; loaded in {format_seconds(load_s)}, {rate}",
        markup=False,
    )


def first_difference(first: list[int], second: list[int]) -> int:
    """Return the index of the first token in which two answers differ; one may be the beginning of the other."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _answer(session: Session, prompt: tuple[int, ...]) -> tuple[list[int], Finished]:
    from kimi_mlx.engine.events import Finished, Token
    from kimi_mlx.engine.request import Request

    ids: list[int] = []
    for event in session.generate(Request(prompt, max_tokens=TOKENS)):
        if isinstance(event, Token):
            ids.append(event.id)
        elif isinstance(event, Finished):
            return ids, event
    raise RingError("the session ended without a result")
