"""Prepare requests outside of the event loop: parse, render, tokenize, and build grammars.

Python code in one thread delays all other threads of its process, including the engine and the streams. So this process
prepares only short bodies without images, which take some milliseconds each; others go to worker processes. A short
request does not wait for long ones.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import TypeVar

import anyio
import anyio.to_process
import anyio.to_thread

from kimi_mlx.server.errors import ApiError
from kimi_mlx.server.large_results import PackedResult, pack, unpack
from kimi_mlx.server.prompts import PromptBuilder
from kimi_mlx.temporary import temporary_folder

LOG = logging.getLogger(__name__)

SHORT_BODY_BYTES = 8_000
"""Largest body that is prepared in this process."""

MEDIA_TYPE = re.compile(rb'"(?:image|image_url|input_image|video_url)"|\\u00[567]')
"""Type of a part with an image or a video, in the JSON text of a body, or an escaped letter, which may hide one."""

NUM_THREADS = 2
"""Maximum number of short bodies that are prepared at once."""

NUM_PROCESSES = 2
"""Maximum number of worker processes, each with a tokenizer of its own."""

LIMIT_S = 60.0
"""Time limit for the preparation in a worker process; a process that exceeds it is ended."""

Result = TypeVar("Result")
Work = Callable[[PromptBuilder, bytes], Result]
"""Prepares a request from its body. It can be pickled, and so can its result and its errors."""


class Preparation:
    """Runs the preparation of requests in threads and processes.

    Args:
        prompt_builder: builder of the engine's requests.
    """

    def __init__(self, prompt_builder: PromptBuilder):
        self._prompt_builder = prompt_builder
        self._processes = asyncio.Semaphore(NUM_PROCESSES)

    async def run(self, work: Work[Result], body: bytes, fetched: Mapping[str, bytes] | None = None) -> Result:
        """Return the result of the work.

        Args:
            work: function that prepares the request.
            body: body of the request.
            fetched: contents of the URLs of images that have been fetched for the request.

        Raises:
            ApiError: the request is invalid, or its preparation takes too long.
            MissingMediaError: URLs of images must be fetched first.
        """
        prompt_builder = self._prompt_builder
        if len(body) <= SHORT_BODY_BYTES and not fetched and not self._may_have_images(body):
            return await anyio.to_thread.run_sync(work, prompt_builder, body, limiter=self._threads)
        return await self._run_in_process(work, replace(prompt_builder, fetched=fetched or {}), body)

    def _may_have_images(self, body: bytes) -> bool:
        """Return whether a body may have images that the model sees: a small file may have very many pixels."""
        return self._prompt_builder.text_only_reason is None and MEDIA_TYPE.search(body) is not None

    async def start_worker(self) -> None:
        """Start a worker process, so that the first long request does not wait for its start."""
        try:
            await self._run_in_process(_do_nothing, self._prompt_builder, b"")
        except ApiError as error:
            LOG.warning("cannot start a worker process: %s", error.log_text)

    async def _run_in_process(self, work: Work[Result], prompt_builder: PromptBuilder, body: bytes) -> Result:
        async with self._processes:
            try:
                with anyio.fail_after(LIMIT_S):
                    try:
                        return await self._run_in_worker(work, prompt_builder, body)
                    except anyio.BrokenWorkerProcess:  # it may have ended while it was idle
                        return await self._run_in_worker(work, prompt_builder, body)
            except TimeoutError as error:
                message = f"preparing the request takes more than {LIMIT_S:.0f} s; send less"
                raise ApiError(400, message, "invalid_value") from error
            except anyio.BrokenWorkerProcess as error:
                hint = "the process that prepared it has ended; there may be too little memory"
                raise ApiError(503, "the request could not be prepared; try again", "unavailable", hint=hint) from error

    async def _run_in_worker(self, work: Work[Result], prompt_builder: PromptBuilder, body: bytes) -> Result:
        with temporary_folder("request-") as folder:
            path = folder.path / "arrays"
            packed = await anyio.to_process.run_sync(
                _run_in_worker, work, prompt_builder, body, path, cancellable=True, limiter=self._workers
            )
            return unpack(packed, path)

    @cached_property
    def _threads(self) -> anyio.CapacityLimiter:
        return anyio.CapacityLimiter(NUM_THREADS)

    @cached_property
    def _workers(self) -> anyio.CapacityLimiter:
        return anyio.CapacityLimiter(NUM_PROCESSES)


def _run_in_worker(work: Work[object], prompt_builder: PromptBuilder, body: bytes, path: Path) -> PackedResult:
    _discard_stderr()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all processes; the server handles it
    result = work(prompt_builder, body)
    try:
        return pack(result, path)
    except OSError as error:
        message = "the images could not be prepared; try again later"
        raise ApiError(503, message, "unavailable", hint=f"cannot write `{path}`: {error.strerror}") from error


@cache
def _discard_stderr() -> None:
    """Discard what libraries write to stderr in this worker process: nobody reads that pipe, and a full one blocks."""
    with Path(os.devnull).open("wb") as file:
        os.dup2(file.fileno(), 2)


def _do_nothing(prompt_builder: PromptBuilder, body: bytes) -> None:
    pass
