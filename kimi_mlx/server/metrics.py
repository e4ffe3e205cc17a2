"""Prometheus metrics of the server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

from kimi_mlx.engine.batch_sizes import BATCH_SIZE_LIMITS, NO_STEPS
from kimi_mlx.model.expert_stats import ExpertStats
from kimi_mlx.server.api_types import Usage
from kimi_mlx.session.session import DraftStatus, SessionStatus

TTFT_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
TOKEN_GAP_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 5)


class BatchSizeCollector(Collector):
    """Exports the histogram of the number of sequences in a step, which the engine counts."""

    def __init__(self) -> None:
        self.sizes = NO_STEPS

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """Yield the histogram."""
        limits = [*map(str, BATCH_SIZE_LIMITS), "+Inf"]
        buckets = list(zip(limits, accumulate(self.sizes.counts), strict=True))
        yield HistogramMetricFamily(
            "kimi_mlx_batch_size", "Sequences in a step of the engine.", buckets=buckets, sum_value=self.sizes.total
        )


class Metrics:
    """The metrics of one server."""

    def __init__(self) -> None:
        disable_created_metrics()  # the time when each counter was made: a series per counter that says nothing
        self._registry = CollectorRegistry()
        counter, gauge = partial(Counter, registry=self._registry), partial(Gauge, registry=self._registry)
        histogram = partial(Histogram, registry=self._registry)
        self.requests = counter("kimi_mlx_requests", "HTTP requests answered.", ["route", "status"])
        tokens = counter("kimi_mlx_tokens", "Tokens of finished answers.", ["kind"])
        self._tokens = {kind: tokens.labels(kind) for kind in ("prompt", "cached", "completion", "reasoning")}
        self.ttft = histogram("kimi_mlx_ttft_seconds", "Time from the request to the first token.", buckets=TTFT_S)
        self.gap = histogram("kimi_mlx_token_gap_seconds", "Time between two tokens.", buckets=TOKEN_GAP_S)
        self.cancelled = counter("kimi_mlx_answers_cancelled", "Answers cancelled because the client disconnected.")
        self.refused = counter("kimi_mlx_answers_refused", "Answers refused because the queue was full.")
        self.interruptions = counter("kimi_mlx_interruptions", "Answers interrupted by the loss of the ring.")
        self._running = gauge("kimi_mlx_answers_running", "Answers that the engine is generating.")
        self._waiting = gauge("kimi_mlx_answers_waiting", "Answers waiting in the queue.")
        self._is_up = gauge("kimi_mlx_up", "1 if the engine is up, 0 while its ring restarts.")
        self._restarts = gauge("kimi_mlx_ring_restarts", "Restarts of the ring.")
        drafts = counter("kimi_mlx_draft_tokens", "Draft tokens that the model has verified.", ["result"])
        self._drafts = {result: drafts.labels(result) for result in ("accepted", "rejected")}
        self._draft_totals = {"accepted": 0, "rejected": 0}
        self._drafts_active = gauge("kimi_mlx_drafts_active", "1 while tokens are drafted, 0 if that gains nothing.")
        self._drafts_off = gauge("kimi_mlx_drafts_off", "1 while nothing is drafted, with the reason.", ["reason"])
        experts = counter("kimi_mlx_experts", "Experts that steps needed, of all ranks.", ["result"])
        guesses = counter("kimi_mlx_expert_guesses", "Experts read before they were chosen.", ["result"])
        self._experts = {
            "hits": experts.labels("hit"),
            "misses": experts.labels("miss"),
            "guesses_right": guesses.labels("right"),
            "guesses_wrong": guesses.labels("wrong"),
            "bytes_read": counter("kimi_mlx_expert_read_bytes", "Bytes of experts read from the disk, of all ranks."),
            "wait_seconds": counter("kimi_mlx_expert_wait_seconds", "Time that steps waited for experts."),
        }
        self._expert_totals = dict.fromkeys(self._experts, 0.0)
        self._kept_experts = gauge("kimi_mlx_experts_kept_ratio", "Share of the experts that is kept in memory.")
        self._prompt_totals = (0, 0)
        self._batch_sizes = BatchSizeCollector()
        self._registry.register(self._batch_sizes)
        self._cache_tokens = gauge("kimi_mlx_cache_tokens", "Tokens in the prompt cache.")

    @property
    def prompt_totals(self) -> tuple[int, int]:
        """Number of prompt tokens of all finished answers, and of these the number that were in the prompt cache."""
        return self._prompt_totals

    def add_usage(self, usage: Usage) -> None:
        """Count the tokens of a finished answer."""
        prompt_tokens, cached_tokens = self._prompt_totals
        self._prompt_totals = prompt_tokens + usage.prompt_tokens, cached_tokens + usage.cached_tokens
        self._tokens["prompt"].inc(usage.prompt_tokens)
        self._tokens["cached"].inc(usage.cached_tokens)
        self._tokens["completion"].inc(usage.completion_tokens)
        self._tokens["reasoning"].inc(usage.reasoning_tokens)

    def render(self, status: SessionStatus, *, is_up: bool) -> bytes:
        """Return all metrics, including the session's status, in Prometheus text format."""
        self._is_up.set(is_up)
        self._running.set(status.active)
        self._waiting.set(status.waiting)
        self._restarts.set(status.restarts)
        self._cache_tokens.set(status.cached_tokens)
        self._batch_sizes.sizes = status.batch_sizes
        self._set_drafts(status.drafts or DraftStatus(off_reason="drafts are not enabled"))
        self._set_experts([*status.experts.values()])
        return generate_latest(self._registry)

    def _set_experts(self, ranks: Sequence[ExpertStats]) -> None:
        """Set the counters of experts; without ranks all experts are in memory."""
        if not ranks:
            self._kept_experts.set(1)
            return
        stats = ExpertStats.of_ranks(ranks)
        self._kept_experts.set(stats.kept_experts / stats.num_experts)
        totals = {**stats.to_dict(), "guesses_wrong": stats.guesses - stats.guesses_right}
        for name, metric in self._experts.items():
            total = max(totals[name], self._expert_totals[name])  # a guess counts as wrong until it is right
            metric.inc(total - self._expert_totals[name])
            self._expert_totals[name] = total

    def _set_drafts(self, drafts: DraftStatus) -> None:
        self._drafts_active.set(drafts.off_reason is None)
        self._drafts_off.clear()
        if drafts.off_reason is not None:
            self._drafts_off.labels(drafts.off_reason).set(1)
        totals = {"accepted": drafts.accepted_tokens, "rejected": drafts.drafted_tokens - drafts.accepted_tokens}
        for result, total in totals.items():
            self._drafts[result].inc(total - self._draft_totals[result])
        self._draft_totals = totals
