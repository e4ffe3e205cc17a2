"""The process of a rank: join the ring, load a share of the model, answer requests until standard input ends.

kimi_mlx.cluster starts it. It reads messages from standard input, and writes only messages to standard output.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from kimi_mlx.cluster.channel.messages import Message, encode, encode_error
from kimi_mlx.engine.constraint import Constraint
from kimi_mlx.engine.engine import MAX_NEW_COMMANDS, Engine
from kimi_mlx.engine.events import Encoded, Event, Finished, Prefilled, PromptLogprobs, Token
from kimi_mlx.engine.free_memory import free_memory_bytes
from kimi_mlx.engine.prompt_cache.block_store import BlockStore
from kimi_mlx.engine.request import Request
from kimi_mlx.errors import KimiMlxError, MissingModelError
from kimi_mlx.model.config import load_config
from kimi_mlx.model.decoder import Model
from kimi_mlx.parallel.all_reduce import tune_all_reduce
from kimi_mlx.parallel.communicator import RankCommunicator
from kimi_mlx.parallel.group import Group, barrier
from kimi_mlx.parallel.pipeline_communicator import PipelineCommunicator
from kimi_mlx.parallel.tune_split import tune_query_split
from kimi_mlx.rank.channel import Channel, run_rank
from kimi_mlx.rank.rendezvous import join_group
from kimi_mlx.runtime.draft import open_draft_model, warm_up_draft
from kimi_mlx.runtime.expert_memory import choose_expert_budget
from kimi_mlx.runtime.grammars import open_grammar_compiler
from kimi_mlx.runtime.load import compute_dtype, fingerprint, load_share, prepare_device
from kimi_mlx.runtime.prompt_cache import open_prompt_cache
from kimi_mlx.runtime.tokenizer_files import pack_tokenizer_files
from kimi_mlx.runtime.warm_up import warm_up
from kimi_mlx.sizing.expert_memory import ExpertMemory
from kimi_mlx.store.locate import find_local_model
from kimi_mlx.store.model_ref import resolve_model_name
from kimi_mlx.store.vision import no_vision_error


def main() -> None:
    """Run a rank."""
    run_rank(serve)


def serve(channel: Channel, start: Message) -> None:
    """Load the model, then execute commands and steps until the last command, the end."""
    prepare_device()
    group = join_group(channel, start)
    engine = load_engine(channel, start, group)
    while True:
        # All ranks take the same number of commands before a step: the step header contains rank 0's count.
        for _ in range(engine.num_new_commands(channel.num_consumed)):
            run_command(channel, engine, channel.next_command())
        if not engine.is_idle:
            run_step(channel, engine, is_leader=group.rank == 0)


def load_engine(channel: Channel, start: Message, group: Group) -> Engine:
    """Load this rank's share of the model; send `loading` and `ready`."""
    folder = _find_folder(start, group)
    channel.report_progress("load")
    if start["needs_tokenizer_files"] and group.rank == 0:
        channel.send("tokenizer_files", files=pack_tokenizer_files(folder))

    def report_layers(done: int, total: int) -> None:
        channel.exit_if_ending()
        channel.report_progress("load")
        channel.send("loading", done=done, total=total)

    config = load_config(folder)
    grammars = open_grammar_compiler(folder, config.vocab_size)
    budget = choose_expert_budget(
        ExpertMemory.parse(start["expert_memory"]),
        folder,
        config,
        start["dtype"],
        group,
        start["strategy"],
        cache_bytes=start["cache_memory_bytes"],
        num_local_ranks=start["cpu_slot"][1],
    )
    expert_memory = None if budget is None else budget.budget_bytes
    model = load_share(
        folder, config, start["dtype"], group, report_layers, start["strategy"], expert_memory=expert_memory
    )
    channel.interrupt = model.interrupt
    channel.cleanup.callback(model.close)
    channel.report_progress("load")
    choice = None
    if isinstance(model.communicator, RankCommunicator):
        model.communicator.check_every = start["check_every"]
        if not isinstance(model.communicator, PipelineCommunicator):
            choice = tune_all_reduce(group, config.hidden_size, compute_dtype(start["dtype"], config))
            tune_query_split(group, model, choice)
    if choice is not None:
        channel.send("note", text=choice.details())
    has_draft_model = start["draft_folder"] is not None or start["draft_name"] is not None
    draft_model = open_draft_model(_find_draft_folder(start, group), model, group) if has_draft_model else None
    engine = Engine(
        model,
        count_commands=lambda: min(channel.num_received, channel.num_consumed + MAX_NEW_COMMANDS),
        speculate=start["speculate"],
        draft_model=draft_model,
        constrain=partial(Constraint, grammars),
        cache_bytes=start["cache_memory_bytes"],
        blocks=_open_blocks(channel, start, group, folder, model),
        streaming=None if budget is None else budget.limits,
    )
    warm_up(model)
    if draft_model is not None:
        warm_up_draft(draft_model)
    barrier(group)
    if start["speculate"]:
        engine.measure_steps()
    channel.report_progress("idle")
    error = None if engine.image_error is None else no_vision_error(folder, config)
    channel.send(
        "ready",
        context=engine.context,
        image_error=None if error is None else (error.message, error.hint),
        all_reduce=None if choice is None else choice.to_dict(),
        memory_bytes=mx.get_active_memory(),
        free_bytes=free_memory_bytes(),
        expert_budget=None if budget is None else budget.to_dict(),
        **counters(engine),
    )
    return engine


