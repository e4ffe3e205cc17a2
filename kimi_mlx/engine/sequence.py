"""One sequence: its request, its tokens, and the number of tokens that the model has computed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

from kimi_mlx.engine.drafts.drafter import accepted_length
from kimi_mlx.engine.drafts.records import SequenceDrafts
from kimi_mlx.engine.events import Finished, FinishReason, Logprobs, Statistics, Token
from kimi_mlx.engine.kv_cache_pool import SequenceCache
from kimi_mlx.engine.request import Request
from kimi_mlx.engine.token_array import TokenArray
from kimi_mlx.engine.token_sampler import TokenSampler
from kimi_mlx.model.cache import LatentCache
from kimi_mlx.model.expert_stats import ExpertStats


class Sequence:
    """A request in progress.

    Args:
        request_id: id of the request.
        request: the request.
        max_tokens: maximum number of new tokens.
        sampler: samples the tokens.
        count_experts: function that returns the counters of experts read from the disk; None if all are in memory.

    Attributes:
        tokens: the prompt and the sampled tokens, with keys of images for their placeholder tokens.
        pending_images: images of the prompt with tokens that are not computed yet, by position.
        encode_s: time in which images that the sequence needs were encoded.
        num_computed_tokens: number of tokens whose cache rows are computed or in flight; one more than len(tokens)
            while a step runs on a token that was not read yet.
        generated: number of sampled tokens.
        epoch: incremented when the sequence begins, is preempted or ends; results of an older epoch are discarded.
        draft: tokens proposed to come next; on ranks that do not sample only their number matters.
        drafts: record of the drafts, on the leader.
        token_array: the same as `tokens`, for searches.
        next_logprob: position of the next token of the prompt whose log probability is needed; the length of the
            prompt if there are no more.
    """

    def __init__(
        self,
        request_id: int,
        request: Request,
        max_tokens: int,
        sampler: TokenSampler,
        count_experts: Callable[[], ExpertStats | None] = lambda: None,
    ):
        self.request_id, self.request, self.max_tokens, self.sampler = request_id, request, max_tokens, sampler
        self.tokens = request.cache_key()
        self.pending_images = list(request.images)
        self.encode_s = 0.0
        has_logprobs = request.prompt_logprobs is not None
        self.next_logprob = min(request.next_logprob, len(request.prompt)) if has_logprobs else len(request.prompt)
        self.token_array = TokenArray(self.tokens)
        self.num_computed_tokens = self.generated = self.epoch = 0
        self.draft: tuple[int, ...] = ()
        self.cache: SequenceCache | None = None
        self.drafts = SequenceDrafts()
        self._equal_prefixes: dict[int, int] = {}
        """Length of the prefix known to be equal, by request id of another sequence."""
        self._cached: int | None = None
        self._steps = 0
        self._started = self._first_token_at = 0.0
        self._count_experts = count_experts
        self._experts_at_start: ExpertStats | None = None
        self._experts_at_first_token: ExpertStats | None = None

    @property
    def layers(self) -> list[LatentCache]:
        """KV caches of the layers."""
        assert self.cache is not None
        return self.cache.layers

    @property
    def remaining_tokens(self) -> int:
        """Number of tokens that may still be generated."""
        return self.max_tokens - self.generated

    def padded_length(self, new_tokens: int) -> int:
        """Return the number of tokens that its cache allocates for its tokens and `new_tokens` more."""
        assert self.cache is not None
        return self.cache.padded_length(len(self.tokens) + new_tokens)

    @property
    def attention_order(self) -> tuple[int, int]:
        """Key to sort sequences, so that those next to each other attend together: common prefix, then length."""
        prefix = None if self.cache is None else self.cache.prefix
        return (0 if prefix is None else prefix.number, self.num_computed_tokens)

    @property
    def remaining_prompt(self) -> int:
        """Number of known tokens that must be computed before the next one can be sampled."""
        return len(self.tokens) - self.num_computed_tokens

    @property
    def needs_prompt_logprobs(self) -> bool:
        """Whether log probabilities of the prompt are still to be computed."""
        return self.next_logprob < len(self.request.prompt)

    @property
    def max_cached_tokens(self) -> int:
        """Maximum number of tokens that need not be computed because a cache has them.

        The last token is always computed, and so are all from the one before a token whose log probability is needed.
        """
        return (self.next_logprob if self.needs_prompt_logprobs else len(self.tokens)) - 1

    def num_prompt_logits(self, start: int, stop: int) -> int:
        """Return the number of tokens of a chunk of the prompt whose logits are needed for log probabilities.

        Args:
            start: position of the first token of the chunk.
            stop: position after the last one.
        """
        first = max(start + 1, self.next_logprob)
        return max(min(stop, len(self.request.prompt) - 1) - first + 1, 0)

    def shares_prefix(self, other: Sequence, length: int) -> bool:
        """Return whether the first `length` tokens of two sequences are equal. Each token is compared once.

        Args:
            other: the other sequence; only sampled tokens may be appended to it.
            length: number of tokens, at most that of either sequence.
        """
        common = self._equal_prefixes.get(other.request_id, 0)
        if common < length:
            common = self.token_array.common_prefix(other.token_array, common, length)
            self._equal_prefixes[other.request_id] = common
        return common >= length

    def begin(self, cache: SequenceCache, cached: int) -> None:
        """Begin, or resume after preemption, with a cache that holds the first `cached` tokens."""
        self.cache, self.num_computed_tokens = cache, cached
        self.pending_images = [image for image in self.request.images if image.stop > cached]
        self.epoch += 1
        self._equal_prefixes.clear()
        if self._cached is None:
            self._cached = cached
            self._experts_at_start = self._count_experts()
            self._started = time.perf_counter()

    def end(self) -> SequenceCache:
        """End or preempt the sequence; return its cache."""
        assert self.cache is not None
        cache, self.cache, self.draft = self.cache, None, ()
        self.epoch += 1
        cache.sync()
        return cache

    def next_chunk(self, count: int) -> tuple[int, ...]:
        """Return up to `count` of the next known tokens, as `input_ids` does, and count them as computed."""
        assert self.cache is not None
        start = self.num_computed_tokens
        chunk = self.tokens[start : start + count]
        self.cache.tokens += chunk
        self.num_computed_tokens += len(chunk)
        while self.pending_images and self.pending_images[0].stop <= self.num_computed_tokens:
            del self.pending_images[0]
        return tuple(self.input_ids(range(start, self.num_computed_tokens)))

    def input_ids(self, positions: Iterable[int]) -> list[int]:
        """Return the tokens at some positions as the model reads them: placeholder tokens instead of keys of images."""
        prompt = self.request.prompt
        return [prompt[at] if at < len(prompt) else self.tokens[at] for at in positions]

    def until_stop(self, tokens: list[int]) -> list[int]:
        """Return the tokens up to and including the first stop token."""
        stop_ids = self.request.stop_ids
        end = next((index for index, token in enumerate(tokens) if token in stop_ids), len(tokens))
        return tokens[: end + 1]

    def accept(self, sampled: list[int]) -> list[int]:
        """Return the sampled tokens that count: up to and including the first one that differs from the draft."""
        return self.until_stop(sampled[: accepted_length(self.draft, sampled) + 1])

    def rollback_draft(self, accepted: list[int]) -> None:
        """Remove rejected draft tokens from the cache. The last accepted token is not in the cache yet."""
        assert self.cache is not None
        self.cache.tokens += accepted[:-1]
        self.cache.sync()
        self.num_computed_tokens = len(self.tokens) + len(accepted) - 1
        self.draft = ()

    def append(self, tokens: list[int], logprobs: list[Logprobs | None]) -> Iterator[Token]:
        """Append sampled tokens and yield an event for each."""
        self._steps += bool(self.generated)
        if not self._first_token_at:
            self._first_token_at, self._experts_at_first_token = time.perf_counter(), self._count_experts()
        self.token_array.extend(tokens)
        self.sampler.advance(tokens)
        for token, logprob in zip(tokens, logprobs, strict=True):
            self.tokens.append(token)
            self.generated += 1
            yield Token(token, logprob)

    @property
    def reason(self) -> FinishReason | None:
        """Reason why the sequence is finished; None if it is not."""
        if self.generated and self.tokens[-1] in self.request.stop_ids:
            return "length" if self.sampler.was_shortened else "stop"
        return None if self.remaining_tokens > 0 else "length"

    def finished(self, reason: FinishReason, peak_memory_bytes: int, drafts_off: str | None = None) -> Finished:
        """Return the final event, with statistics.

        Args:
            reason: reason of the end.
            peak_memory_bytes: peak memory so far.
            drafts_off: reason why nothing is drafted, if drafts are enabled.
        """
        now = time.perf_counter()
        started = self._started or now
        first = self._first_token_at or now
        counted = self._count_experts()
        at_start = self._experts_at_start or counted
        at_first_token = self._experts_at_first_token or counted
        return Finished(
            reason,
            Statistics(
                prompt_tokens=len(self.request.prompt),
                cached_tokens=self._cached or 0,
                generated_tokens=self.generated,
                ttft_s=first - started,
                decode_s=now - first,
                peak_memory_bytes=peak_memory_bytes,
                decode_steps=self._steps,
                encode_s=self.encode_s,
                drafted_tokens=self.drafts.num_drafted,
                accepted_tokens=self.drafts.num_accepted,
                drafts_off=drafts_off,
                prompt_read_bytes=at_first_token.since(at_start).bytes_read if at_first_token and at_start else 0,
                experts=counted.since(at_first_token) if counted and at_first_token else None,
            ),
        )
