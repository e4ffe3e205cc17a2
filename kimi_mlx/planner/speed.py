"""Predict the time of prefill and decode, with its parts. See docs/planner.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

from kimi_mlx.planner.constants import FENCE_S, Constants, EngineProfile, Strategy
from kimi_mlx.planner.drafts import DraftShape
from kimi_mlx.planner.expert_load import expected_slowest
from kimi_mlx.planner.links import LinkProfile
from kimi_mlx.planner.machines import Machine
from kimi_mlx.planner.memory import cache_bytes
from kimi_mlx.planner.model_shape import ModelShape
from kimi_mlx.planner.portions import Portion
from kimi_mlx.planner.streaming import Streaming
from kimi_mlx.sizing.kv_cache import BFLOAT16_BYTES
from kimi_mlx.sizing.streaming import GUESSED_SHARE, SYNC_S


@dataclass(frozen=True)
class Setup:
    """A model on machines.

    Args:
        shape: the model.
        strategy: strategy of the split.
        machines: one machine per rank.
        portions: one portion per rank.
        link: link between ranks; None for a single rank.
        engine: the program.
        fence_s: time of each collective in addition to the network.
        constants: fitted constants.
        draft: draft model on the host of rank 0; None without one.
        streaming: experts that are read from the SSD; None if all are in memory.
    """

    shape: ModelShape
    strategy: Strategy
    machines: Sequence[Machine]
    portions: Sequence[Portion]
    link: LinkProfile | None
    engine: EngineProfile
    fence_s: float
    constants: Constants
    draft: DraftShape | None = None
    streaming: Streaming | None = None

    @property
    def chunk(self) -> int:
        """Number of prompt tokens per step."""
        return self.engine.prefill_chunk if self.streaming is None else self.streaming.chunk

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return len(self.machines)

    def bandwidth(self, rank: int) -> float:
        """Return the bytes per second that a rank reads."""
        return self.machines[rank].chip.bandwidth_bytes_per_s * self.constants.bandwidth_share

    def flops(self, rank: int) -> float:
        """Return the operations per second of a rank."""
        return self.machines[rank].chip.flops * self.constants.compute_share


@dataclass(frozen=True)
class TimeBreakdown:
    """The parts of a step's time along its critical path.

    Args:
        read_s: reading weights.
        compute_s: matrix multiplications and attention; in decode only attention.
        kernels_s: dispatching kernels.
        fences_s: stopping the GPU for collectives.
        link_s: collectives on the network.
        draft_s: draft model.
        ssd_s: waiting for experts from the SSD, without reads that overlap with other work.
        syncs_s: idle GPU until the host knows the chosen experts, if some are read from the SSD.
    """

    read_s: float
    compute_s: float
    kernels_s: float
    fences_s: float
    link_s: float
    draft_s: float = 0
    ssd_s: float = 0
    syncs_s: float = 0

    @property
    def total_s(self) -> float:
        """Sum of all parts; none overlaps with another."""
        work_s = self.read_s + self.compute_s + self.kernels_s + self.draft_s
        return work_s + self.fences_s + self.link_s + self.ssd_s + self.syncs_s

    def __truediv__(self, number: float) -> TimeBreakdown:
        """Return the share of one of `number` tokens."""
        return TimeBreakdown(*(seconds / number for seconds in astuple(self)))

    def __add__(self, other: TimeBreakdown) -> TimeBreakdown:
        """Return the time of two steps, one after the other."""
        return TimeBreakdown(*(mine + others for mine, others in zip(astuple(self), astuple(other), strict=True)))


ZERO_TIME = TimeBreakdown(0, 0, 0, 0, 0)


def decode(setup: Setup, context: int, tokens: int = 1) -> TimeBreakdown:
    """Predict a step with `tokens` tokens of one sequence after `context` tokens; several are a token and its draft.

    Kernels and fences are paid once a step. More tokens choose more experts, attend and multiply more. The products of
    a single token take no longer than reading its weights.
    """
    read, compute, ssd = _work_of_step(setup, context, tokens)
    fences, link = _pipeline_sends(setup, tokens) if setup.strategy == "pipeline" else _collectives(setup, tokens)
    kernels = _kernels_s(setup, setup.shape.layers)
    return TimeBreakdown(read, compute, kernels, fences, link, ssd_s=ssd, syncs_s=_syncs_s(setup))


@dataclass(frozen=True)
class DraftedDecode:
    """Decode with a draft model.

    Args:
        drafted: number of draft tokens per step.
        tokens_per_step: mean number of new tokens per step.
        step: time of a step, including the draft model's.
    """

    drafted: int
    tokens_per_step: float
    step: TimeBreakdown

    @property
    def tok_per_s(self) -> float:
        """Decode rate of one sequence."""
        return self.tokens_per_step / self.step.total_s


def decode_with_draft(setup: Setup, context: int) -> DraftedDecode | None:
    """Predict decode with the number of draft tokens that is fastest.

    None without a draft model, or if every number of draft tokens is slower than none: then nothing is drafted.
    """
    if setup.draft is None:
        return None
    options = [_draft_step(setup, setup.draft, context, drafted) for drafted in range(1, setup.draft.most_drafted + 1)]
    best = max(options, key=lambda option: option.tok_per_s)
    return best if best.tok_per_s > 1 / decode(setup, context).total_s else None


def _draft_step(setup: Setup, draft: DraftShape, context: int, drafted: int) -> DraftedDecode:
    """Predict a step with `drafted` draft tokens. The leader drafts, then sends the tokens: one more message."""
    step = decode(setup, context, 1 + drafted)
    draft_s = draft.read_bytes(drafted, context) / setup.bandwidth(0)
    draft_s += drafted * setup.engine.kernels_per_layer * setup.constants.kernel_s
    if setup.link is not None:
        states_s = (1 + drafted) * draft.memory.captured_bytes / setup.link.bytes_per_s
        link_s = setup.link.hop_s + (states_s if setup.strategy == "pipeline" else 0)
        step += TimeBreakdown(0, 0, 0, setup.fence_s, link_s)
    return DraftedDecode(drafted, draft.tokens_of(drafted), step + TimeBreakdown(0, 0, 0, 0, 0, draft_s))


def prefill(setup: Setup, prompt: int, depth: int = 0) -> TimeBreakdown:
    """Predict a prompt of `prompt` tokens in the engine's chunks, after `depth` tokens in the cache."""
    size = setup.chunk
    chunks = [(depth + start, min(size, prompt - start)) for start in range(0, prompt, size)]
    if setup.strategy == "pipeline":
        return _run_stages(setup, [[_stage(setup, rank, *chunk) for rank in range(setup.ranks)] for chunk in chunks])
    return sum((_chunk(setup, *chunk) for chunk in chunks), ZERO_TIME)


