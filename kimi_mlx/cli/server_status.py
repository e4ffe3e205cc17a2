"""The status of a running server: read from it, and shown once or every second."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard, cast

from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from kimi_mlx.cli.api_keys import read_client_key
from kimi_mlx.cli.chat.output.live_region import is_terminal
from kimi_mlx.cli.chat.output.terminal_text import to_line
from kimi_mlx.cli.output import print_json, print_note, slow_status, stdout
from kimi_mlx.cli.status_tables import describe_ranks, facts_table, run_facts
from kimi_mlx.client.address import ServerAddress, parse_address
from kimi_mlx.client.http import HttpClient, MissingPathError
from kimi_mlx.client.local_servers import find_servers
from kimi_mlx.errors import ServerError
from kimi_mlx.model.expert_stats import ExpertStats
from kimi_mlx.session.model_status import ModelStatus
from kimi_mlx.units import format_bytes, format_count, format_duration, format_gib, format_rate, format_seconds

INTERVAL_S = 1.0
"""Interval of `--watch`."""

RETRY_HINT = "try again, and look at the log of the server"

MAX_ANSWERS = 20
"""Maximum number of answers that are shown; a screen has no room for more."""


def print_status(url: str | None, key_file: Path | None, *, is_json: bool) -> None:
    """Print the status of a server once.

    Args:
        url: address of the user; None for the newest server of this user on this machine.
        key_file: file with the API key; None for the environment's.
        is_json: whether to print the server's document.

    Raises:
        KimiMlxError: there is no server, or it refuses.
    """
    client = _client(url, key_file)
    with slow_status(is_json) as set_status:
        set_status(f"connecting to {client.address.url}")
        document = _read(client)
    if is_json:
        print_json(document)
    else:
        stdout.print(_describe(client.address, document, stdout.width), soft_wrap=False)


def watch_status(url: str | None, key_file: Path | None, *, is_json: bool) -> None:
    """Show the status of a server every second, also after it was restarted, until Ctrl-C.

    Args:
        url: address of the user; None for the newest server of this user on this machine.
        key_file: file with the API key; None for the environment's.
        is_json: whether to print the server's document as one line each time.

    Raises:
        KimiMlxError: there is no server, or it refuses, when this starts.
    """
    client = _client(url, key_file)
    if is_json:
        for document in _documents(client):
            print(json.dumps(document), flush=True)
        return
    if not is_terminal(stdout):
        for screen in _screens(client):
            stdout.print(screen, Text(), soft_wrap=False)
        return
    with Live(console=stdout, auto_refresh=False, vertical_overflow="ellipsis") as live:
        for screen in _screens(client):
            live.update(screen, refresh=True)


def _documents(client: HttpClient) -> Iterator[Mapping[str, Any]]:
    """Yield the document of a server every second, marked as down while the server cannot be reached."""
    document: Mapping[str, Any] = {}
    for result in _results(client):
        document = _as_down(document, result) if isinstance(result, ServerError) else result
        yield document


def _screens(client: HttpClient) -> Iterator[RenderableType]:
    """Yield the status for people every second: the last one that could be read, marked as down after an error."""
    readable: Mapping[str, Any] | None = None
    for result in _results(client):
        try:
            if isinstance(result, ServerError):
                raise result
            screen = _describe(client.address, result, stdout.width)
            readable = result
        except ServerError as error:
            if readable is None:
                screen = Text(to_line(f"{error.message}; {error.hint}"), style="red")
            else:
                screen = _describe(client.address, _as_down(readable, error), stdout.width)
        yield screen


def _as_down(document: Mapping[str, Any], error: ServerError) -> Mapping[str, Any]:
    return {**document, "is_up": False, "reason": error.message}


def _results(client: HttpClient) -> Iterator[Mapping[str, Any] | ServerError]:
    """Yield the document of a server, or the error, every second.

    Raises:
        ServerError: the first attempt fails.
    """
    result: Mapping[str, Any] | ServerError = _read(client)
    while True:
        yield result
        time.sleep(INTERVAL_S)
        try:
            result = _read(client)
        except ServerError as error:
            result = error


def _client(url: str | None, key_file: Path | None) -> HttpClient:
    """Return a client of the named server, or of the newest one on this machine."""
    if url is not None:
        return HttpClient(parse_address(url), read_client_key(key_file), RETRY_HINT)
    servers = find_servers()
    if not servers:
        hint = "start one with `kimi-mlx serve MODEL`, or name one: `kimi-mlx status http://mac-a:8080`"
        raise ServerError("no server of yours is running on this machine", hint=hint)
    for other in servers[1:]:
        print_note(f"also running: {other.model} at {other.url} (`kimi-mlx status {other.url}`)")
    return HttpClient(parse_address(servers[0].url), read_client_key(key_file), RETRY_HINT)


def _read(client: HttpClient) -> Mapping[str, Any]:
    url = client.address.url
    try:
        document: Any = client.get("/cluster")
    except MissingPathError:
        hint = "`kimi-mlx status` shows servers of kimi-mlx only"
        raise ServerError(f"{url} does not report the status of a cluster", hint=hint) from None
    if not _is_status(document):
        raise ServerError(f"{url} does not answer with a status of kimi-mlx", hint="check the address")
    return document


def _is_status(document: Any) -> TypeGuard[dict[str, Any]]:
    """Return whether a document comes from a server of kimi-mlx, of any version."""
    versions = cast("dict[str, Any]", document).get("versions") if isinstance(document, dict) else None
    return isinstance(versions, dict) and "kimi-mlx" in versions


def _describe(address: ServerAddress, document: Mapping[str, Any], width: int) -> RenderableType:
    """Return the status for people.

    Raises:
        ServerError: the document has another form.
    """
    try:
        status = ModelStatus.from_dict(document)
        parts: list[RenderableType] = [facts_table(_facts(address, status, document))]
        if status.ranks:
            parts += [Text(), describe_ranks(status.ranks, width, shows_activity=True)]
        parts += _answers(document.get("answers") or ())
        return Group(*parts, *_findings(status))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        hint = "install the same version of kimi-mlx on both machines"
        raise ServerError(f"the status of {address.url} cannot be read", hint=hint) from error


def _facts(address: ServerAddress, status: ModelStatus, document: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "model", status.model
    yield "server", address.url
    yield "state", "running" if status.is_up else f"not answering: {status.reason or 'unknown reason'}"
    for machine in status.machines:
        sizes = [(machine.memory_bytes, "memory"), (machine.gpu_limit_bytes, "for the GPU")]
        parts = [machine.chip, *(f"{format_gib(size)} {name}" for size, name in sizes if size)]
        parts.append(machine.macos_version and f"macOS {machine.macos_version}")
        parts += [f"{name} {version}" for name, version in machine.versions.items()]
        yield "host", f"{machine.name}: {', '.join(filter(None, parts))}"
    yield "placement", status.placement
    if status.link:
        yield "link", status.link
    if status.all_reduce:
        yield "all-reduce", status.all_reduce
    yield "context", f"{status.context_tokens:,} tokens"
    capacity = document.get("queue_capacity") or 0
    yield "requests", f"{status.active} running, {status.waiting} waiting (at most {capacity})"
    rates: Mapping[str, Any] = document.get("rates") or {}
    decode, prefill = (float(rates.get(name) or 0) for name in ("completion_tok_per_s", "prompt_tok_per_s"))
    yield "speed", f"{format_rate(decode)} generated, {format_rate(prefill)} read, in the last 10 s"
    yield from _cache_facts(status)
    if drafts := document.get("drafts"):
        yield "drafts", describe_drafts(drafts)
    if ranks := [rank.experts for rank in status.ranks if rank.experts is not None]:
        yield "experts", _describe_experts(ExpertStats.of_ranks(ranks))
    yield from run_facts(status)


def describe_drafts(drafts: Mapping[str, Any]) -> str:
    """Return whether tokens are drafted now, and how many draft tokens were accepted."""
    drafted, accepted = int(drafts["drafted_tokens"]), int(drafts["accepted_tokens"])
    state = f"off: {reason}" if (reason := drafts["off_reason"]) else "on"
    return f"{state}; {accepted / drafted:.0%} of {drafted:,} draft tokens accepted" if drafted else state


def _describe_experts(stats: ExpertStats) -> str:
    """Return the number of experts in memory, the hit rate, and the reads of the others."""
    kept = f"{stats.kept_experts:,} of {stats.num_experts:,} kept in memory"
    if stats.hit_rate is None:
        return kept
    guessed = f", {stats.guesses_right / stats.guesses:.0%} of guesses right" if stats.guesses else ""
    return (
        f"{kept}; hit rate {stats.hit_rate:.0%}, {format_bytes(stats.bytes_read)} read, waited "
        f"{format_seconds(stats.wait_seconds)} for reads{guessed}"
    )


def _cache_facts(status: ModelStatus) -> Iterator[tuple[str, str]]:
    """Yield the size of the prompt cache, and the number of prompt tokens that were found in it."""
    cache = status.prompt_cache
    yield "prompt cache", f"{status.cached_tokens:,} tokens in memory"
    if cache.has_disk:
        sizes = f"{format_bytes(cache.disk_bytes)} of {format_bytes(cache.disk_limit_bytes)}"
        yield "on disk", f"{format_count(cache.disk_blocks, 'block')}, {sizes}"
    if cache.hit_rate is not None:
        found = f"{cache.memory_hit_tokens:,} in memory"
        if cache.has_disk:
            found += f", {cache.disk_hit_tokens:,} on disk"
        yield "cache hits", f"{cache.hit_rate:.0%} of {cache.prompt_tokens:,} prompt tokens: {found}"


def _answers(answers: Sequence[Mapping[str, Any]]) -> Iterator[RenderableType]:
    """Yield the answers in progress, one line each, at most MAX_ANSWERS."""
    if answers:
        yield Text()
    for answer in answers[:MAX_ANSWERS]:
        text = {
            "waiting": "waiting",
            "prefill": f"reading {answer['processed_tokens']:,} of {answer['prompt_tokens']:,} tokens",
            "decode": f"prompt {answer['prompt_tokens']:,}, {format_count(answer['generated_tokens'], 'new token')}",
        }[answer["state"]]
        yield Text(f"request {format_duration(answer['age_s'])} ago: {text}")
    if len(answers) > MAX_ANSWERS:
        yield Text(f"and {len(answers) - MAX_ANSWERS} more")


def _findings(status: ModelStatus) -> Iterator[RenderableType]:
    """Yield problems and warnings of the checks before the start, with their remedies."""
    for finding in status.findings or ():
        if finding.state != "ok":
            remedy = f"; {finding.remedy}" if finding.remedy else ""
            style = "red" if finding.state == "problem" else "yellow"
            yield Text(to_line(f"{finding.state}: {finding.host}: {finding.message}{remedy}"), style=style)
