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
from kimi_mlx.runtime.grammars import Grammars
from kimi_mlx.runtime.load import fingerprint, load_share, prepare_device
from kimi_mlx.runtime.prompt_cache import open_blocks
from kimi_mlx.runtime.status import SessionStatus
from kimi_mlx.session.session import Deliver, LoadProgress, SessionOptions, answer

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
        self._delivers: dict[int, Deliver] = {}
        self._numbers = itertools.count(1)
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
        return answer(self, request)

    @property
    def context(self) -> int:
        """Tokens that a sequence may have."""
        assert self._engine is not None
        return self._engine.context

    def submit(self, request: Request, deliver: Deliver) -> int:
        """Answer a request; returns its number."""
        number = next(self._numbers)
        with self._lock:
            if self._failure is None:
                self._delivers[number] = deliver
                self._commands.put(lambda engine: self._add(engine, number, request))
                return number
        deliver(self._failure)
        return number

    def withdraw(self, number: int) -> None:
        """Ask a request to stop soon."""
        self._commands.put(lambda engine: engine.cancel(number))

    def cancel(self) -> None:
        """Ask the running requests to stop."""
        for number in list(self._delivers):
            self.withdraw(number)

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
            waiting=max(len(self._delivers) - running, 0),
            last_step_age_s=None if stepped_at is None else time.monotonic() - stepped_at,
            cached_tokens=engine.cached_tokens,
        )

    def reset(self) -> None:
        """Forget the conversations' caches."""
        self._commands.put(Engine.clear)

    def close(self) -> None:
        """Free the model."""
        self.cancel()
        self._commands.put(None)
        self._thread.join(CLOSE_LIMIT_S)

    def _live(
        self, options: SessionOptions, progress: LoadProgress, loaded: queue.SimpleQueue[BaseException | None]
    ) -> None:
        """The thread's life: load, then answer until the session is closed."""
        try:
            os.environ[FAST_SYNC] = str(int(options.fast_sync))  # which MLX reads when it first computes
            prepare_device(options.samples)
            folder, config = options.checkpoint, load_config(options.checkpoint)
            model = load_share(folder, config, options.dtype, progress=progress, strategy=options.strategy)
            blocks = None
            if options.cache_dir is not None:
                mark = fingerprint(folder, config)
                blocks = open_blocks(options.cache_dir, options.cache_disk_bytes, model, mark, warn=LOG.warning)
            if options.samples:
                samplers()
            self._engine = Engine(
                model,
                speculate=options.speculate,
                constrain=Grammars(folder, config.vocab_size).constrain,
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
            for number, event in events:
                if isinstance(event, Finished | EngineError):
                    self._end(number, event)
                else:
                    self._delivers[number](event)

    def _abandon(self, engine: Engine, error: Exception) -> None:
        """A step has failed: so have all requests that the engine knew, and the caches are gone."""
        LOG.exception("a step has failed")
        self._stumble = time.monotonic(), f"the last step failed: {type(error).__name__}: {error}"
        engine.abandon()
        told = StepError(f"a step of the model failed: {error}", "ask again; a shorter prompt needs less")
        for number in list(self._known):
            self._end(number, told)

    def _add(self, engine: Engine, number: int, request: Request) -> None:
        try:
            engine.add(number, request)
            self._known.add(number)
        except EngineError as error:
            self._end(number, error)

    def _end(self, number: int, event: Event | BaseException) -> None:
        self._known.discard(number)
        deliver = self._delivers.pop(number)
        deliver(event)

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._failure = error
            delivers, self._delivers = self._delivers, {}
        for deliver in delivers.values():
            deliver(error)
