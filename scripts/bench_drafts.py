"""Measure decoding with drafts of a given acceptance against decoding without drafts, alternating.

The drafts come from an oracle, which knows the answers and takes as long as a draft model would. An acceptance of 0
gives drafts that are always wrong: they must cost nothing. Examples:

    python -m scripts.bench_drafts kimi-mini --acceptance 0
    python -m scripts.bench_drafts deep --ranks 2 --link-delay-ms 1 --acceptance 0.7
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np

from kimi_mlx.bench.slow_link import slow_links
from kimi_mlx.bench.workloads import synthetic_checkpoint
from kimi_mlx.engine.engine import Engine
from kimi_mlx.engine.events import Finished, Statistics, Token
from kimi_mlx.engine.request import Request, Sampling
from kimi_mlx.model.config import load_config
from kimi_mlx.model.decoder import Model
from kimi_mlx.parallel.all_reduce import tune_all_reduce
from kimi_mlx.parallel.group import Group, MlxGroup
from kimi_mlx.parallel.sum_communicator import SumCommunicator
from kimi_mlx.rank.rendezvous import pin_to_cpu
from kimi_mlx.runtime.load import load_share, prepare_device
from kimi_mlx.store.locate import find_local_model
from kimi_mlx.store.model_ref import resolve_model_name
from scripts.oracle import Oracle
from tests.mlx_launch import loopback_hostfile, ring_variables

RANK = "MLX_RANK"
CACHE_BYTES = 2 * 10**9

SAMPLING = Sampling(temperature=2.0, seed=1)
"""Sampling of all answers. With random weights tokens are routed by chance, and rounding, which differs with the number
of tokens of a step, sometimes changes an expert. Then a sampled text changes by a token, a greedy one from there on.
"""


def main() -> None:
    """Measure in this process, or start ranks that do."""
    options = parse_options()
    if RANK in os.environ:
        prepare_device()
        pin_to_cpu((int(os.environ[RANK]), options.ranks))
        measure(options, MlxGroup(mx.distributed.init(strict=True, backend="ring")))
    elif options.ranks == 1:
        measure(options, None)
    else:
        run_ranks(options)


def parse_options() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model, or the synthetic models `wide` and `deep`")
    parser.add_argument("--acceptance", type=float, default=0.7, help="probability that a draft token is right")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--strategy", default="pipeline")
    parser.add_argument("--link-delay-ms", type=float, default=0.0, help="delay of links between ranks")
    parser.add_argument("--speculate", type=int, default=7, help="maximum number of draft tokens per step")
    parser.add_argument("--concurrency", type=int, default=1, help="number of answers at a time")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--generation-tokens", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--draft-share", type=float, help="time of a draft token as a share of a step's (1 / layers)")
    return parser.parse_args()


def folder_of(name: str) -> Path:
    """Return the folder of a model on this machine."""
    if name in ("wide", "deep"):
        return synthetic_checkpoint(name)
    folder = find_local_model(resolve_model_name(name), 1)
    if folder is None:
        raise SystemExit(f"`{name}` is not on this machine")
    return folder


def run_ranks(options: argparse.Namespace) -> None:
    """Start the ranks on this machine, with delayed links between them."""
    folder_of(options.model)  # before the ranks, so that only one process writes it
    with contextlib.ExitStack() as stack:
        hostfile = loopback_hostfile(options.ranks)
        views = [hostfile] * options.ranks
        if options.link_delay_ms:
            views = stack.enter_context(slow_links(options.link_delay_ms))(hostfile)
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ranks: list[subprocess.Popen[bytes]] = []
        for rank, view in enumerate(views):
            path = directory / f"{rank}.json"
            path.write_text(view)
            variables = {**os.environ, **ring_variables(rank, str(path))}
            ranks.append(subprocess.Popen([sys.executable, "-m", __spec__.name, *sys.argv[1:]], env=variables))
        codes = [rank.wait() for rank in ranks]
        if any(codes):
            raise SystemExit(1)


def measure(options: argparse.Namespace, group: Group | None) -> None:
    """Answer the same requests with and without drafts, alternating; print the figures on rank 0."""
    folder = folder_of(options.model)
    config = load_config(folder)
    model = load_share(folder, config, "float32", group, strategy=options.strategy)
    if group is not None and isinstance(model.communicator, SumCommunicator):
        tune_all_reduce(group, config.hidden_size, mx.float32)
    rng = np.random.default_rng(0)
    shape = (options.concurrency, options.prompt_tokens)
    prompts = [tuple(row) for row in rng.integers(0, config.vocab_size, shape).tolist()]
    requests = [Request(prompt, options.generation_tokens, SAMPLING) for prompt in prompts]
    plain = Engine(model, cache_bytes=CACHE_BYTES)
    answers, first = answer(plain, requests)
    oracle = make_oracle(options, model, dict(zip(prompts, answers, strict=True)), first)
    drafting = Engine(model, cache_bytes=CACHE_BYTES, speculate=options.speculate, drafters=[oracle])
    drafting.measure_steps()
    rates: dict[Engine, list[float]] = {plain: [], drafting: []}
    steps: list[float] = []
    pairs: list[tuple[int, int]] = []
    for repetition in range(options.repeat):
        for engine in (plain, drafting) if repetition % 2 else (drafting, plain):
            found, ends = answer(engine, requests)
            pairs += [pair for texts in zip(found, answers, strict=True) for pair in zip(*texts, strict=False)]
            rates[engine].append(sum(end.generated_tokens - 1 for end in ends) / max(end.decode_s for end in ends))
            if engine is drafting:
                steps += [end.tokens_per_step for end in ends]
    if drafting.drafts is not None:
        report(options, rates[plain], rates[drafting], steps, drafting)
        print(f"{sum(a == b for a, b in pairs) / max(len(pairs), 1):.1%} of tokens are equal", flush=True)


def make_oracle(
    options: argparse.Namespace, model: Model, answers: dict[tuple[int, ...], list[int]], ends: list[Statistics]
) -> Oracle:
    """Return an oracle that takes its share of the time of a step."""
    step_s = ends[0].decode_s / max(ends[0].decode_steps, 1)
    share = 1 / model.config.num_hidden_layers if options.draft_share is None else options.draft_share
    return Oracle(answers, options.acceptance, model.config.vocab_size, token_s=share * step_s)


def answer(engine: Engine, requests: list[Request]) -> tuple[list[list[int]], list[Statistics]]:
    """Return the tokens and the statistics of the answers, which are generated at the same time."""
    engine.clear()
    tokens: list[list[int]] = [[] for _ in requests]
    ends: dict[int, Statistics] = {}
    for number, request in enumerate(requests):
        engine.add(number, request)
    while not engine.is_idle:
        for number, event in engine.step():
            if isinstance(event, Token):
                tokens[number].append(event.id)
            elif isinstance(event, Finished):
                ends[number] = event.statistics
    return tokens, [ends[number] for number in range(len(requests))]


def report(
    options: argparse.Namespace, plain: list[float], drafting: list[float], steps: list[float], engine: Engine
) -> None:
    """Print the figures."""
    drafts = engine.drafts
    assert drafts is not None
    ratios = [with_drafts / without for with_drafts, without in zip(drafting, plain, strict=True)]
    print(json.dumps(vars(options)))
    print(f"without drafts {spread(plain)} tok/s, with drafts {spread(drafting)} tok/s")
    print(f"ratio {spread(ratios)}; {statistics.median(steps):.2f} tokens per step")
    print(f"{drafts.num_drafted} tokens drafted, {drafts.num_accepted} accepted; off: {drafts.off_reason}")
    print(f"load {os.getloadavg()[0]:.1f}")


def spread(values: list[float]) -> str:
    """Return median and range as text."""
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    main()
