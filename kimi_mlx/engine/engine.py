"""The engine: admits, batches, preempts and finishes requests."""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator

import mlx.core as mx

from kimi_mlx.engine.agreed_values import agreed_chunk_estimate, agreed_limits, has_tower
from kimi_mlx.engine.batch import Batch, Events
from kimi_mlx.engine.batch_sizes import NO_STEPS
from kimi_mlx.engine.constraint import Constraint
from kimi_mlx.engine.drafts.drafter import Drafter
from kimi_mlx.engine.drafts.measure import measure_steps
from kimi_mlx.engine.drafts.model_drafter import ModelDrafter
from kimi_mlx.engine.drafts.planner import DraftPlanner
from kimi_mlx.engine.drafts.prompt_lookup import PromptLookup
from kimi_mlx.engine.drafts.records import DraftRecords
from kimi_mlx.engine.drafts.step_times import StepTimes
from kimi_mlx.engine.events import Event, Prefilled
from kimi_mlx.engine.fair_queue import FairQueue
from kimi_mlx.engine.feature_store import FeatureStore
from kimi_mlx.engine.image_encoder import ImageEncoder
from kimi_mlx.engine.kv_cache_pool import KVCachePool
from kimi_mlx.engine.prompt_cache.block_store import BlockStore
from kimi_mlx.engine.prompt_cache.usage import CacheUsage
from kimi_mlx.engine.request import ImageInput, Request
from kimi_mlx.engine.sampling import GREEDY_BELOW
from kimi_mlx.engine.sequence import Sequence
from kimi_mlx.engine.step_runner import StepRunner
from kimi_mlx.engine.token_sampler import TokenSampler
from kimi_mlx.errors import ContextLengthError, EngineError, KimiMlxError, VisionError
from kimi_mlx.model.decoder import Model
from kimi_mlx.model.draft_model import DraftModel
from kimi_mlx.model.expert_stats import ExpertStats
from kimi_mlx.parallel.communicator import SEQUENCE_MODULUS, LeaderState
from kimi_mlx.parallel.group import SingleGroup, gather_on_host
from kimi_mlx.sizing.engine_limits import StreamingLimits

MAX_NEW_COMMANDS = SEQUENCE_MODULUS // 2
"""Maximum number of commands that a header can announce at a time: counts are sent modulo SEQUENCE_MODULUS."""

RESERVED_TOKENS = 256
"""Number of new tokens that must fit in the caches before a sequence is admitted."""

LEFT_FOR_OTHERS = 8
"""A client with N running sequences leaves more than N / 8 places free: another client does not wait until one ends."""

MIN_SHARED_TOKENS = 64
"""A request waits while another one is about to prefill a common prefix of at least this many tokens."""


