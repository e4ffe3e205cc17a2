"""Statistics of answers, as lines for people."""

from __future__ import annotations

from collections.abc import Sequence

from kimi_mlx.engine.events import Statistics
from kimi_mlx.model.expert_stats import ExpertStats
from kimi_mlx.units import format_bytes, format_count, format_gib, format_rate, format_seconds


def statistics_line(statistics: Statistics) -> str:
    """Return the statistics of an answer as one line, without what a server does not say."""
    decode = f"{format_count(statistics.generated_tokens, 'token')} in {format_seconds(statistics.decode_s)}"
    prompt = f"prompt {statistics.prompt_tokens}"
    if statistics.cached_tokens:
        prompt += f" ({statistics.cached_tokens} cached)"
    if statistics.prefill_tok_per_s:
        prompt += f" at {format_rate(statistics.prefill_tok_per_s)}"
    parts = [decode]
    if statistics.decode_tok_per_s:
        parts.append(format_rate(statistics.decode_tok_per_s))
    if statistics.tokens_per_step > 1:
        parts.append(f"{statistics.tokens_per_step:.1f} tokens per step")
    if statistics.drafted_tokens:
        parts.append(f"{statistics.accepted_tokens} of {statistics.drafted_tokens} draft tokens accepted")
    if statistics.drafts_off:
        parts.append(f"drafts off: {statistics.drafts_off}")
    if statistics.experts is not None:
        parts.append(describe_experts(statistics.experts, statistics.read_bytes_per_token, statistics.decode_s))
    if statistics.encode_s:
        parts.append(f"images {format_seconds(statistics.encode_s)}")
    if statistics.prompt_tokens:
        parts.append(prompt)
    parts.append(f"first token {format_seconds(statistics.ttft_s)}")
    if statistics.peak_memory_bytes:
        parts.append(f"peak {format_gib(statistics.peak_memory_bytes)}")
    return " · ".join(parts)


def describe_experts(experts: ExpertStats, bytes_per_token: float, seconds: float) -> str:
    """Return the hit rate of experts, the bytes read from the disk, the right guesses, and the time spent waiting.

    Args:
        experts: counters of a period.
        bytes_per_token: bytes read per token.
        seconds: length of the period.
    """
    if experts.hit_rate is None:
        return "experts on disk"
    parts = [f"hit rate of experts {experts.hit_rate:.0%}", f"{format_bytes(round(bytes_per_token))} read per token"]
    if experts.guesses:
        parts.append(f"{experts.guesses_right / experts.guesses:.0%} of guesses right")
    if seconds:
        parts.append(f"{min(experts.wait_seconds / seconds, 1):.0%} of the time waiting")
    return ", ".join(parts)


def conversation_line(answers: Sequence[Statistics]) -> str:
    """Return the statistics of a conversation as one line; it needs at least one answer."""
    tokens = sum(answer.generated_tokens for answer in answers)
    decode_s = sum(answer.decode_s for answer in answers)
    decoded = sum(max(answer.generated_tokens - 1, 0) for answer in answers)  # without first tokens: see Statistics
    parts = [
        format_count(len(answers), "answer"),
        f"{format_count(tokens, 'token')} in {format_seconds(decode_s)}",
        *([format_rate(decoded / decode_s)] if decoded and decode_s else []),
        f"context {format_count(answers[-1].prompt_tokens + answers[-1].generated_tokens, 'token')}",
    ]
    return " · ".join(parts)