def _chunk(setup: Setup, start: int, length: int) -> TimeBreakdown:
    """Predict `length` tokens of a prompt after `start` tokens, on ranks that work in parallel."""
    saved_s, *costs = _divided_queries(setup, start, length)
    works = (_work(setup, rank, start, length, saved_s) for rank in range(setup.ranks))
    slowest = max(works, key=lambda time: time.total_s)
    return slowest + TimeBreakdown(0, 0, 0, *_collectives(setup, length)) + TimeBreakdown(0, 0, 0, *costs)


def _divided_queries(setup: Setup, start: int, length: int) -> tuple[float, float, float]:
    """Return the savings and costs of dividing a chunk's queries over the ranks (kimi_mlx.model.query_split).

    Each rank computes queries, attention and output projection of some tokens; one more gather per layer.

    Returns:
        Saved seconds of computation, and seconds of fences and of the link; 0 if the division would lose.
    """
    if not setup.engine.divides_queries or setup.strategy not in ("hybrid", "expert") or setup.link is None:
        return 0.0, 0.0, 0.0
    shape, ranks, link = setup.shape, setup.ranks, setup.link
    config, values = shape.config, shape.values
    q_values = values.heads + (0 if config.q_lora_rank is None else config.hidden_size * config.q_lora_rank)
    pairs = length * (start + length / 2) * config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    flops = 2 * shape.layers * (length * q_values + pairs)
    saved_s = (1 - 1 / ranks) * flops / min(setup.flops(rank) for rank in range(ranks))
    gathers_s = shape.layers * link.all_gather_s(_states_bytes(setup, length) / ranks, ranks)
    fences_s = shape.layers * setup.fence_s
    if gathers_s + fences_s >= saved_s:
        return 0.0, 0.0, 0.0
    return saved_s, fences_s, gathers_s


