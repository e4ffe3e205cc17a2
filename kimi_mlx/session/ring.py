"""A session on a ring of ranks. A lost ring is restarted, and its unfinished requests resume."""

from __future__ import annotations

import itertools
import queue
import random
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from kimi_mlx.cluster.channel.messages import Message, decode_error
from kimi_mlx.cluster.ring.ring import FRONT_SILENCE_S, Ring
from kimi_mlx.engine.batch_sizes import NO_STEPS, BatchSizes
from kimi_mlx.engine.events import (
    Encoded,
    Event,
    Finished,
    Interrupted,
    Logprobs,
    Prefilled,
    PromptLogprobs,
    Resumed,
    Statistics,
    Token,
)
from kimi_mlx.engine.prompt_cache.usage import CacheUsage
from kimi_mlx.engine.request import Request
from kimi_mlx.errors import EngineError, KimiMlxError, RingError, SshError, WeightsError
from kimi_mlx.model.expert_stats import ExpertStats
from kimi_mlx.parallel.all_reduce_choice import AllReduceChoice
from kimi_mlx.runtime.tokenizer_files import unpack_tokenizer_files
from kimi_mlx.session.image_upload import ImageUploader
from kimi_mlx.session.job import Job
from kimi_mlx.session.restart_policy import RESTARTABLE, RestartPolicy
from kimi_mlx.session.session import (
    DraftStatus,
    EventCallback,
    RankMemory,
    RankProgress,
    Restart,
    SessionOptions,
    SessionStatus,
    stream_events,
)
from kimi_mlx.sizing.experts import ExpertBudget

MAX_RESTART_LOG = 20
"""Maximum number of restarts that a status has."""

BUG_HINT = "this is a bug in kimi-mlx: please report it"


