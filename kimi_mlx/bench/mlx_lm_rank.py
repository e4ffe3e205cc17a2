"""A process that runs mlx-lm for a benchmark: loads the model, then runs batches of requests until its input ends.

Between batches it waits for its input, never in a collective, so that the other side has the CPU to itself. Messages
(kimi_mlx.cluster.channel.messages): `fill` (a prefix, and the number of caches to fill with it) is answered with
`filled`, `batch` with `token` messages of the first rank and `finished`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path
from mlx_lm.generate import BatchGenerator, generate_step, generation_stream, wired_limit
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from kimi_mlx.cluster.channel.messages import Message
from kimi_mlx.engine.events import Statistics, Token
from kimi_mlx.engine.request import Request
from kimi_mlx.errors import EngineError, WeightsError
from kimi_mlx.model.config import load_config
from kimi_mlx.rank.channel import Channel, run_rank
from kimi_mlx.rank.main import encode_event
from kimi_mlx.rank.rendezvous import join_mlx_group
from kimi_mlx.runtime.load import compute_dtype
from kimi_mlx.sizing.prefill import PREFILL_CHUNK

Cache = list[Any]
"""mlx-lm's cache: one object per layer."""


def main() -> None:
    """Run a rank."""
    run_rank(serve)


def serve(channel: Channel, start: Message) -> None:
    """Load the model and run batches."""
    group = join_mlx_group(channel, start)
    rank = start["rank"]
    model = load(Path(start["folder"]), start["dtype"], start["mode"], group)
    channel.send("ready")
    caches: list[Cache] = []
    filled = FilledCache(channel, model)
    while True:
        command = channel.next_command()
        channel.report_progress("prefill")
        try:
            if command["kind"] == "fill":
                caches.clear()
                caches = filled.copies(command["prefix"], command["copies"])
                channel.report_progress("idle")
                channel.send("filled")
                continue
            requests = [Request.from_dict(request) for request in command["requests"]]
            batch_run = BatchRun(channel, model, requests, command["depth"], sends_tokens=rank == 0)
            batch_run.run(caches, is_batched=group is None and len(requests) > 1)
        except Exception as error:  # mlx-lm may raise anything
            raise EngineError(
                f"mlx-lm ({start['mode']}) failed: {_describe(error)}",
                hint="on the CPU, MLX compiles C++ at run time: check that a compiler is installed",
            ) from error
        channel.report_progress("idle")
        channel.send(
            "finished",
            statistics=[statistics.to_dict() for statistics in batch_run.statistics()],
            peak_memory_bytes=batch_run.peak_memory_bytes,
        )


def load(folder: Path, dtype: str | None, mode: str, group: mx.distributed.Group | None) -> nn.Module:
    """Load the model like mlx-lm's own loaders, with its parameters cast to the compute dtype.

    Raises:
        WeightsError: mlx-lm cannot load the model, or cannot split it in this mode.
    """
    target = compute_dtype(dtype, load_config(folder))
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
    except Exception as error:  # mlx-lm may raise anything, also for unsupported files
        raise WeightsError(
            f"mlx-lm cannot load `{folder}` ({mode}): {_describe(error)}",
            hint="run the benchmark without --against",
        ) from error


class FilledCache:
    """A cache with the prefix of the last batch, which is kept for batches with the same one.

    Args:
        channel: channel to the front.
        model: mlx-lm's model.
    """

    def __init__(self, channel: Channel, model: nn.Module):
        self._channel, self._model = channel, model
        self._prefix: list[int] = []
        self._cache: Cache | None = None

    def copies(self, prefix: list[int], count: int) -> list[Cache]:
        """Return `count` independent caches that hold a prefix."""
        with wired_limit(self._model, _streams()):
            if not prefix:
                self._prefix, self._cache = [], None
                return [make_prompt_cache(self._model) for _ in range(count)]
            if self._cache is None or prefix != self._prefix:
                self._prefix, self._cache = prefix, make_prompt_cache(self._model)
                # as mlx-lm does for a prompt: no token is generated
                for _ in _steps(self._channel, self._model, prefix, 0, self._cache):
                    pass
            caches = [copy.deepcopy(self._cache) for _ in range(count)]
            for layer in (layer for cache in caches for layer in cache):
                layer.state = tuple(array + 0 for array in layer.state)  # shares no memory
            _synchronize(caches)
            return caches