def _stage(setup: Setup, rank: int, start: int, length: int) -> TimeBreakdown:
    """Predict the same on one stage of a pipeline, including the message to the next stage."""
    return _work(setup, rank, start, length) + TimeBreakdown(0, 0, 0, setup.fence_s, _send_s(setup, rank, length))


def _work(setup: Setup, rank: int, start: int, length: int, saved_s: float = 0.0) -> TimeBreakdown:
    """Predict the local work of a rank, `saved_s` less than if it computed all queries of its heads."""
    read = _touched_bytes(setup, rank, length) / setup.bandwidth(rank)
    compute = _chunk_flops(setup, rank, start, length) / setup.flops(rank) - saved_s
    kernels = _kernels_s(setup, setup.portions[rank].layers)
    if setup.streaming is None:
        return TimeBreakdown(read, compute, kernels, 0, 0)
    # the next layer's experts are read while a layer is computed
    ssd = max(_ssd_s(setup, rank, length) - read - compute - kernels, 0.0)
    syncs = setup.portions[rank].moe_layers * SYNC_S
    return TimeBreakdown(read, compute, kernels, 0, 0, ssd_s=ssd, syncs_s=syncs)


def _run_stages(setup: Setup, chunks: Sequence[Sequence[TimeBreakdown]]) -> TimeBreakdown:
    """Return the time until the last chunk leaves the last stage.

    A stage starts a chunk when the previous stage has finished it and the stage itself is free.
    """
    free = [ZERO_TIME] * setup.ranks
    for stages in chunks:
        finished = ZERO_TIME if setup.engine.overlaps_chunks else free[-1]
        for rank, stage in enumerate(stages):
            finished = free[rank] = max(finished, free[rank], key=lambda time: time.total_s) + stage
    return free[-1]


def collectives_per_token(strategy: Strategy, layers: int, ranks: int) -> int:
    """Return the number of collectives, or messages of a pipeline, per token, without the all-gather of the logits."""
    return {"single": 0, "pipeline": ranks, "tensor": 2 * layers, "hybrid": layers, "expert": layers}[strategy]


def _combine(setup: Setup, parts: Sequence[tuple[float, float, float]]) -> tuple[float, float, float]:
    """Combine the times of the ranks: the sum of pipeline stages, otherwise the times of the slowest rank."""
    if setup.strategy != "pipeline":
        return max(parts, key=sum)
    reads, others, waits = zip(*parts, strict=True)
    return sum(reads), sum(others), sum(waits)


