"""A session in this process: a thread has the model, and answers whoever asks."""

from __future__ import annotations

import itertools
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator

from kimi_mlx.cluster.ring.launch import FAST_SYNC
from kimi_mlx.engine.engine import Engine
from kimi_mlx.engine.request import Event, Finished, Request
from kimi_mlx.engine.sampling import samplers
from kimi_mlx.errors import EngineError, StepError
from kimi_mlx.model.config import load_config
from kimi_mlx.runtime.grammars import GrammarCompiler
from kimi_mlx.runtime.load import fingerprint, load_share, prepare_device
from kimi_mlx.runtime.prompt_cache import open_prompt_cache
from kimi_mlx.session.session import EventCallback, LoadProgress, SessionOptions, SessionStatus, stream_events

LOG = logging.getLogger(__name__)

CLOSE_LIMIT_S = 30.0
"""For the step that is being computed."""


STUMBLE_S = 10.0
"""So long it counts as not up after a step that failed, if nobody asks: only a request can show that it is."""


class LocalSession:
    """The engine in a thread of this process.

    Raises:
        KimiMlxError: the model cannot be loaded.
    """

    def __init__(self, options: SessionOptions, progress: LoadProgress = lambda done, total: None):
        self._commands: queue.SimpleQueue[Callable[[Engine], None] | None] = queue.SimpleQueue()
        self._callbacks: dict[int, EventCallback] = {}
        self._request_ids = itertools.count(1)
        self._known: set[int] = set()  # to the engine; others are still in the commands
        self._failure: BaseException | None = None
        self._stumble: tuple[float, str] | None = None
        self._engine: Engine | None = None
        self._stepped_at: float | None = None
        self._lock = threading.Lock()
        loaded: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._live, args=(options, progress, loaded), daemon=True)
        self._thread.start()
        if (failure := loaded.get()) is not None:
            raise failure

    def generate(self, request: Request) -> Iterator[Event]:
        """Answer a request.

        Raises:
            EngineError: it cannot be served, or the session is closed.
        """
        return stream_events(self, request)

    @property
    def context(self) -> int:
        """Tokens that a sequence may have."""
        assert self._engine is not None
        return self._engine.context

    def submit(self, request: Request, on_event: EventCallback) -> int:
        """Answer a request; returns its request_id."""
        request_id = next(self._request_ids)
        with self._lock:
            if self._failure is None:
                self._callbacks[request_id] = on_event
                self._commands.put(lambda engine: self._add(engine, request_id, request))
                return request_id
        on_event(self._failure)
        return request_id

    def cancel(self, request_id: int) -> None:
        """Ask a request to stop soon."""
        self._commands.put(lambda engine: engine.cancel(request_id))

    def cancel_all(self) -> None:
        """Ask the running requests to stop."""
        for request_id in list(self._callbacks):
            self.cancel(request_id)

    def status(self) -> SessionStatus:
        """How it is getting on."""
        engine, stepped_at = self._engine, self._stepped_at
        if engine is None or self._failure is not None or not self._thread.is_alive():
            return SessionStatus(False, str(self._failure or "the model is not loaded"))
        running = engine.num_running
        at, reason = self._stumble or (0.0, None)
        if engine.is_idle and time.monotonic() - at > STUMBLE_S:
            reason = None
        return SessionStatus(
            reason is None,
            reason,
            active=running,
            waiting=max(len(self._callbacks) - running, 0),
            last_step_age_s=None if stepped_at is None else time.monotonic() - stepped_at,
            cached_tokens=engine.cached_tokens,
        )

    def reset(self) -> None:
        """Forget the conversations' caches."""
        self._commands.put(Engine.clear)

    def close(self) -> None:
        """Free the model."""
        self.cancel_all()
        self._commands.put(None)
        self._thread.join(CLOSE_LIMIT_S)

    def _live(
        self, options: SessionOptions, progress: LoadProgress, loaded: queue.SimpleQueue[BaseException | None]
    ) -> None:
        """The thread's life: load, then answer until the session is closed."""
        try:
            os.environ[FAST_SYNC] = str(int(options.fast_sync))  # which MLX reads when it first computes
            prepare_device(options.has_sampling)
            folder, config = options.checkpoint, load_config(options.checkpoint)
            model = load_share(folder, config, options.dtype, progress=progress, strategy=options.strategy)
            blocks = None
            if options.cache_dir is not None:
                mark = fingerprint(folder, config)
                blocks = open_prompt_cache(options.cache_dir, options.cache_disk_bytes, model, mark, warn=LOG.warning)
            if options.has_sampling:
                samplers()
            self._engine = Engine(
                model,
                speculate=options.speculate,
                constrain=GrammarCompiler(folder, config.vocab_size).constrain,
                cache_bytes=options.cache_memory_bytes,
                blocks=blocks,
            )
        except BaseException as error:  # raised again where it was asked for
            loaded.put(error)
            return
        loaded.put(None)
        try:
            self._serve(self._engine)
            self._fail(EngineError("the session is closed"))
        except BaseException as error:  # raised again in every generate()
            self._fail(error)
        if blocks is not None:
            blocks.close()

    def _serve(self, engine: Engine) -> None:
        while True:
            while engine.is_idle or not self._commands.empty():
                command = self._commands.get()
                if command is None:
                    return
                command(engine)
            try:
                events = list(engine.turn())
            except Exception as error:  # MLX's, such as memory that is not to be had: the next request may fit
                self._abandon(engine, error)
                continue
            self._stepped_at = time.monotonic()
            self._stumble = None
            for request_id, event in events:
                if isinstance(event, Finished | EngineError):
                    self._end(request_id, event)
                else:
                    self._callbacks[request_id](event)

    def _abandon(self, engine: Engine, error: Exception) -> None:
        """A step has failed: so have all requests that the engine knew, and the caches are gone."""
        LOG.exception("a step has failed")
        self._stumble = time.monotonic(), f"the last step failed: {type(error).__name__}: {error}"
        engine.abandon()
        told = StepError(f"a step of the model failed: {error}", "ask again; a shorter prompt needs less")
        for request_id in list(self._known):
            self._end(request_id, told)

    def _add(self, engine: Engine, request_id: int, request: Request) -> None:
        try:
            engine.add(request_id, request)
            self._known.add(request_id)
        except EngineError as error:
            self._end(request_id, error)

    def _end(self, request_id: int, event: Event | BaseException) -> None:
        self._known.discard(request_id)
        on_event = self._callbacks.pop(request_id)
        on_event(event)

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._failure = error
            callbacks, self._callbacks = self._callbacks, {}
        for on_event in callbacks.values():
            on_event(error)
