"""One rank's process: joins the ring, loads its share, answers requests until its input ends.

Started by kimi_mlx.cluster; it reads messages from standard input and writes them to standard output, nothing else.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from kimi_mlx.cluster.ring.messages import Message, encode, encode_error
from kimi_mlx.engine.engine import MOST_NEWS, Engine
from kimi_mlx.engine.request import Event, Finished, Prefilled, Request, Token
from kimi_mlx.engine.sampling import samplers
from kimi_mlx.errors import EngineError, MissingModelError
from kimi_mlx.model.config import load_config
from kimi_mlx.parallel.exchange import RankExchange
from kimi_mlx.parallel.group import Group
from kimi_mlx.parallel.pipeline import PipelineExchange
from kimi_mlx.parallel.sums import choose_sums
from kimi_mlx.rank.channel import Channel, run_rank
from kimi_mlx.rank.rendezvous import join
from kimi_mlx.runtime.grammars import GrammarCompiler
from kimi_mlx.runtime.load import compute_dtype, fingerprint, load_share, prepare_device
from kimi_mlx.runtime.prompt_cache import open_prompt_cache
from kimi_mlx.runtime.tokenizer_files import pack_tokenizer_files
from kimi_mlx.store.locate import find, understand


def main() -> None:
    """Run a rank."""
    run_rank(serve)


def serve(channel: Channel, start: Message) -> None:
    """Load and answer."""
    prepare_device(start["has_sampling"])
    group = join(channel, start)
    folder = _folder(start, group)
    channel.report_progress("load")
    if start["needs_tokenizer_files"] and group.rank == 0:
        channel.send("tokenizer_files", files=pack_tokenizer_files(folder))

    def tell(done: int, total: int) -> None:
        channel.report_progress("load")
        channel.send("loading", done=done, total=total)

    config = load_config(folder)
    model = load_share(folder, config, start["dtype"], group, tell, start["strategy"])
    channel.report_progress("load")
    choice = None
    if isinstance(model.exchange, RankExchange):
        model.exchange.check_every = start["check_every"]
        if not isinstance(model.exchange, PipelineExchange):
            choice = choose_sums(group, config.hidden_size, compute_dtype(start["dtype"], config))
    if choice is not None:
        channel.send("note", text=choice.details())
    blocks = None
    if start["cache_dir"] is not None:
        blocks = open_prompt_cache(
            Path(start["cache_dir"]),
            start["cache_disk_bytes"],
            model,
            fingerprint(folder, config, group.rank, group.size, start["strategy"]),
            group,
            start["place"][1],
            lambda text: channel.send("note", text=text),
        )
    engine = Engine(
        model,
        count_commands=lambda: min(channel.num_received, channel.num_consumed + MOST_NEWS),
        speculate=start["speculate"],
        constrain=GrammarCompiler(folder, config.vocab_size).compile,
        cache_bytes=start["cache_memory_bytes"],
        blocks=blocks,
    )
    if start["has_sampling"]:
        samplers()  # they have been on their way since the start
    channel.report_progress("idle")
    channel.send("ready", context=engine.context, all_reduce=None if choice is None else choice.to_dict())
    while True:
        for _ in range(engine.news(channel.num_consumed)):
            take(channel, engine, channel.next_command())
        if not engine.is_idle:
            work(channel, engine, is_leader=group.rank == 0)


def take(channel: Channel, engine: Engine, command: Message) -> None:
    """Carry out a command of the front; all ranks get the same ones in the same order."""
    if command["kind"] == "reset":
        engine.clear()
        return
    if command["kind"] == "cancel":
        engine.cancel(command["request_id"])
        return
    channel.report_progress("prefill")
    try:
        engine.add(command["request_id"], Request.from_dict(command["request"]))
    except EngineError as error:  # every rank refuses alike, before any collective
        channel.write(encode_error(error, rank=None, kind="refused", request_id=command["request_id"]))


def work(channel: Channel, engine: Engine, is_leader: bool) -> None:
    """A turn of the engine; the leader alone tells of tokens."""
    for request_id, event in engine.turn():
        if isinstance(event, EngineError):
            channel.write(encode_error(event, rank=None, kind="refused", request_id=request_id))
        elif is_leader or isinstance(event, Finished):
            channel.write(encode_event(request_id, event, engine.cached_tokens))
    channel.report_progress("idle" if engine.is_idle else "prefill" if engine.is_prefilling else "decode")


def encode_event(request_id: int, event: Event, cached_tokens: int = 0) -> bytes:
    """An event of a request as a message; with its end goes how full the caches are."""
    match event:
        case Prefilled(done, total):
            return encode("prefilled", request_id=request_id, done=done, total=total)
        case Token(id, logprobs):
            return encode(
                "token", request_id=request_id, id=id, logprobs=None if logprobs is None else asdict(logprobs)
            )
        case Finished(reason, statistics):
            figures = statistics.to_dict()
            return encode(
                "finished", request_id=request_id, reason=reason, statistics=figures, cached_tokens=cached_tokens
            )
        case _:
            raise TypeError(f"{event} is none of a rank's events")


def _folder(start: Message, group: Group) -> Path:
    """Where this host has the model."""
    if start["folder"] is not None:
        return Path(start["folder"])
    folder = find(understand(start["model"]), group.size, start["strategy"], group.rank)
    if folder is None:
        raise MissingModelError(
            f"`{start['model']}` is not on the host of rank {group.rank}",
            hint=f"fetch it for all: `kimi-mlx launch --hosts ... download {start['model']} "
            f"--strategy {start['strategy']}`",
            rank=group.rank,
        )
    return folder