def run_command(channel: Channel, engine: Engine, command: Message) -> None:
    """Execute a command of the front. All ranks get the same commands in the same order."""
    if command["kind"] == "reset":
        engine.clear()
        return
    if command["kind"] == "cancel":
        engine.cancel(command["request_id"])
        return
    channel.report_progress("prefill")
    try:
        engine.add(command["request_id"], Request.from_dict(command["request"], channel.patches.complete))
    except KimiMlxError as error:  # every rank refuses it too, before any collective
        channel.write(encode_error(error, rank=None, kind="refused", request_id=command["request_id"]))


def run_step(channel: Channel, engine: Engine, is_leader: bool) -> None:
    """Run a step of the engine and send its events; only the leader sends tokens and progress."""
    lines: list[bytes] = []
    for request_id, event in engine.step():
        if isinstance(event, KimiMlxError):
            lines.append(encode_error(event, rank=None, kind="refused", request_id=request_id))
        elif isinstance(event, Finished):
            lines.append(encode_finished(request_id, event, engine))
        elif is_leader:
            lines.append(encode_event(request_id, event))
    if lines:
        channel.write(*lines)
    channel.report_progress("idle" if engine.is_idle else "prefill" if engine.is_prefilling else "decode")


def counters(engine: Engine) -> dict[str, Any]:
    """Return what this rank has counted so far, as fields of a message."""
    experts = engine.expert_stats
    return {
        "cached_tokens": engine.cached_tokens,
        "batch_sizes": asdict(engine.batch_sizes),
        "cache_usage": engine.cache_usage.to_dict(),
        "experts": None if experts is None else experts.to_dict(),
    }


def encode_finished(request_id: int, event: Finished, engine: Engine) -> bytes:
    """Return the last event of a request as a message, with the counters of this rank."""
    return encode(
        "finished",
        request_id=request_id,
        reason=event.reason,
        statistics=event.statistics.to_dict(),
        **counters(engine),
    )


def encode_event(request_id: int, event: Event) -> bytes:
    """Return any other event of a request as a message."""
    match event:
        case Encoded():
            return encode("encoded", request_id=request_id, **asdict(event))
        case Prefilled(done, total):
            return encode("prefilled", request_id=request_id, done=done, total=total)
        case PromptLogprobs(start, tokens):
            pairs = [(each.token, each.top) for each in tokens]
            return encode("prompt_logprobs", request_id=request_id, start=start, tokens=pairs)
        case Token(id, logprobs):
            values = None if logprobs is None else asdict(logprobs)
            return encode("token", request_id=request_id, id=id, logprobs=values)
        case _:
            raise TypeError(f"{event} is not an event of a rank")


def _open_blocks(channel: Channel, start: Message, group: Group, folder: Path, model: Model) -> BlockStore | None:
    """Open the prompt cache on disk; return None if `cache_dir` is not set."""
    if start["cache_dir"] is None:
        return None
    blocks = open_prompt_cache(
        Path(start["cache_dir"]),
        start["cache_disk_bytes"],
        model,
        fingerprint(folder, model.config, group.rank, group.size, start["strategy"]),
        group,
        num_local_ranks=start["cpu_slot"][1],
        warn=lambda text: channel.send("note", text=text),
    )
    channel.cleanup.callback(blocks.close)
    return blocks


def _find_folder(start: Message, group: Group) -> Path:
    """Return the folder of the model on this host.

    Raises:
        MissingModelError: the model is not on this host.
    """
    if start["folder"] is not None:
        return Path(start["folder"])
    folder = find_local_model(resolve_model_name(start["model"]), group.size, start["strategy"], group.rank)
    if folder is None:
        raise MissingModelError(
            f"`{start['model']}` is not on the host of rank {group.rank}",
            hint="download it to all hosts: `kimi-mlx launch --hosts ... download "
            f"{start['model']} --strategy {start['strategy']}`",
            rank=group.rank,
        )
    return folder


def _find_draft_folder(start: Message, group: Group) -> Path | None:
    """Return the folder of the draft model on the host of rank 0; None on other ranks, which need none.

    Raises:
        MissingModelError: the draft model is not on the host of rank 0.
    """
    if group.rank > 0:
        return None
    if start["draft_folder"] is not None:
        return Path(start["draft_folder"])
    folder = find_local_model(resolve_model_name(start["draft_name"]), 1)
    if folder is None:
        raise MissingModelError(
            f"the draft model `{start['draft_name']}` is not on the host of rank 0",
            hint=f"download it on that host: `kimi-mlx download {start['draft_name']}`",
            rank=0,
        )
    return folder
