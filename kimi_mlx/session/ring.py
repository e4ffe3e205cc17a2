"""A session on a ring of ranks that may be lost: it is started again, and unfinished requests go on where they were."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import random
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from kimi_mlx.cluster.ring.messages import Message, decode_error, encode
from kimi_mlx.cluster.ring.ring import FRONT_SILENCE_S, Ring
from kimi_mlx.engine.request import (
    Event,
    Finished,
    FinishReason,
    Interrupted,
    Logprobs,
    Prefilled,
    Request,
    Resumed,
    Statistics,
    Token,
)
from kimi_mlx.errors import KimiMlxError, RingError, SshError
from kimi_mlx.files import write_atomically
from kimi_mlx.folders import cache_folder
from kimi_mlx.parallel.sum_choice import SumChoice
from kimi_mlx.session.session import EventCallback, RankProgress, SessionOptions, SessionStatus, stream_events
from kimi_mlx.store.sources import is_small

BACK_OFF_S = (1.0, 10.0, 30.0)
"""Before the first start again, the second, and all later ones."""

STEADY_S = 600.0
"""A ring that stood so long is worth all starts again."""

CLOSE_LIMIT_S = 30.0
"""For ending all ranks, on hosts that do not answer, too."""


@dataclass
class _Job:
    """A request that is not finished.

    Args:
        request_id: of the request.
        request: as it was asked.
        on_event: to whoever asked.
        sent: the tokens that were delivered.
        waiting: ranks that have not finished it.
        outcome: what the leader said in the end, held back until all ranks are idle.
    """

    request_id: int
    request: Request
    on_event: EventCallback
    sent: list[int] = field(default_factory=list)
    waiting: set[int] = field(default_factory=set)
    outcome: Finished | KimiMlxError | None = None
    is_cancelled: bool = False
    was_interrupted: bool = False
    is_begun: bool = False
    asked_at: float = field(default_factory=time.perf_counter)
    first_token_at: float = 0.0

    def rest(self) -> Request:
        """What is still to be asked after the tokens that were sent."""
        wanted = self.request.max_tokens
        left = None if wanted is None else wanted - len(self.sent)
        prompt, answered = (*self.request.prompt, *self.sent), self.request.answered + len(self.sent)
        return replace(self.request, prompt=prompt, max_tokens=left, answered=answered)

    def line(self) -> bytes:
        """The message that asks for it."""
        return encode("request", request_id=self.request_id, request=self.rest().to_dict())

    def end(self, context: int) -> Finished | KimiMlxError | None:
        """The end of the answer, if nothing is left to ask: the ring was lost between the last token and the end.

        Args:
            context: how many tokens the model can hold.
        """
        if self.outcome is not None:
            return self.outcome
        reason = self._reason_to_end(context)
        return None if reason is None else self.finish(reason)

    def _reason_to_end(self, context: int) -> FinishReason | None:
        if self.sent and self.sent[-1] in self.request.stop_ids:
            return "stop"
        if len(self.sent) == self.request.max_tokens or len(self.request.prompt) + len(self.sent) >= context:
            return "length"
        return "cancelled" if self.is_cancelled else None

    def finish(self, reason: FinishReason, statistics: Statistics | None = None) -> Finished:
        """The end, with figures of the whole if parts of it were computed on several rings."""
        if statistics is not None and not self.was_interrupted:
            return Finished(reason, statistics)
        now = time.perf_counter()
        first = self.first_token_at or now
        cached, peak = (0, 0) if statistics is None else (statistics.cached_tokens, statistics.peak_memory_bytes)
        prompt = len(self.request.prompt)
        figures = Statistics(prompt, min(cached, prompt), len(self.sent), first - self.asked_at, now - first, peak)
        return Finished(reason, figures)


class RingSession:
    """The engine on a ring; this process only talks to the ranks, and outlives them.

    A thread listens to the ring. When a rank is lost it ends the others, starts all again, and asks anew for what is
    left of each unfinished request.

    Args:
        options: what to run, and where.
        progress: of the first load.

    Raises:
        KimiMlxError: the ring does not come to stand, or the model cannot be loaded; nothing is left of it then.
    """

    def __init__(self, options: SessionOptions, progress: RankProgress = lambda done, total, rank: None):
        self._options = options
        self._cluster = options.effective_cluster
        if options.folder is not None:
            from kimi_mlx.model.config import load_config
            from kimi_mlx.runtime.load import check_placement

            # fails before anything is started
            check_placement(options.folder, load_config(options.folder), self._cluster.size, options.strategy)
        self._is_closing = threading.Event()
        self._ring = Ring(self._cluster, options.timeouts, is_over=self._is_closing)
        self._request_ids = itertools.count(1)
        self._jobs: dict[int, _Job] = {}
        self._lock = threading.RLock()  # a signal handler may cancel while its thread holds it
        self._is_up = False
        self._context = 0
        self._up_since = time.monotonic()
        self._lost = self._restarted = self._cached_tokens = 0
        self._stepped_at: float | None = None
        self._interruption: Interrupted | None = None
        self._failure: KimiMlxError | None = None
        self._text: Path | None = None
        self.all_reduce: SumChoice | None = None
        """How the ranks make their sums, as they measured when they first started."""
        self.peak_memory_bytes = [0] * self._cluster.size
        """Of each rank, as MLX counts it, in the last request that it has finished."""
        try:
            self._start(progress, needs_tokenizer_files=options.folder is None)
        except BaseException:
            self._ring.close()
            raise
        self._is_up = True
        self._thread = threading.Thread(target=self._supervise, daemon=True)
        self._thread.start()

    @property
    def pids(self) -> list[int]:
        """Process ids of the ranks, each on its host."""
        return self._ring.pids

    @property
    def context(self) -> int:
        """Tokens that a sequence may have."""
        return self._context

    @property
    def tokenizer_folder(self) -> Path:
        """Where the checkpoint's configuration and tokenizer are: ours, or what rank 0 has sent of its own."""
        return self._options.checkpoint if self._text is None else self._text

    def generate(self, request: Request) -> Iterator[Event]:
        """Answer a request; breaking off the iteration cancels it. May be called from several threads.

        Raises:
            RingError: a rank was lost, and the ring could not be started again.
            KimiMlxError: the ranks refuse the request.
        """
        return stream_events(self, request)

    def submit(self, request: Request, on_event: EventCallback) -> int:
        """Answer a request; returns its request_id."""
        if request.sampling.temperature > 0 and request.sampling.seed is None:
            # drawn here, so that an answer goes on alike after a start anew
            request = replace(request, sampling=replace(request.sampling, seed=random.getrandbits(63)))
        job = _Job(next(self._request_ids), request, on_event)
        line = job.line()  # takes long for long prompts: others have the lock meanwhile
        with self._lock:
            if self._failure is not None:
                on_event(self._failure)
                return job.request_id
            self._jobs[job.request_id] = job
            if self._is_up:
                self._ask(job, line)
            elif self._interruption is not None:
                on_event(self._interruption)
        return job.request_id

    def cancel(self, request_id: int) -> None:
        """Ask a request to stop soon."""
        if (job := self._jobs.get(request_id)) is not None:
            self._cancel(job)

    def cancel_all(self) -> None:
        """Ask the running requests to stop; safe from a signal handler."""
        for job in list(self._jobs.values()):
            self._cancel(job)

    def status(self) -> SessionStatus:
        """How it is getting on."""
        with self._lock:
            reason = self._failure.message if self._failure is not None else None
            if reason is None and not self._is_up and self._interruption is not None:
                reason = self._interruption.reason
            begun = sum(job.is_begun for job in self._jobs.values())
            age = None if self._stepped_at is None else time.monotonic() - self._stepped_at
            is_up = self._is_up and self._failure is None
            waiting = len(self._jobs) - begun
            return SessionStatus(is_up, reason, begun, waiting, age, self._restarted, self._cached_tokens)

    def reset(self) -> None:
        """Forget the conversation's cache on every rank; a ring that is being started has none."""
        with self._lock:
            if self._is_up:
                self._ring.send("reset")

    def close(self) -> None:
        """End the ranks."""
        self._is_closing.set()
        self._thread.join(CLOSE_LIMIT_S)  # which ends the ranks

    def _cancel(self, job: _Job) -> None:
        job.is_cancelled = True
        with self._lock:
            if self._is_up:
                self._ring.send("cancel", request_id=job.request_id)
            elif job.request_id in self._jobs:
                self._end(job, job.finish("cancelled"))

    def _ask(self, job: _Job, line: bytes) -> None:
        job.waiting = set(range(self._cluster.size))
        job.outcome = None
        job.is_begun = False
        self._ring.write(line)
        if job.is_cancelled:
            self._cancel(job)

    def _start(self, progress: RankProgress, *, needs_tokenizer_files: bool) -> None:
        """Start the ranks and wait until each has loaded its share."""
        options = self._options
        self._ring.start(
            folder=None if options.folder is None else str(options.folder),
            model=options.model,
            dtype=options.dtype,
            strategy=options.strategy,
            has_sampling=options.has_sampling,
            speculate=options.speculate,
            check_every=options.check_every,
            needs_tokenizer_files=needs_tokenizer_files,
            cache_dir=None if options.cache_dir is None else str(options.cache_dir),
            cache_disk_bytes=options.cache_disk_bytes,
            cache_memory_bytes=options.cache_memory_bytes,
        )
        waiting = set(range(self._cluster.size))
        for rank, message in self._ring.messages():
            if message["kind"] == "loading":
                progress(message["done"], message["total"], rank)
            elif message["kind"] == "text":
                self._keep_text(message["files"])
            elif message["kind"] == "ready":
                self._context = int(message["context"])
                self.all_reduce = self.all_reduce or (
                    message["all_reduce"] and SumChoice.from_dict(message["all_reduce"])
                )
                waiting.discard(rank)
            if not waiting:
                return

    def _keep_text(self, files: dict[str, str]) -> None:
        """Keep the files of the checkpoint's text side in the user's cache, under their own digest."""
        digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16]
        self._text = (cache_folder() or Path(tempfile.gettempdir())) / "text" / digest
        self._text.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            if Path(name).name != name or not is_small(name):
                raise RingError(f"rank 0 sent a file with the name {name!r}")
            write_atomically(self._text / Path(name).name, base64.b64decode(text))

    def _supervise(self) -> None:
        """The thread's work: whoever waits for an answer hears of its end, whatever it is."""
        try:
            final = self._listen()
        except Exception as error:  # the end of this thread
            final = RingError(f"the session failed: {error!r}", hint="this is a mistake of kimi-mlx: please report it")
        self._give_up(final)

    def _listen(self) -> KimiMlxError:
        """Listen to the ring, and start it again when it is lost, until the session is closed or it is given up."""
        while not self._is_closing.is_set():
            try:
                for rank, message in self._ring.messages():
                    self._hear(rank, message)
            except (RingError, SshError) as error:
                if (final := self._recover(error)) is not None:
                    return final
            except KimiMlxError as error:
                return error
        return RingError("the session is closed")

    def _recover(self, error: KimiMlxError) -> KimiMlxError | None:
        """Start again, several times; the last error if that is of no use."""
        with self._lock:
            self._is_up = False
            for job in list(self._jobs.values()):
                if (end := job.end(self._context)) is not None:
                    self._end(job, end)
        lost_at = time.monotonic()
        if lost_at - self._up_since > STEADY_S:
            self._lost = 0
        while self._lost < self._options.max_restarts:
            self._lost += 1
            wait_s = BACK_OFF_S[min(self._lost, len(BACK_OFF_S)) - 1]
            self._interruption = Interrupted(error.message, self._lost, self._options.max_restarts, wait_s)
            for job in list(self._jobs.values()):
                job.on_event(self._interruption)
            self._ring.close()
            if self._is_closing.wait(wait_s):
                return error
            try:
                self._start(lambda done, total, rank: None, needs_tokenizer_files=False)
            except (RingError, SshError) as found:
                error = found
                continue
            except KimiMlxError as found:
                return found
            self._resume(time.monotonic() - lost_at)
            return None
        return error

    def _resume(self, seconds: float) -> None:
        self._up_since = time.monotonic()
        self._restarted += 1
        with self._lock:
            self._is_up = True
            for job in list(self._jobs.values()):
                job.was_interrupted = True
                job.on_event(Resumed(seconds))
                self._ask(job, job.line())

    def _give_up(self, error: KimiMlxError) -> None:
        self._ring.close()
        hint = error.hint
        if unreached := self._ring.unreached:
            hint = (
                f"{hint or 'try again'}; {', '.join(unreached)} could not be asked whether all ended there: "
                f"ranks end by themselves after {FRONT_SILENCE_S:.0f} s without us"
            )
        if isinstance(error, SshError) or unreached:  # in the end it is the ring that is lost, whatever the cause
            error = RingError(error.message, hint, error.rank)
        with self._lock:
            self._failure = error
            for job in list(self._jobs.values()):
                self._end(job, error)

    def _hear(self, rank: int, message: Message) -> None:
        job = self._jobs.get(message.get("request_id", -1))
        if job is None:
            return
        kind = message["kind"]
        self._stepped_at, job.is_begun = time.monotonic(), True
        if rank == 0 and kind == "prefilled":
            job.on_event(Prefilled(message["done"], message["total"]))
        elif rank == 0 and kind == "token":
            self._lost = 0  # it goes on; a request that ends the ring again and again would not
            job.first_token_at = job.first_token_at or time.perf_counter()
            job.sent.append(message["id"])
            found = message["logprobs"]
            logprobs = None if found is None else Logprobs(found["token"], tuple(map(tuple, found["top"])))
            job.on_event(Token(message["id"], logprobs))
        elif kind in ("finished", "refused"):
            job.waiting.discard(rank)
            if kind == "finished":
                self._cached_tokens = message["cached_tokens"]
                self.peak_memory_bytes[rank] = message["statistics"]["peak_memory_bytes"]
            if rank == 0 and kind == "refused":
                job.outcome = decode_error(message)
            elif rank == 0:
                job.outcome = job.finish(message["reason"], Statistics.from_dict(message["statistics"]))
            if not job.waiting and job.outcome is not None:
                with self._lock:
                    self._end(job, job.outcome)

    def _end(self, job: _Job, outcome: Finished | KimiMlxError) -> None:
        del self._jobs[job.request_id]
        job.on_event(outcome)