def _work_of_step(setup: Setup, context: int, tokens: int) -> tuple[float, float, float]:
    """Return the seconds of reading weights, of computing, and of waiting for the SSD."""
    shape, ranks = setup.shape, range(setup.ranks)
    expert, chosen = shape.bytes.expert, _distinct_experts(shape, tokens)
    fixed = [_fixed_bytes(setup.portions[rank], shape) / setup.bandwidth(rank) for rank in ranks]
    attention = [_attention_s(setup, rank, context, tokens) + _products_s(setup, rank, tokens - 1) for rank in ranks]
    if setup.strategy != "expert":
        routed = [
            setup.portions[rank].moe_layers * chosen * setup.portions[rank].expert_rows * expert / setup.bandwidth(rank)
            for rank in ranks
        ]
        waits = [_wait_s(setup, rank, tokens, fixed[rank] + attention[rank], routed[rank]) for rank in ranks]
        return _combine(setup, [(fixed[rank] + routed[rank], attention[rank], waits[rank]) for rank in ranks])
    waits = [(a + b) / shape.layers for a, b in zip(fixed, attention, strict=True)]
    held = [round(portion.experts * shape.config.n_routed_experts) for portion in setup.portions]
    reads = [expert / setup.bandwidth(rank) for rank in ranks]
    layer_s = expected_slowest(held, round(chosen), waits, reads)
    whole = shape.moe_layers * layer_s + (shape.layers - shape.moe_layers) * max(waits)
    ssd = 0.0
    if setup.streaming is not None:  # nothing overlaps: few experts of a token are on the same rank
        misses = [setup.streaming.misses(rank, shape, tokens) / chosen for rank in ranks]
        rates = [experts.ssd_bytes_per_s for experts in setup.streaming.ranks]
        slow = [one + miss * expert / rate for one, miss, rate in zip(reads, misses, rates, strict=True)]
        ssd = shape.moe_layers * (expected_slowest(held, round(chosen), waits, slow) - layer_s)
    return whole - max(attention), max(attention), ssd


def _ssd_s(setup: Setup, rank: int, tokens: int) -> float:
    """Return the seconds to read the experts that `tokens` tokens choose and that are not in memory."""
    assert setup.streaming is not None
    portion = setup.portions[rank]
    misses = setup.streaming.misses(rank, setup.shape, tokens) * portion.experts * portion.expert_rows
    read_bytes = portion.moe_layers * misses * setup.shape.bytes.expert
    return read_bytes / setup.streaming.ranks[rank].ssd_bytes_per_s


def _wait_s(setup: Setup, rank: int, tokens: int, fixed_s: float, routed_s: float) -> float:
    """Return the seconds in a step in which a rank only waits for its SSD.

    Reads of guessed experts overlap with everything but the experts; the others, which begin once the router has
    chosen, with the experts that are in memory.

    Args:
        setup: the model on machines.
        rank: the rank.
        tokens: number of tokens of the step.
        fixed_s: time of everything but the routed experts.
        routed_s: time of all chosen experts.
    """
    if setup.streaming is None:
        return 0.0
    ssd = _ssd_s(setup, rank, tokens)
    hits = 1 - setup.streaming.misses(rank, setup.shape, tokens) / _distinct_experts(setup.shape, tokens)
    return max(GUESSED_SHARE * ssd - fixed_s, 0.0) + max((1 - GUESSED_SHARE) * ssd - hits * routed_s, 0.0)


def _syncs_s(setup: Setup) -> float:
    """Return the seconds per step in which the GPU waits until the host knows the chosen experts."""
    return 0.0 if setup.streaming is None else setup.shape.moe_layers * SYNC_S


def _fixed_bytes(portion: Portion, shape: ModelShape) -> float:
    """Return the bytes that a token reads apart from routed experts and the cache."""
    return portion.fixed(shape.bytes) + portion.head * shape.bytes.head


def _distinct_experts(shape: ModelShape, tokens: int) -> float:
    """Return the expected number of distinct experts of a layer that `tokens` tokens choose independently."""
    experts = shape.config.n_routed_experts
    return experts * (1 - (1 - shape.config.num_experts_per_tok / experts) ** tokens)


def _products_s(setup: Setup, rank: int, tokens: int) -> float:
    """Predict the products of `tokens` tokens with all matrices, without the head."""
    return 2 * tokens * _linear_values(setup, rank) / setup.flops(rank)


