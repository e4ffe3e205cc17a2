"""Figures of the server for Prometheus."""

from __future__ import annotations

from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from kimi_mlx.server.conversation import Usage
from kimi_mlx.session.session import SessionStatus

TTFT_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
GAP_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 5)


class Metrics:
    """What is counted; one a server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        counter, gauge = partial(Counter, registry=self._registry), partial(Gauge, registry=self._registry)
        histogram = partial(Histogram, registry=self._registry)
        self.requests = counter("kimi_mlx_requests", "Requests of HTTP that were answered.", ["route", "status"])
        tokens = counter("kimi_mlx_tokens", "Tokens of finished answers.", ["kind"])
        self._tokens = {kind: tokens.labels(kind) for kind in ("prompt", "cached", "completion", "reasoning")}
        self.ttft = histogram("kimi_mlx_ttft_seconds", "From the request to the first token.", buckets=TTFT_S)
        self.gap = histogram("kimi_mlx_token_gap_seconds", "Between two tokens of an answer.", buckets=GAP_S)
        self.cancelled = counter("kimi_mlx_answers_cancelled", "Answers that nobody waited for any more.")
        self.refused = counter("kimi_mlx_answers_refused", "Answers refused because too many were waiting.")
        self.interruptions = counter("kimi_mlx_interruptions", "Answers that a lost ring has interrupted.")
        self._running = gauge("kimi_mlx_answers_running", "Answers that the engine is working on.")
        self._waiting = gauge("kimi_mlx_answers_waiting", "Answers that wait for their turn.")
        self._is_up = gauge("kimi_mlx_up", "1 if the engine answers, 0 while its ring is started again.")
        self._restarts = gauge("kimi_mlx_ring_restarts", "How often the ring was started again.")
        self._cache_tokens = gauge("kimi_mlx_cache_tokens", "Tokens in the prompt cache.")

    def count(self, usage: Usage) -> None:
        """Add the tokens of a finished answer."""
        self._tokens["prompt"].inc(usage.prompt_tokens)
        self._tokens["cached"].inc(usage.cached_tokens)
        self._tokens["completion"].inc(usage.completion_tokens)
        self._tokens["reasoning"].inc(usage.reasoning_tokens)

    def text(self, status: SessionStatus, *, is_up: bool) -> bytes:
        """All of it, as Prometheus reads it, with what the engine says of itself."""
        self._is_up.set(is_up)
        self._running.set(status.active)
        self._waiting.set(status.waiting)
        self._restarts.set(status.restarts)
        self._cache_tokens.set(status.cached_tokens)
        return generate_latest(self._registry)