class BatchRun:
    """Runs one batch, with the same clocks as kimi_mlx.engine.events.Statistics.

    Args:
        channel: channel to the front.
        model: mlx-lm's model.
        requests: the batch.
        depth: number of leading prompt tokens that are in the caches.
        sends_tokens: whether this rank sends its tokens, as rank 0 of kimi-mlx does.
    """

    def __init__(
        self, channel: Channel, model: nn.Module, requests: Sequence[Request], depth: int, *, sends_tokens: bool
    ):
        self._channel, self._model, self._requests, self._depth, self._sends_tokens = (
            channel,
            model,
            requests,
            depth,
            sends_tokens,
        )
        self._started = [0.0] * len(requests)
        self._times: list[list[float]] = [[] for _ in requests]
        self.peak_memory_bytes = 0

    def run(self, caches: list[Cache], *, is_batched: bool) -> None:
        """Run all requests: together with mlx-lm's batch generator, or one after another."""
        with wired_limit(self._model, _streams()):
            mx.reset_peak_memory()
            self._started = [time.perf_counter()] * len(self._requests)
            steps = self._run_batched(caches) if is_batched else self._run_sequentially(caches)
            for number, token in steps:
                self._times[number].append(time.perf_counter())
                self._channel.report_progress("decode" if all(self._times) else "prefill")
                if self._sends_tokens:
                    self._channel.write(encode_event(number, Token(token)))
            self.peak_memory_bytes = mx.get_peak_memory()

    def statistics(self) -> list[Statistics]:
        """Return the statistics of each request."""
        return [
            Statistics(
                prompt_tokens=len(request.prompt),
                cached_tokens=self._depth,
                generated_tokens=len(times),
                ttft_s=times[0] - started,
                decode_s=times[-1] - times[0],
                peak_memory_bytes=self.peak_memory_bytes,
            )
            for request, started, times in zip(self._requests, self._started, self._times, strict=True)
        ]

    def _run_sequentially(self, caches: list[Cache]) -> Iterator[tuple[int, int]]:
        for number, (request, cache) in enumerate(zip(self._requests, caches, strict=True)):
            self._started[number] = time.perf_counter()
            prompt = request.prompt[self._depth :]
            for token in _steps(self._channel, self._model, prompt, request.max_tokens or 1, cache):
                yield number, token
            # mlx-lm has started one more step, which must not overlap with the next request
            _synchronize([cache])

    def _run_batched(self, caches: list[Cache]) -> Iterator[tuple[int, int]]:
        generator = BatchGenerator(self._model, prefill_step_size=PREFILL_CHUNK)
        try:
            uids = generator.insert(
                [list(request.prompt[self._depth :]) for request in self._requests],
                [request.max_tokens or 1 for request in self._requests],
                caches=caches,
                all_tokens=[list(request.prompt[: self._depth]) for request in self._requests],
            )
            num_unfinished = len(uids)
            while num_unfinished:
                _, responses = generator.next()
                self._channel.report_progress("decode" if all(self._times) else "prefill")
                for response in responses:
                    num_unfinished -= response.finish_reason is not None
                    yield uids.index(response.uid), response.token
            mx.synchronize(generation_stream)
        finally:
            generator.close()


def _steps(channel: Channel, model: nn.Module, prompt: Sequence[int], max_tokens: int, cache: Cache) -> Iterator[int]:
    """Yield the tokens of mlx-lm's own steps."""
    steps = generate_step(
        mx.array(list(prompt)),
        model,
        max_tokens=max_tokens,
        prompt_cache=cache,
        prefill_step_size=PREFILL_CHUNK,
        prompt_progress_callback=lambda done, total: channel.report_progress("prefill"),
    )
    for token, _ in steps:
        yield int(token)


def _streams() -> Any:
    """Return mlx-lm's stream as `wired_limit` needs it, although its type hints do not allow that."""
    return [generation_stream]


def _synchronize(caches: Sequence[Cache]) -> None:
    """Wait for all work that was started."""
    mx.eval([layer.state for cache in caches for layer in cache])
    mx.synchronize(generation_stream)


def _describe(error: Exception) -> str:
    """Describe an error in one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


if __name__ == "__main__":
    main()
