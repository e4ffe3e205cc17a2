"""An unfinished request of a ring session: its state, and how to resume it after the ring is lost."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

from kimi_mlx.cluster.channel.messages import encode
from kimi_mlx.engine.events import Finished, FinishReason, Statistics
from kimi_mlx.engine.request import Request
from kimi_mlx.errors import KimiMlxError
from kimi_mlx.model.expert_stats import ExpertStats
from kimi_mlx.session.session import EventCallback


@dataclass
class Job:
    """An unfinished request.

    Args:
        request_id: id of the request within its session.
        request: request as submitted.
        on_event: callback of the caller.
        sent_ids: ids of the tokens passed to the caller so far.
        pending_ranks: ranks that have not finished the request.
        outcome: result of rank 0, held back until all ranks have finished.
        is_sent: True if the current ring has the request. One with images is sent after their patches.
        is_cancelled: True once the caller has cancelled the request.
        was_interrupted: True if the ring was restarted while the request ran.
        is_running: True once a rank has reported anything about the request.
        submitted_at: time of submission, on the clock of time.perf_counter.
        first_token_at: time of the first token; 0 before it.
        next_logprob: position of the next token of the prompt whose log probability was not sent to the caller; 0
            before the first.
        rank_statistics: statistics of the ranks that have finished the request, by rank.
    """

    request_id: int
    request: Request
    on_event: EventCallback
    sent_ids: list[int] = field(default_factory=list)
    pending_ranks: set[int] = field(default_factory=set)
    outcome: Finished | KimiMlxError | None = None
    is_sent: bool = False
    is_cancelled: bool = False
    was_interrupted: bool = False
    is_running: bool = False
    submitted_at: float = field(default_factory=time.perf_counter)
    first_token_at: float = 0.0
    next_logprob: int = 0
    rank_statistics: dict[int, Statistics] = field(default_factory=dict[int, Statistics])

    def remaining_request(self) -> Request:
        """Return the request for the rest of the answer: its prompt ends with the tokens already sent."""
        max_tokens = self.request.max_tokens
        next_logprob = max(self.next_logprob, self.request.next_logprob)
        return replace(
            self.request,
            prompt=(*self.request.prompt, *self.sent_ids),
            max_tokens=None if max_tokens is None else max_tokens - len(self.sent_ids),
            answered=self.request.answered + len(self.sent_ids),
            prompt_logprobs=self.request.prompt_logprobs if next_logprob < len(self.request.prompt) else None,
            next_logprob=next_logprob,
        )

    def encode(self) -> bytes:
        """Return the `request` message for the ranks."""
        return encode("request", request_id=self.request_id, request=self.remaining_request().to_dict())

    def outcome_if_complete(self, context: int) -> Finished | KimiMlxError | None:
        """Return the outcome if the answer has all of its tokens, else None.

        The ring can be lost after the last token of an answer and before the message that ends it.

        Args:
            context: maximum number of tokens of a sequence.
        """
        if self.outcome is not None:
            return self.outcome
        reason = self._finish_reason(context)
        return None if reason is None else self.finish_event(reason)

    def finish_event(self, reason: FinishReason, statistics: Statistics | None = None) -> Finished:
        """Return the final event.

        Args:
            reason: reason for the end.
            statistics: statistics of the last ring. Replaced by our own measurements if the request was interrupted,
                because they cover only its last part.
        """
        if statistics is not None and not self.was_interrupted:
            return Finished(reason, statistics)
        now = time.perf_counter()
        first_token_at = self.first_token_at or now
        num_prompt = len(self.request.prompt)
        cached, peak = (0, 0) if statistics is None else (statistics.cached_tokens, statistics.peak_memory_bytes)
        ttft_s, decode_s = first_token_at - self.submitted_at, now - first_token_at
        own = Statistics(num_prompt, min(cached, num_prompt), len(self.sent_ids), ttft_s, decode_s, peak)
        if statistics is not None:  # draft tokens are counted as in DraftStatus
            own = replace(
                own,
                drafted_tokens=statistics.drafted_tokens,
                accepted_tokens=statistics.accepted_tokens,
                drafts_off=statistics.drafts_off,
            )
        return Finished(reason, own)

    def outcome_of_ranks(self) -> Finished | KimiMlxError | None:
        """Return the outcome, with the sum of the ranks' counters of experts, after the last rank has finished."""
        ranks = [statistics.experts for statistics in self.rank_statistics.values() if statistics.experts is not None]
        if not isinstance(self.outcome, Finished) or self.was_interrupted or not ranks:
            return self.outcome
        prompt_bytes = sum(statistics.prompt_read_bytes for statistics in self.rank_statistics.values())
        experts = ExpertStats.of_ranks(ranks)
        statistics = replace(self.outcome.statistics, prompt_read_bytes=prompt_bytes, experts=experts)
        return replace(self.outcome, statistics=statistics)

    def _finish_reason(self, context: int) -> FinishReason | None:
        if self.sent_ids and self.sent_ids[-1] in self.request.stop_ids:
            return "stop"
        num_tokens = len(self.request.prompt) + len(self.sent_ids)
        if self.sent_ids and (len(self.sent_ids) == self.request.max_tokens or num_tokens >= context):
            return "length"
        return "cancelled" if self.is_cancelled else None