class Engine:
    """One model, or a rank's share of it, and its requests.

    All ranks get the same requests and cancellations in the same order, so they run the same steps.

    Args:
        model: the model; for a rank's share, its communicator connects to the other ranks.
        count_commands: on the leader, returns the number of commands so far; see `num_new_commands`.
        prefill_chunk: number of prompt tokens per step, the same on all ranks; None for the largest useful one that
            fits.
        speculate: maximum number of draft tokens per step and sequence; 0 for no drafts.
        draft_model: draft model, on the leader; the model must capture its layers on all ranks.
        drafters: sources of drafts on the leader; the first one wins if chances are equal. None for prompt lookup,
            then the draft model.
        constrain: returns the constraint of a grammar, not compiled yet; None if grammars are not supported.
        cache_bytes: size of the KV caches on each rank; None for most of the free memory.
        blocks: the prompt cache on disk, if any.
        streaming: limits if a rank reads experts from its SSD, the same on all ranks; None if all are in memory.
    """

    def __init__(
        self,
        model: Model,
        count_commands: Callable[[], int] = lambda: 0,
        prefill_chunk: int | None = None,
        speculate: int = 0,
        draft_model: DraftModel | None = None,
        drafters: Iterable[Drafter] | None = None,
        constrain: Callable[[str], Constraint] | None = None,
        cache_bytes: int | None = None,
        blocks: BlockStore | None = None,
        streaming: StreamingLimits | None = None,
    ):
        self._model = model
        self._runner = StepRunner(model, count_commands)
        communicator = self._runner.communicator
        group = SingleGroup() if communicator is None else communicator.group
        limits = agreed_limits(
            model,
            group,
            cache_bytes,
            prefill_chunk or (None if streaming is None else streaming.chunk),
            num_draft_layers=int(draft_model is not None),
            sequences=None if streaming is None else streaming.sequences,
        )
        # A chunk reads nearly all experts from the SSD, whatever its length: shorter ones would not help decoding.
        estimate = None
        if streaming is None:
            estimate = agreed_chunk_estimate(model, group, self._runner.pipeline is not None)
        self._constrain = constrain
        self._pool = KVCachePool(model, limits.cache_tokens, blocks, has_draft_caches=draft_model is not None)
        features = FeatureStore(limits.feature_tokens)
        self._encoder = ImageEncoder(model, self._runner, features, self._on_header)
        self._has_tower = has_tower(model, group)
        self.context = min(model.config.max_position_embeddings, limits.cache_tokens)
        """Maximum number of tokens of a sequence."""
        # A pipeline has one batch in flight per rank.
        num_batches = 1 if self._runner.pipeline is None else self._runner.pipeline.group.size
        self._step_times = StepTimes()
        self.drafts = DraftRecords(self._step_times) if speculate and self._runner.is_leader else None
        """Records of drafts; None without drafts, and on ranks other than the leader."""
        if drafters is None:
            drafters = [PromptLookup(), *([] if draft_model is None else [ModelDrafter(draft_model)])]
        all_drafters = list(drafters)

        def make_planner() -> DraftPlanner | None:
            return None if self.drafts is None else DraftPlanner(all_drafters, self.drafts, speculate)

        self._batches = deque(
            Batch(
                self._runner,
                self._pool,
                features,
                self._on_header,
                limits.chunk,
                estimate,
                speculate,
                make_planner(),
            )
            for _ in range(num_batches)
        )
        self.max_sequences = limits.sequences
        """Maximum number of sequences that run at the same time."""
        self._waiting = FairQueue()
        self._ended: list[tuple[int, Event | KimiMlxError]] = []
        self._num_commands = 0
        self.batch_sizes = NO_STEPS
        """Number of steps by the number of their sequences."""

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._waiting and not self._ended and all(batch.is_idle for batch in self._batches)

    @property
    def num_running(self) -> int:
        """Number of requests that are running."""
        return len(self._running)

    @property
    def cached_tokens(self) -> int:
        """Number of tokens in the caches of running and finished requests."""
        return self._pool.busy_tokens + self._pool.idle_tokens

    @property
    def cache_usage(self) -> CacheUsage:
        """Use of the prompt cache so far. Safe from any thread."""
        return self._pool.usage

    @property
    def expert_stats(self) -> ExpertStats | None:
        """Counters of the experts that are read from the disk; None if all are in memory. Safe from any thread."""
        return self._model.expert_stats

    @property
    def image_error(self) -> EngineError | None:
        """Error for requests with images if the model does not see images, with reason and remedy; None if it does."""
        if self._model.config.vision is None:
            return EngineError("this model does not see images", hint="`kimi-mlx models` lists the models that do")
        if not self._has_tower:
            return EngineError(
                "this model does not see images, because its files have no vision tower",
                hint="add the tower: run `kimi-mlx download` for this model again, without --no-vision",
            )
        return None

    @property
    def is_prefilling(self) -> bool:
        """Whether a prompt is in prefill, so that steps take long."""
        return any(batch.is_prefilling for batch in self._batches)

    def add(self, request_id: int, request: Request) -> None:
        """Add a request.

        `step` yields its events: Encoded, Prefilled, PromptLogprobs and Token (several), Finished (once, last).
        Its grammar is compiled in the background. If that fails, or if the grammar fails during the answer, or an image
        cannot be encoded, the last event is the error.

        Raises:
            EngineError: an empty prompt, an invalid token id, more tokens than the context holds, or images for a model
                that does not see them.
            VisionError: the tokens of an image do not fit its grid.
        """
        max_tokens = self._check(request)
        constraint = None
        if request.grammar is not None:
            if self._constrain is None:
                raise EngineError("grammars are not supported here")
            constraint = self._constrain(request.grammar)
            constraint.limit_tokens(max_tokens + request.answered)
            if self._runner.has_head:
                constraint.start_compiling()
            else:
                constraint = None
        sampler = TokenSampler(request, self._seed(request), constraint)
        self._waiting.append(Sequence(request_id, request, max_tokens, sampler, lambda: self._model.expert_stats))

    def measure_steps(self) -> None:
        """Measure how long steps of a few tokens take, to decide on drafts. Collective; call it before any request."""
        self._step_times.set_start_times(measure_steps(self._model, self._runner))

    def cancel(self, request_id: int) -> None:
        """Cancel a request if it is not finished. Its Finished event has the reason `cancelled`."""
        if (waiting := self._waiting.find(request_id)) is not None:
            self._waiting.remove(waiting)
            self._ended.append((request_id, waiting.finished("cancelled", 0)))
            return
        for batch in self._batches:
            for sequence in batch.members:
                if sequence.request_id == request_id:
                    batch.remove(sequence)
                    self._ended.append((request_id, sequence.finished("cancelled", mx.get_peak_memory())))
                    return

    def step(self) -> Iterator[tuple[int, Event | KimiMlxError]]:
        """Run a step of the next batch; yield pairs of a request id and an event. The caller must exhaust the iterator.

        Raises:
            RingError: a rank is lost.
        """
        num_running = self.num_running
        yield from self._admit()
        if self.num_running > num_running and self._runner.communicator is not None:
            # A rank may be late: its command arrived later, or it read blocks from its disk.
            self._runner.communicator.synchronize()
        while self._ended:
            yield self._ended.pop(0)
        for _ in range(len(self._batches)):
            batch = self._batches[0]
            self._batches.rotate(-1)
            if not batch.is_idle:
                self._make_room(batch)
                image = self._encoder.next_image(self._running)
                is_encoding = image is not None and batch.choose_encoding()
                if image is not None and is_encoding:
                    yield from self._encode(image)
                others_decode = any(other.is_decoding for other in self._batches if other is not batch)
                yield from batch.step(others_decode, has_chunks=not is_encoding)
                self.batch_sizes = self.batch_sizes.with_step(batch.num_in_step)
                return

    def generate(self, request: Request) -> Iterator[Event]:
        """Run one request. On a single rank the caller may stop early; the cache keeps the computed tokens."""
        self.add(0, request)
        try:
            while not self.is_idle:
                for _, event in list(self.step()):
                    if isinstance(event, KimiMlxError):
                        raise event
                    yield event
        finally:
            self._waiting.clear()
            self._ended.clear()
            for batch in self._batches:
                batch.remove_all()

    def num_new_commands(self, num_done: int) -> int:
        """Return the number of commands to execute before the next step: the same on all ranks at the same step.

        An idle engine waits for the next command. Otherwise the leader's header has announced the count.

        Args:
            num_done: number of commands that this rank has executed.
        """
        if self.is_idle:
            self._num_commands = num_done + 1  # earlier headers are out of date
        new = (self._num_commands - num_done) % SEQUENCE_MODULUS
        return new if new <= MAX_NEW_COMMANDS else 0  # larger means negative: an older header, read late

    def discard_all(self) -> None:
        """Discard all requests and caches after a failed step. Only allowed on a single rank."""
        for batch in self._batches:
            batch.discard_all()
        self._encoder.discard()
        self._ended.clear()
        self._waiting.clear()
        self._pool.discard_all()

    def interrupt(self) -> None:
        """Let a step that reads experts from the disk fail. Safe from any thread."""
        self._model.interrupt()

    def close(self) -> None:
        """End all reads of experts; with streamed experts the engine is unusable then."""
        self._model.close()

    def clear(self) -> None:
        """Drop the caches that are kept for later requests."""
        self._pool.clear()

    @property
    def _running(self) -> list[Sequence]:
        return [sequence for batch in self._batches for sequence in batch.members]

    def _admit(self) -> Iterator[tuple[int, Event]]:
        """Admit waiting requests while there is room, clients in turn; yield their progress."""
        if not self._running and all(batch.is_idle for batch in self._batches):
            mx.reset_peak_memory()
        running = self._running
        if not self._waiting or len(running) >= self.max_sequences:
            return
        prefilling = [sequence for sequence in running if sequence.num_computed_tokens < len(sequence.tokens)]
        num_by_client = Counter(sequence.request.client for sequence in running)

        def has_place(client: str) -> bool:
            return self.max_sequences - len(running) > num_by_client[client] // LEFT_FOR_OTHERS

        for sequence in self._waiting.in_turn(filter(has_place, self._waiting.clients)):
            client = sequence.request.client
            if not has_place(client):
                continue
            new_tokens = min(RESERVED_TOKENS, sequence.remaining_tokens)
            if running and not self._pool.has_room(sequence.tokens, new_tokens, sequence.max_cached_tokens):
                return
            can_wait = not sequence.needs_prompt_logprobs  # otherwise it must compute all of its prompt itself
            if can_wait and any(_is_about_to_prefill(other, sequence) for other in prefilling):
                continue
            if running and self._runner.communicator is None and not sequence.sampler.is_ready:
                continue  # several ranks cannot skip it: they are ready at different times
            self._waiting.take(sequence)
            cache, cached = self._pool.acquire(sequence.tokens, sequence.max_cached_tokens)
            sequence.begin(cache, cached)
            min(self._batches, key=lambda batch: len(batch.members)).members.append(sequence)
            running.append(sequence)
            num_by_client[client] += 1
            prefilling.append(sequence)
            if not sequence.generated:
                yield sequence.request_id, Prefilled(cached, len(sequence.tokens))

    def _encode(self, image: ImageInput) -> Events:
        """Compute a part of an image. An error ends the requests that need it."""
        for sequence, event in self._encoder.step(image, self._running):
            if isinstance(event, KimiMlxError):
                self._batch_of(sequence).remove(sequence)
            yield sequence.request_id, event

    def _batch_of(self, sequence: Sequence) -> Batch:
        return next(batch for batch in self._batches if sequence in batch.members)

    def _make_room(self, batch: Batch) -> None:
        """Make room for the batch's next step: evict idle caches, then preempt the youngest sequence."""
        while not self._pool.make_room(batch.growth) and len(self._running) > 1:
            youngest = max(self._running, key=lambda sequence: sequence.request_id)
            self._batch_of(youngest).remove(youngest)
            self._waiting.put_back(youngest)

    def _on_header(self, state: LeaderState) -> None:
        self._num_commands = state.num_commands

    def _check(self, request: Request) -> int:
        """Reject invalid requests; return the maximum number of new tokens."""
        config, length = self._model.config, len(request.prompt)
        if not length:
            raise EngineError("the prompt has no tokens")
        self._check_images(request)
        biased = [id for id, _ in request.logit_bias]
        for id in (min(request.prompt), max(request.prompt), *biased):
            if not 0 <= id < config.vocab_size:
                raise EngineError(f"token id {id} is outside the vocabulary of {config.vocab_size}")
        remaining, max_tokens = self.context - length, request.max_tokens
        if remaining < 0 or (remaining == 0 and max_tokens != 0):
            is_memory = self.context < config.max_position_embeddings
            in_images = sum(image.num_tokens for image in request.images)
            raise ContextLengthError(
                f"the prompt has {length} tokens{f' ({in_images} of images)' * bool(in_images)}, "
                f"but {'the KV cache' if is_memory else 'the context'} holds {self.context}",
                hint="use fewer or smaller images, " * bool(in_images)
                + "shorten the prompt; in a conversation, /reset starts a new one"
                + "; `--cache-memory` sets the size of the KV cache" * is_memory,
            )
        if max_tokens is not None and max_tokens < 0:
            raise EngineError(f"max_tokens is {max_tokens}, but must be at least 0")
        return remaining if max_tokens is None else min(max_tokens, remaining)

    def _check_images(self, request: Request) -> None:
        """Check that the model sees images, and that each has as many placeholder tokens as features."""
        if not request.images:
            return
        if (error := self.image_error) is not None:
            raise error
        vision = self._model.config.vision
        assert vision is not None
        for number, image in enumerate(request.images, 1):
            expected = vision.num_tokens(image.grid)
            placeholders = request.prompt[image.start : image.stop].count(vision.media_placeholder_token_id)
            if not expected == image.num_tokens == placeholders:
                raise VisionError(
                    f"image {number} has {expected} features, but the prompt has {placeholders} placeholder tokens in "
                    f"its {image.num_tokens} positions"
                )

    def _seed(self, request: Request) -> int:
        """Return the seed, the same on every rank; 0 for a greedy request. The leader chooses one if there is none."""
        seed, communicator = request.sampling.seed, self._runner.communicator
        if request.sampling.temperature < GREEDY_BELOW:
            return 0
        if seed is None:
            seed = random.getrandbits(24)
            if communicator is not None and self._runner.pipeline is None:  # in a pipeline only the leader samples
                seed = int(gather_on_host(communicator.group, [seed])[0, 0])
        return seed


def _is_about_to_prefill(other: Sequence, sequence: Sequence) -> bool:
    """Return whether another sequence is about to prefill a prefix that this one has in common with it."""
    end = other.num_computed_tokens + MIN_SHARED_TOKENS
    return end <= len(other.tokens) and end <= len(sequence.tokens) and sequence.shares_prefix(other, end)