def _attention_s(setup: Setup, rank: int, context: int, tokens: int) -> float:
    """Predict attention of new tokens in latent space: reading the cache or computing, whichever is slower."""
    config, portion = setup.shape.config, setup.portions[rank]
    width = 2 * config.kv_lora_rank + config.qk_rope_head_dim
    flops = 2 * tokens * context * portion.layers * config.num_attention_heads * portion.heads * width
    read_s = cache_bytes(portion, setup.shape, context) / setup.bandwidth(rank)
    return max(read_s, flops / setup.flops(rank))


def _touched_bytes(setup: Setup, rank: int, tokens: int) -> float:
    """Return the bytes that a batch of `tokens` tokens reads; with many tokens, nearly all experts."""
    shape, portion = setup.shape, setup.portions[rank]
    routed = _distinct_experts(shape, tokens) * portion.experts * portion.expert_rows * shape.bytes.expert
    return _fixed_bytes(portion, shape) + portion.moe_layers * routed


def _linear_values(setup: Setup, rank: int) -> float:
    """Return the number of values of a rank's matrices that a token is multiplied with, without the head."""
    portion, values, config = setup.portions[rank], setup.shape.values, setup.shape.config
    chosen = config.num_experts_per_tok * portion.experts * portion.expert_rows
    return portion.fixed(values) + portion.moe_layers * chosen * values.expert


def _chunk_flops(setup: Setup, rank: int, start: int, length: int) -> float:
    """Return the operations for `length` tokens after `start`. The cache is expanded into heads once per chunk."""
    shape, portion, values = setup.shape, setup.portions[rank], setup.shape.values
    config = shape.config
    expansion = portion.layers * portion.heads * values.expansion
    linear = _linear_values(setup, rank) - expansion
    pairs = length * (start + length / 2)
    attention = pairs * portion.layers * config.num_attention_heads * portion.heads
    attention *= config.qk_head_dim + config.v_head_dim
    return 2 * (linear * length + expansion * (start + length) + attention)


def _kernels_s(setup: Setup, layers: int) -> float:
    """Return the time to dispatch the kernels of `layers` layers."""
    return layers * setup.engine.kernels_per_layer * setup.constants.kernel_s


def _collectives(setup: Setup, tokens: int) -> tuple[float, float]:
    """Return the seconds of fences and of the link for a batch of `tokens` tokens."""
    link, ranks, config = setup.link, setup.ranks, setup.shape.config
    if link is None:
        return 0, 0
    waits_s = 0.0
    count = collectives_per_token(setup.strategy, setup.shape.layers, ranks)
    seconds = count * link.all_reduce_s(_states_bytes(setup, tokens), ranks, setup.engine.gathers)
    if setup.strategy == "expert":  # each layer also waits for its router's choice; a fast fence does not help
        waits_s = setup.shape.moe_layers * FENCE_S
    if setup.engine.slices_head:
        count += 1
        seconds += link.all_gather_s(config.vocab_size * BFLOAT16_BYTES / ranks, ranks)
    return waits_s + count * setup.fence_s, seconds


def _pipeline_sends(setup: Setup, tokens: int) -> tuple[float, float]:
    """Return the seconds of fences and of the link for the messages of all stages, including the last one."""
    count = collectives_per_token("pipeline", setup.shape.layers, setup.ranks)
    return count * setup.fence_s, sum(_send_s(setup, rank, tokens) for rank in range(setup.ranks))


def _send_s(setup: Setup, rank: int, tokens: int) -> float:
    """Return the time of a stage's message: hidden states; from the last stage those of one position, or a token."""
    assert setup.link is not None
    if rank < setup.ranks - 1:
        return setup.link.send_s(_states_bytes(setup, tokens))
    return setup.link.send_s(_states_bytes(setup, 1)) if setup.engine.returns_states else setup.link.hop_s


def _states_bytes(setup: Setup, tokens: int) -> int:
    """Return the bytes of the hidden states of `tokens` tokens in a message, in bfloat16."""
    return tokens * setup.shape.config.hidden_size * BFLOAT16_BYTES
