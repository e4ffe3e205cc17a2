"""A process that runs mlx-lm for a benchmark: loads, then answers requests until its input ends.

Between requests it waits for its input, never in a collective, so that it leaves its processor to the other
side. It speaks the language of kimi_mlx.cluster.messages.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path
from mlx_lm.generate import generate_step, generation_stream, wired_limit
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from kimi_mlx.cluster.messages import Message
from kimi_mlx.engine.chunking import PREFILL_CHUNK
from kimi_mlx.engine.request import Event, Finished, Request, Statistics, Token
from kimi_mlx.errors import EngineError, WeightsError
from kimi_mlx.model.config import load_config
from kimi_mlx.runtime.channel import Channel, run_rank
from kimi_mlx.runtime.joining import join_mlx
from kimi_mlx.runtime.load import compute_type
from kimi_mlx.runtime.rank import encode_event


def main() -> None:
    """Run a rank."""
    run_rank(serve)


def serve(channel: Channel, start: Message) -> None:
    """Load and answer."""
    group = join_mlx(channel, start)
    rank = start["rank"]
    model = load(Path(start["folder"]), start["dtype"], start["mode"], group)
    channel.send("ready")
    while True:
        command = channel.next_command()
        channel.made_step("prefill")
        ids: list[int] = []
        try:
            for event in generate(model, Request.from_dict(command["request"])):
                if isinstance(event, Token):
                    ids.append(event.id)
                    channel.made_step("decode")
                    if group is not None and rank == 0:  # a leader shows its tokens, as kimi-mlx's does
                        channel.write(encode_event(command["number"], event))
                elif isinstance(event, Finished):
                    channel.made_step("idle")
                    channel.send("finished", ids=ids, statistics=event.statistics.to_dict())
        except Exception as error:  # another project's code: it may raise anything
            raise EngineError(
                f"mlx-lm ({start['mode']}) failed: {_words(error)}",
                hint="on the CPU it compiles C++ at run time: is a compiler installed?",
            ) from error


def load(folder: Path, dtype: str | None, mode: str, group: mx.distributed.Group | None) -> nn.Module:
    """Load the model as mlx-lm's own loaders do, with its parameters cast to the type to compute in.

    Raises:
        WeightsError: mlx-lm cannot load it, or cannot share it in this mode.
    """
    target = compute_type(dtype, load_config(folder))
    try:
        model: Any = load_model(folder, lazy=True)[0]
        if mode == "tensor":
            model.shard(group)
        elif mode == "pipeline":
            model.model.pipeline(group)
        may_cast = getattr(model, "cast_predicate", lambda path: True)

        def cast(path: str, value: mx.array) -> mx.array:
            is_float = mx.issubdtype(value.dtype, mx.floating)
            return value.astype(target) if is_float and may_cast(path) else value

        model.update(tree_map_with_path(cast, model.parameters()))
        model.eval()
        mx.eval(model.parameters())
        return model
    except Exception as error:  # another project's code, on files that it may not know: it raises all kinds
        raise WeightsError(
            f"mlx-lm cannot load `{folder}` ({mode}): {_words(error)}",
            hint="run the benchmark without --against",
        ) from error


def generate(model: nn.Module, request: Request) -> Iterator[Event]:
    """Answer a request with mlx-lm's own steps, by the clocks of kimi_mlx.engine.request.Statistics."""
    streams: Any = [generation_stream]  # a thread's own stream, which mlx-lm's types do not name
    with wired_limit(model, streams):
        started = time.perf_counter()
        mx.reset_peak_memory()
        cache = make_prompt_cache(model)
        steps = generate_step(
            mx.array(request.prompt),
            model,
            max_tokens=request.max_tokens or 1,
            prompt_cache=cache,
            prefill_step_size=PREFILL_CHUNK,
        )
        generated, first_token_at, ended = 0, started, started
        for token, _ in steps:
            ended = time.perf_counter()
            if not generated:
                first_token_at = ended
            generated += 1
            yield Token(int(token))
        # mlx-lm has started one step more; it must not run into the other side's turn.
        mx.eval([layer.state for layer in cache])
        mx.synchronize(generation_stream)
        statistics = Statistics(
            prompt_tokens=len(request.prompt),
            cached_tokens=0,
            generated_tokens=generated,
            ttft_s=first_token_at - started,
            decode_s=ended - first_token_at,
            peak_memory_bytes=mx.get_peak_memory(),
        )
    yield Finished("length", statistics)


def _words(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


if __name__ == "__main__":
    main()