class RingSession:
    """The engine on a ring. This process only exchanges messages with the ranks, so it survives the loss of one.

    A thread reads the ring's messages. If a rank is lost, this thread ends the other ranks, restarts the ring, and
    resends the unfinished requests; the tokens that callers already have become part of the prompts.

    Args:
        options: model, hosts and options.
        progress: callback for loading the weights at the first start.

    Raises:
        KimiMlxError: the ring cannot be started, or the model cannot be loaded. No rank is left running.
    """

    def __init__(self, options: SessionOptions, progress: RankProgress = lambda done, total, rank: None):
        self._options = options
        self._cluster = options.effective_cluster
        if options.folder is not None:
            # Imported here because both import MLX, which is needed only to check a checkpoint on this machine.
            from kimi_mlx.model.config import load_config
            from kimi_mlx.runtime.load import check_placement

            check_placement(options.folder, load_config(options.folder), self._cluster.size, options.strategy)
        self._is_closing = threading.Event()
        self._ring = Ring(self._cluster, options.timeouts, is_over=self._is_closing)
        self._uploader = ImageUploader(self._ring)
        self._uploads: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._policy = RestartPolicy(options.max_restarts)
        self._request_ids = itertools.count(1)
        self._jobs: dict[int, Job] = {}
        self._lock = threading.RLock()  # reentrant: a signal handler may cancel while its thread holds the lock
        self._is_up = False
        self._up_since = time.monotonic()
        self._context = self._num_restarts = self._cached_tokens = 0
        self._image_error: EngineError | None = None
        self._last_step_at: float | None = None
        self._interruption: Interrupted | None = None
        self._failure: KimiMlxError | None = None
        self._received_folder: Path | None = None
        self.all_reduce: AllReduceChoice | None = None
        """Choice of all-reduce that the ranks measured when they first started."""
        self.peak_memory_bytes = [0] * self._cluster.size
        """Peak memory of each rank, as MLX counts it, reported with its last finished request."""
        self._batch_sizes = NO_STEPS
        self._drafts = DraftStatus() if options.max_drafted else None
        self._loaded_memory = [RankMemory()] * self._cluster.size
        self._cache_usage = [CacheUsage()] * self._cluster.size
        self._earlier_cache_usage = list(self._cache_usage)  # of the rings before this one
        self._experts: dict[int, ExpertStats] = {}
        self._earlier_experts: dict[int, ExpertStats] = {}
        self._restart_log: deque[Restart] = deque(maxlen=MAX_RESTART_LOG)
        try:
            self._start(progress, needs_tokenizer_files=options.folder is None)
        except BaseException:
            self._ring.close()
            raise
        self._is_up = True
        self._thread = threading.Thread(target=self._supervise, daemon=True)
        self._thread.start()
        threading.Thread(target=self._send_uploads, daemon=True).start()

    @property
    def pids(self) -> list[int]:
        """Process ids of the ranks, each on its own host."""
        return self._ring.pids

    @property
    def context(self) -> int:
        """Maximum number of tokens of a sequence."""
        return self._context

    @property
    def image_error(self) -> EngineError | None:
        """Error for requests with images if the model does not see images, with reason and remedy; None if it does."""
        return self._image_error

    @property
    def tokenizer_folder(self) -> Path:
        """Folder with the checkpoint's configuration and tokenizer: our own, or the copy that rank 0 sent."""
        return self._options.checkpoint if self._received_folder is None else self._received_folder

    def generate(self, request: Request) -> Iterator[Event]:
        """Answer a request. Closing the iterator cancels it. Safe to call from several threads.

        Raises:
            RingError: a rank was lost, and the ring could not be restarted.
            KimiMlxError: the ranks refuse the request.
        """
        return stream_events(self, request)

    def submit(self, request: Request, on_event: EventCallback) -> int:
        """Answer a request; return its id."""
        if request.sampling.temperature > 0 and request.sampling.seed is None:
            # Choose the seed here, so that the answer stays the same after a restart.
            request = replace(request, sampling=replace(request.sampling, seed=random.getrandbits(63)))
        job = Job(next(self._request_ids), request, on_event)
        line = job.encode()  # outside the lock: this takes long for a long prompt
        with self._lock:
            if self._failure is not None:
                on_event(self._failure)
                return job.request_id
            self._jobs[job.request_id] = job
            if self._is_up:
                self._start_job(job, line)
            elif self._interruption is not None:
                on_event(self._interruption)
        return job.request_id

    def cancel(self, request_id: int) -> None:
        """Cancel a request; it stops within a step."""
        if (job := self._jobs.get(request_id)) is not None:
            self._cancel_job(job)

    def cancel_all(self) -> None:
        """Cancel all unfinished requests. Safe in a signal handler."""
        for job in list(self._jobs.values()):
            self._cancel_job(job)

    def status(self) -> SessionStatus:
        """Return the current status. This takes no lock, so a restart never delays it."""
        failure, interruption, is_up, last_step_at = self._failure, self._interruption, self._is_up, self._last_step_at
        reason = None if failure is None else failure.message
        if reason is None and not is_up and interruption is not None:
            reason = interruption.reason
        are_running = [job.is_running for job in list(self._jobs.values())]
        return SessionStatus(
            is_up=is_up and failure is None,
            reason=reason,
            active=sum(are_running),
            waiting=len(are_running) - sum(are_running),
            last_step_age_s=None if last_step_at is None else time.monotonic() - last_step_at,
            restarts=self._num_restarts,
            cached_tokens=self._cached_tokens,
            memory=tuple(
                replace(memory, peak_memory_bytes=peak or None)
                for memory, peak in zip(self._loaded_memory, self.peak_memory_bytes, strict=True)
            ),
            restart_log=tuple(self._restart_log),
            batch_sizes=self._batch_sizes,
            activity=self._ring.activity,
            all_reduce=None if self.all_reduce is None else str(self.all_reduce),
            cache_usage=tuple(self._cache_usage),
            drafts=self._drafts,
            experts=dict(self._experts),
        )

    def reset(self) -> None:
        """Drop the KV caches of all ranks. A ring that is being restarted has none."""
        with self._lock:
            if self._is_up:
                self._ring.send("reset")

    def close(self) -> None:
        """Cancel all requests, and end the ranks. Wait until they have released their memory."""
        self.cancel_all()  # the ranks then store the sequences in the prompt cache on disk
        self._is_closing.set()
        self._uploads.put(None)
        self._thread.join()  # the thread ends the ranks before it returns, and has a time limit for each

    # Commands to the ranks.

    def _start(self, progress: RankProgress, *, needs_tokenizer_files: bool) -> None:
        """Start the ranks and wait until each has loaded its share."""
        options = self._options
        self._ring.start(
            folder=None if options.folder is None else str(options.folder),
            model=options.model,
            dtype=options.dtype,
            strategy=options.strategy,
            speculate=options.max_drafted,
            draft_folder=None if options.draft is None else str(options.draft),
            draft_name=options.draft_name,
            check_every=options.check_every,
            needs_tokenizer_files=needs_tokenizer_files,
            cache_dir=None if options.cache_dir is None else str(options.cache_dir),
            cache_disk_bytes=options.cache_disk_bytes,
            cache_memory_bytes=options.cache_memory_bytes,
            expert_memory=str(options.expert_memory),
        )
        loading_ranks = set(range(self._cluster.size))
        for rank, message in self._ring.messages():
            if message["kind"] == "loading":
                progress(message["done"], message["total"], rank)
            elif message["kind"] == "tokenizer_files":
                self._received_folder = unpack_tokenizer_files(message["files"])
            elif message["kind"] == "ready":
                self._context = int(message["context"])
                error = message["image_error"]
                self._image_error = None if error is None else EngineError(*error)
                choice = message["all_reduce"]
                budget = message["expert_budget"]
                if budget is not None:
                    self._ring.allow_slow_steps()
                self.all_reduce = self.all_reduce or (choice and AllReduceChoice.from_dict(choice))
                self._loaded_memory[rank] = RankMemory(
                    message["memory_bytes"],
                    message["free_bytes"],
                    expert_budget=budget and ExpertBudget.from_dict(budget),
                )
                self._set_usage(rank, message)
                loading_ranks.discard(rank)
            if not loading_ranks:
                return

    def _start_job(self, job: Job, line: bytes) -> None:
        """Send a request to the ranks; one with images is queued until rank 0 has their patches."""
        if job.request.images and self._image_error is None:  # otherwise the ranks refuse it
            self._uploads.put(job)
        else:
            self._send_job(job, line)

    def _send_uploads(self) -> None:
        """Run the thread that sends requests with images."""
        while (job := self._uploads.get()) is not None:
            try:
                self._upload(job)
            except Exception as bug:  # the caller must not wait forever
                with self._lock:
                    if job.request_id in self._jobs:
                        self._end_job(job, EngineError(f"cannot send the images of a request: {bug!r}", hint=BUG_HINT))

    def _upload(self, job: Job) -> None:
        """Send the patches of a request's images, then the request.

        If the ring is lost meanwhile, stop: `_resume` queues the request again.
        """
        uploader = self._uploader

        def is_over() -> bool:
            is_current = self._is_up and self._uploader is uploader and not self._is_closing.is_set()
            return not is_current or job.is_sent or job.request_id not in self._jobs

        line = job.encode()
        has_patches = uploader.upload(job.request.images, is_over)
        with self._lock:
            if not is_over():
                self._send_job(job, line)
            elif has_patches:
                uploader.release(job.request.images)

    def _send_job(self, job: Job, line: bytes) -> None:
        job.pending_ranks = set(range(self._cluster.size))
        job.outcome = None
        job.is_running = False
        job.is_sent = True
        self._ring.write(line)
        if job.is_cancelled:
            self._cancel_job(job)

    def _cancel_job(self, job: Job) -> None:
        job.is_cancelled = True
        with self._lock:
            if self._is_up and job.is_sent:
                self._ring.send("cancel", request_id=job.request_id)
            elif job.request_id in self._jobs:
                self._end_job(job, job.finish_event("cancelled"))

    # The thread that reads the ring.

    def _supervise(self) -> None:
        """Run the thread. Every caller gets a final event, even after a bug."""
        try:
            error = self._read_messages()
        except Exception as bug:  # callers must not wait forever
            error = RingError(f"the session failed: {bug!r}", hint=BUG_HINT)
        self._fail(error)

    def _read_messages(self) -> KimiMlxError:
        """Read messages, and restart the ring when it is lost; return the error that ends the session."""
        while not self._is_closing.is_set():
            try:
                for rank, message in self._ring.messages():
                    self._on_message(rank, message)
            except (*RESTARTABLE, WeightsError) as error:  # an expert that could not be read: the disk may be back
                if (final_error := self._recover(error)) is not None:
                    return final_error
            except KimiMlxError as error:
                return error
        return RingError("the session is closed")

    def _on_message(self, rank: int, message: Message) -> None:
        job = self._jobs.get(message.get("request_id", -1))
        if job is None:
            return
        kind = message["kind"]
        self._last_step_at, job.is_running = time.monotonic(), True
        if rank == 0 and kind == "encoded":
            job.on_event(Encoded(message["image"], message["num_images"], message["done"], message["total"]))
        elif rank == 0 and kind == "prefilled":
            job.on_event(Prefilled(message["done"], message["total"]))
        elif rank == 0 and kind == "prompt_logprobs":
            logprobs = (Logprobs(token, tuple(map(tuple, top))) for token, top in message["tokens"])
            self._on_prompt_logprobs(job, PromptLogprobs(message["start"], tuple(logprobs)))
        elif rank == 0 and kind == "token":
            self._on_token(job, message)
        elif kind in ("finished", "refused"):
            self._on_end(job, rank, message)

    def _on_prompt_logprobs(self, job: Job, event: PromptLogprobs) -> None:
        job.next_logprob = event.start + len(event.tokens)
        job.on_event(event)

    def _on_token(self, job: Job, message: Message) -> None:
        self._policy.record_progress()
        job.first_token_at = job.first_token_at or time.perf_counter()
        job.sent_ids.append(message["id"])
        values = message["logprobs"]
        logprobs = None if values is None else Logprobs(values["token"], tuple(map(tuple, values["top"])))
        job.on_event(Token(message["id"], logprobs))

    def _on_end(self, job: Job, rank: int, message: Message) -> None:
        """Record that one rank has finished a request; the outcome of rank 0 is delivered after the last one."""
        is_refused = message["kind"] == "refused"
        job.pending_ranks.discard(rank)
        if not is_refused:
            self._cached_tokens = message["cached_tokens"]
            self._batch_sizes = BatchSizes(**message["batch_sizes"])
            self._set_usage(rank, message)
            self.peak_memory_bytes[rank] = message["statistics"]["peak_memory_bytes"]
            job.rank_statistics[rank] = Statistics.from_dict(message["statistics"])
        if rank == 0 and is_refused:
            job.outcome = decode_error(message)
        elif rank == 0:
            statistics = job.rank_statistics[0]
            job.outcome = job.finish_event(message["reason"], statistics)
            if self._drafts is not None:
                self._drafts = self._drafts.after(statistics)
        if not job.pending_ranks and (outcome := job.outcome_of_ranks()) is not None:
            with self._lock:
                self._end_job(job, outcome)

    def _set_usage(self, rank: int, message: Message) -> None:
        """Update a rank's use of its prompt cache and its experts, which includes that of the rings before this one."""
        usage = CacheUsage.from_dict(message["cache_usage"])
        self._cache_usage[rank] = usage.with_earlier(self._earlier_cache_usage[rank])
        if message["experts"] is not None:
            experts = ExpertStats(**message["experts"])
            self._experts[rank] = experts.with_earlier(self._earlier_experts.get(rank, ExpertStats()))

    def _recover(self, error: KimiMlxError) -> KimiMlxError | None:
        """Restart the ring and resume the unfinished requests; return the last error if that fails."""
        with self._lock:
            self._is_up = False
            self._uploader.close()
            for job in self._jobs.values():
                job.is_sent = False
            for job in list(self._jobs.values()):
                if (outcome := job.outcome_if_complete(self._context)) is not None:
                    self._end_job(job, outcome)
        self._earlier_cache_usage, self._earlier_experts = list(self._cache_usage), dict(self._experts)
        self._cached_tokens = 0
        lost_at = time.monotonic()
        self._restart_log.append(Restart(time.time(), error.message))
        self._policy.record_loss(lost_at - self._up_since)
        while (attempt := self._policy.next_attempt(error.message)) is not None:
            self._interruption = attempt
            for job in list(self._jobs.values()):
                job.on_event(attempt)
            self._ring.close()
            if self._is_closing.wait(attempt.wait_s):
                return error
            try:
                self._start(lambda done, total, rank: None, needs_tokenizer_files=False)
            except RESTARTABLE as next_error:
                error = next_error
                continue
            except KimiMlxError as next_error:
                if not isinstance(error, WeightsError):
                    return next_error
                continue  # a disk that was lost may be back at the next attempt
            self._resume(time.monotonic() - lost_at)
            return None
        if isinstance(error, WeightsError):  # its hint is about the file or the disk
            return WeightsError(error.message, f"{error.hint}; then start kimi-mlx again", error.rank)
        return error

    def _resume(self, downtime_s: float) -> None:
        """Send the unfinished requests to the restarted ring."""
        self._up_since = time.monotonic()
        self._num_restarts += 1
        self._restart_log[-1] = replace(self._restart_log[-1], downtime_s=downtime_s)
        self._uploader = ImageUploader(self._ring)
        lines: dict[int, bytes] = {}
        while True:
            with self._lock:
                jobs = list(self._jobs.values())
                if all(job.request_id in lines for job in jobs):
                    self._is_up = True
                    for job in jobs:
                        job.was_interrupted = True
                        job.on_event(Resumed(downtime_s))
                        self._start_job(job, lines[job.request_id])
                    return
            # Outside the lock: this takes long for long prompts. Requests may be added or cancelled meanwhile.
            lines |= {job.request_id: job.encode() for job in jobs if job.request_id not in lines}

    def _fail(self, error: KimiMlxError) -> None:
        """End the ring and every unfinished request with this error."""
        self._ring.close()
        hint = error.hint
        if unconfirmed_hosts := self._ring.unconfirmed_hosts:
            hint = (
                f"{hint or 'try again'}; could not check that all ranks on {', '.join(unconfirmed_hosts)} have ended: "
                f"they end on their own after {FRONT_SILENCE_S:.0f} s without contact"
            )
        if isinstance(error, SshError) or unconfirmed_hosts:  # callers see one kind of error, whatever the cause
            error = RingError(error.message, hint, error.rank)
        with self._lock:
            self._failure = error
            for job in list(self._jobs.values()):
                self._end_job(job, error)

    def _end_job(self, job: Job, outcome: Finished | KimiMlxError) -> None:
        del self._jobs[job.request_id]
        if job.is_sent and self._image_error is None:
            self._uploader.release(job.request.images)
        job.on_event(outcome)
