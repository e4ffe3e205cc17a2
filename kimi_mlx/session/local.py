"""A session in this process: one thread runs the engine and answers the requests of all other threads."""

from __future__ import annotations

import itertools
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import mlx.core as mx

from kimi_mlx.cluster.hosts.launch import FAST_SYNC
from kimi_mlx.cluster.ring.end_limits import OTHER_END_LIMIT_S, SHOW_AFTER_S, unload_limit_s
from kimi_mlx.engine.constraint import Constraint
from kimi_mlx.engine.engine import Engine
from kimi_mlx.engine.events import Event, Finished
from kimi_mlx.engine.free_memory import free_memory_bytes
from kimi_mlx.engine.prompt_cache.block_store import BlockStore
from kimi_mlx.engine.request import Request
from kimi_mlx.engine.step_errors import step_error
from kimi_mlx.errors import EngineError, KimiMlxError
from kimi_mlx.model.config import load_config
from kimi_mlx.parallel.group import SingleGroup
from kimi_mlx.runtime.draft import open_draft_model, warm_up_draft
from kimi_mlx.runtime.expert_memory import choose_expert_budget
from kimi_mlx.runtime.grammars import open_grammar_compiler
from kimi_mlx.runtime.load import fingerprint, load_share, prepare_device
from kimi_mlx.runtime.prompt_cache import open_prompt_cache
from kimi_mlx.runtime.unload import clear_frames, release_memory
from kimi_mlx.session.session import (
    DraftStatus,
    EventCallback,
    LoadProgress,
    RankMemory,
    SessionOptions,
    SessionStatus,
    stream_events,
)
from kimi_mlx.session.signals import defer_signals
from kimi_mlx.sizing.experts import ExpertBudget
from kimi_mlx.store.vision import no_vision_error
from kimi_mlx.units import format_bytes

LOG = logging.getLogger(__name__)

FAILED_STEP_DOWN_S = 10.0
"""Report "down" for this long after a failed step, unless a later request succeeds."""


class LocalSession:
    """The engine in a thread of this process.

    Raises:
        KimiMlxError: the model cannot be loaded.
    """

    def __init__(self, options: SessionOptions, progress: LoadProgress = lambda done, total: None):
        self._commands: queue.SimpleQueue[Callable[[Engine], None] | None] = queue.SimpleQueue()
        self._callbacks: dict[int, EventCallback] = {}
        self._request_ids = itertools.count(1)
        self._added: set[int] = set()  # ids of requests in the engine; the others are still in the command queue
        self._failure: BaseException | None = None
        self._failed_step: tuple[float, str] | None = None  # time and reason
        self._engine: Engine | None = None
        self._blocks: BlockStore | None = None
        self._is_closing = False
        self._context = 0
        self._image_error: EngineError | None = None
        self._last_step_at: float | None = None
        self._memory = RankMemory()
        self._expert_budget: ExpertBudget | None = None
        self._lock = threading.Lock()
        load_results: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, args=(options, progress, load_results), daemon=True)
        self._thread.start()
        try:
            failure = load_results.get()
        except BaseException:  # Ctrl-C while the model loads
            self.close()
            raise
        if failure is not None:
            raise failure

    def generate(self, request: Request) -> Iterator[Event]:
        """Answer a request. Closing the iterator cancels it.

        Raises:
            EngineError: the request is refused, or the session is closed.
        """
        return stream_events(self, request)

    @property
    def context(self) -> int:
        """Maximum number of tokens of a sequence."""
        return self._context

    @property
    def image_error(self) -> EngineError | None:
        """Error for requests with images if the model does not see images, with reason and remedy; None if it does."""
        return self._image_error

    def submit(self, request: Request, on_event: EventCallback) -> int:
        """Start to answer a request; return its id."""
        request_id = next(self._request_ids)
        with self._lock:
            if self._failure is None:
                self._callbacks[request_id] = on_event
                self._commands.put(lambda engine: self._add(engine, request_id, request))
                return request_id
        on_event(self._failure)
        return request_id

    def cancel(self, request_id: int) -> None:
        """Cancel a request; it stops within a step."""
        self._commands.put(lambda engine: engine.cancel(request_id))

    def cancel_all(self) -> None:
        """Cancel all unfinished requests."""
        for request_id in list(self._callbacks):
            self.cancel(request_id)

    def status(self) -> SessionStatus:
        """Return the current status."""
        engine, last_step_at = self._engine, self._last_step_at
        if engine is None or self._failure is not None or not self._thread.is_alive():
            return SessionStatus(False, str(self._failure or "the model is not loaded"))
        num_running, drafts, experts = engine.num_running, engine.drafts, engine.expert_stats
        failed_at, reason = self._failed_step or (0.0, None)
        if engine.is_idle and time.monotonic() - failed_at > FAILED_STEP_DOWN_S:
            reason = None
        return SessionStatus(
            is_up=reason is None,
            reason=reason,
            active=num_running,
            waiting=max(len(self._callbacks) - num_running, 0),
            last_step_age_s=None if last_step_at is None else time.monotonic() - last_step_at,
            cached_tokens=engine.cached_tokens,
            memory=(self._memory,),
            batch_sizes=engine.batch_sizes,
            cache_usage=(engine.cache_usage,),
            drafts=None if drafts is None else DraftStatus(drafts.num_drafted, drafts.num_accepted, drafts.off_reason),
            experts={} if experts is None else {0: experts},
        )

    def reset(self) -> None:
        """Drop the KV caches of finished requests."""
        self._commands.put(Engine.clear)

    def close(self) -> None:
        """Cancel all requests and free the model. Wait until its memory is released."""
        self.cancel_all()
        self._is_closing = True
        self._commands.put(None)
        with defer_signals():
            self._thread.join(SHOW_AFTER_S)
            if not self._thread.is_alive():
                return
            if (engine := self._engine) is not None:
                engine.interrupt()
            del engine  # it would keep the model in memory
            size_bytes = mx.get_active_memory()
            limit_s = OTHER_END_LIMIT_S + unload_limit_s(size_bytes)
            LOG.warning(f"releasing {format_bytes(size_bytes)} of memory (up to {limit_s:.0f} s)")
            self._thread.join(limit_s)
            if self._thread.is_alive():
                LOG.warning(
                    f"the model was not released within {limit_s:.0f} s. On a Mac, its memory may stay in use until "
                    "that Mac restarts; `kimi-mlx doctor` shows it (or `vm_stat`: pages wired down)"
                )

    def _run(
        self, options: SessionOptions, progress: LoadProgress, load_results: queue.SimpleQueue[BaseException | None]
    ) -> None:
        """Run the thread: load the model, answer until the session is closed, and release the model."""
        try:
            self._engine = self._load(options, self._cancel_on_close(progress))
            self._context = self._engine.context
            self._memory = RankMemory(mx.get_active_memory(), free_memory_bytes(), expert_budget=self._expert_budget)
            if self._engine.image_error is not None:
                self._image_error = no_vision_error(options.checkpoint, load_config(options.checkpoint))
        except BaseException as error:  # raised again in __init__
            self._release(error)
            load_results.put(error)
            return
        load_results.put(None)
        end: BaseException = EngineError("the session is closed")
        try:
            self._answer_requests(self._engine)
        except BaseException as error:  # raised again in every generate()
            end = error
        self._fail(end)
        self._release(end)

    def _cancel_on_close(self, progress: LoadProgress) -> LoadProgress:
        """Return a callback that also ends loading when the session is closed."""

        def report(done: int, total: int) -> None:
            if self._is_closing:
                raise EngineError("the session is closed")
            progress(done, total)

        return report

    def _release(self, error: BaseException) -> None:
        """Write the prompt cache, end reads of experts, and release the memory of the model.

        Args:
            error: error whose frames may hold the model.
        """
        try:
            if self._engine is not None:
                self._engine.close()
            if self._blocks is not None:
                self._blocks.close()
        finally:
            self._engine = self._blocks = None
            while not self._commands.empty():  # a command may hold a request
                self._commands.get()
            clear_frames(error)
            release_memory()

    def _load(self, options: SessionOptions, progress: LoadProgress) -> Engine:
        os.environ[FAST_SYNC] = str(int(options.fast_sync))  # MLX reads it when it first computes
        prepare_device()
        folder, config = options.checkpoint, load_config(options.checkpoint)
        grammars = open_grammar_compiler(folder, config.vocab_size)
        budget = self._expert_budget = choose_expert_budget(
            options.expert_memory, folder, config, options.dtype, cache_bytes=options.cache_memory_bytes
        )
        model = load_share(
            folder,
            config,
            options.dtype,
            progress=progress,
            strategy=options.strategy,
            expert_memory=None if budget is None else budget.budget_bytes,
        )
        if options.cache_dir is not None:
            self._blocks = open_prompt_cache(
                options.cache_dir, options.cache_disk_bytes, model, fingerprint(folder, config), warn=LOG.warning
            )
        draft_model = None if options.draft is None else open_draft_model(options.draft, model, SingleGroup())
        engine = Engine(
            model,
            speculate=options.max_drafted,
            draft_model=draft_model,
            constrain=partial(Constraint, grammars),
            cache_bytes=options.cache_memory_bytes,
            blocks=self._blocks,
            streaming=None if budget is None else budget.limits,
        )
        if draft_model is not None:
            warm_up_draft(draft_model)
        if options.max_drafted:
            engine.measure_steps()
        return engine

    def _answer_requests(self, engine: Engine) -> None:
        while True:
            while engine.is_idle or not self._commands.empty():
                command = self._commands.get()
                if command is None:
                    return
                command(engine)
            try:
                events = list(engine.step())
            except Exception as error:  # for example, MLX ran out of memory: the next request may succeed
                self._abandon_requests(engine, error)
                continue
            self._last_step_at = time.monotonic()
            self._failed_step = None
            for request_id, event in events:
                if isinstance(event, Finished | KimiMlxError):
                    if isinstance(event, Finished):
                        self._memory = replace(self._memory, peak_memory_bytes=event.statistics.peak_memory_bytes)
                    self._end(request_id, event)
                else:
                    self._callbacks[request_id](event)

    def _abandon_requests(self, engine: Engine, error: Exception) -> None:
        """End all requests of the engine and drop its caches, after a step has failed."""
        if not isinstance(error, KimiMlxError):  # ours say what failed, such as the read of an expert
            LOG.exception("a step failed")
        self._failed_step = time.monotonic(), f"the last step failed: {type(error).__name__}: {error}"
        engine.discard_all()
        failure = step_error(error)
        for request_id in list(self._added):
            self._end(request_id, failure)

    def _add(self, engine: Engine, request_id: int, request: Request) -> None:
        try:
            engine.add(request_id, request)
            self._added.add(request_id)
        except KimiMlxError as error:
            self._end(request_id, error)

    def _end(self, request_id: int, event: Event | BaseException) -> None:
        self._added.discard(request_id)
        on_event = self._callbacks.pop(request_id)
        on_event(event)

    def _fail(self, error: BaseException) -> None:
        """End every request with this error, and refuse new ones."""
        with self._lock:
            self._failure = error
            callbacks, self._callbacks = self._callbacks, {}
        for on_event in callbacks.values():
            on_event(error)
