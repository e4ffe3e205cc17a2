"""`kimi-mlx chat`: one answer, or a conversation."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from kimi_mlx.cli.fetch_model import fetch_model
from kimi_mlx.cli.open_model import launch_context, open_on_hosts, open_on_this_machine
from kimi_mlx.cli.options import (
    CheckEveryOption,
    DtypeOption,
    FastSyncOption,
    JsonOption,
    ModelArgument,
    RanksOption,
    SpeculateOption,
    StrategyOption,
    refuse_mlx_launch,
)
from kimi_mlx.cli.output import print_json, stderr, stdout
from kimi_mlx.cli.placement import choose_placement, print_placement
from kimi_mlx.cli.stream import AnswerPrinter, statistics_line
from kimi_mlx.engine.request import Finished, Sampling
from kimi_mlx.errors import UsageError
from kimi_mlx.hub.catalogue import CatalogueEntry
from kimi_mlx.model.config import load_config
from kimi_mlx.planner.choice import Choice
from kimi_mlx.runtime.chat_tokenizer import ChatTokenizer
from kimi_mlx.session.conversation import ChatOptions, Conversation
from kimi_mlx.session.session import Session, SessionOptions
from kimi_mlx.settings import Settings
from kimi_mlx.store.locate import Target, understand
from kimi_mlx.text.messages import Delta


def chat(
    context: typer.Context,
    model: ModelArgument = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            "-p",
            help="Answer this and exit; what comes through a pipe is added to it. `-`: the pipe alone.",
            show_default=False,
        ),
    ] = None,
    system: Annotated[str | None, typer.Option("--system", "-s", help="The system prompt.")] = None,
    ranks: RanksOption = 1,
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", min=1, help="At most so many new tokens. Default: the rest of the context."),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", "-t", help="0 is greedy. Default: the model's own.")
    ] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", help="Keep tokens of this probability together.")] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", help="Keep so many tokens; 0 keeps all.")] = None,
    min_p: Annotated[
        float | None, typer.Option("--min-p", help="Drop tokens this much less likely than the best.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of the random numbers.")] = None,
    thinking: Annotated[
        bool | None,
        typer.Option("--thinking/--no-thinking", help="Whether the model reasons first, if it can."),
    ] = None,
    strategy: StrategyOption = None,
    speculate: SpeculateOption = 0,
    check_every: CheckEveryOption = 0,
    dtype: DtypeOption = None,
    fast_sync: FastSyncOption = False,
    json: JsonOption = False,
) -> None:
    """Talk to a model: a conversation in the terminal, or with --prompt one answer."""
    refuse_mlx_launch()
    name = model or Settings.from_environment().model
    target = understand(name)
    question = _question(prompt, json)
    launched = launch_context(context)
    given = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p, "seed": seed}
    asking = _Asking(target, thinking, given)
    wanted = SessionOptions(
        None,
        dtype=dtype,
        has_sampling=temperature != 0,
        speculate=speculate,
        check_every=check_every,
        fast_sync=fast_sync,
    )
    with ExitStack() as stack:
        session: Session
        if launched is not None:
            choice = launched.choice
            ring = stack.enter_context(closing(open_on_hosts(launched, target, wanted, json)))
            tokenizer, options = asking.read(ring.tokenizer_folder, max_tokens)
            session = ring
        else:
            choice = choose_placement(target, ranks, strategy)
            folder = fetch_model(target, ranks, choice.strategy, is_quiet=json)
            load_config(folder)  # a foreign or broken checkpoint is refused before anything else is read
            tokenizer, options = asking.read(folder, max_tokens)
            samples = options.sampling is not None and options.sampling.temperature > 0
            print_placement(choice, f"{ranks} ranks", is_quiet=json or ranks == 1)
            local = replace(wanted, folder=folder, ranks=ranks, strategy=choice.strategy, has_sampling=samples)
            session = open_on_this_machine(local, name, json)
            stack.enter_context(closing(session))
        conversation = Conversation(session, tokenizer, options, system)
        if question is None:
            from kimi_mlx.cli.repl import run_repl  # prompt_toolkit: not for one-shot answers

            raise typer.Exit(run_repl(conversation, model_name=name))
        if json:
            _answer_json(conversation, question, choice)
        else:
            _answer(conversation, question)


@dataclass(frozen=True)
class _Asking:
    """How the user wants to be answered.

    Args:
        target: the model.
        thinking: whether it reasons first; None leaves it to the model.
        given: options of the sampling; None where there is none.
    """

    target: Target
    thinking: bool | None
    given: Mapping[str, float | int | None]

    def read(self, folder: Path, max_tokens: int | None) -> tuple[ChatTokenizer, ChatOptions]:
        """The text side of the checkpoint in a folder, and how to ask it."""
        entry = self.target.entry
        tokenizer = ChatTokenizer.load(folder, defaults=entry.default_sampling() if entry else None)
        sampling = _sampling(tokenizer.sampling, entry if self.thinking is False else None, self.given)
        template = {} if self.thinking is None else {"thinking": self.thinking}
        return tokenizer, ChatOptions(max_tokens, sampling, None, template)


def _sampling(
    recommended: Sampling, instant: CatalogueEntry | None, given: Mapping[str, float | int | None]
) -> Sampling:
    """How to sample: options first, then what is recommended without thinking, then what is in general.

    Args:
        recommended: by the checkpoint and the catalogue.
        instant: the model, if it shall not think.
        given: the options; None where there is none.
    """
    without_thinking = instant.instant_sampling.recommended() if instant and instant.instant_sampling else {}
    options = {name: value for name, value in given.items() if value is not None}
    return replace(recommended, **{**without_thinking, **options})


def require_prompt(prompt: str | None) -> None:
    """Fail early if there is nobody who could ask anything; reads nothing.

    Raises:
        UsageError: no prompt, no pipe and no terminal.
    """
    has_stdin = sys.stdin is not None  # pyright: ignore[reportUnnecessaryComparison]
    mode = os.fstat(sys.stdin.fileno()).st_mode if has_stdin else 0
    is_piped = stat.S_ISFIFO(mode) or stat.S_ISREG(mode)
    if prompt is None and not is_piped and not (has_stdin and sys.stdin.isatty()):
        raise UsageError("there is neither a terminal nor a prompt", hint='add a question: `-p "Hello"`')


def _question(prompt: str | None, is_json: bool) -> str | None:
    """The one question to answer, from --prompt, a pipe, or both; None for a conversation."""
    if prompt == "-":
        prompt = _piped()
        if prompt is None:
            raise UsageError("`-p -` reads a pipe, but there is none", hint='use `kimi-mlx chat -p "Hello"`')
    elif (piped := _piped()) and piped.strip():
        prompt = piped if prompt is None else f"{prompt}\n\n{piped}"
    elif piped is not None and prompt is None:
        prompt = piped
    if prompt is None:
        if sys.stdin is None or not sys.stdin.isatty():  # pyright: ignore[reportUnnecessaryComparison]
            raise UsageError("there is neither a terminal nor a prompt", hint='use `kimi-mlx chat -p "Hello"`')
        if is_json:
            raise UsageError("--json needs a question", hint='use `kimi-mlx chat --json -p "Hello"`')
        return None
    if not prompt.strip():
        raise UsageError("the prompt is empty", hint='use `kimi-mlx chat -p "Hello"`, or no -p for a conversation')
    return prompt


def _piped() -> str | None:
    """What comes through a pipe or from a file on standard input; None if neither is there."""
    if sys.stdin is None:  # pyright: ignore[reportUnnecessaryComparison]
        return None
    mode = os.fstat(sys.stdin.fileno()).st_mode
    if not (stat.S_ISFIFO(mode) or stat.S_ISREG(mode)):
        return None
    return sys.stdin.buffer.read().decode("utf-8", errors="replace")


def _answer(conversation: Conversation, question: str) -> None:
    """Stream the answer to stdout, reasoning and statistics to stderr."""
    with AnswerPrinter(stdout, show_reasoning=stderr.is_terminal, plain=True) as printer:
        for item in conversation.ask(question):
            printer.show(item)
            if isinstance(item, Finished):
                printer.finish()
                cut = " · stopped: the limit of tokens is reached" if item.reason == "length" else ""
                stderr.print(statistics_line(item.statistics) + cut, style="dim")


def _answer_json(conversation: Conversation, question: str, choice: Choice) -> None:
    """Print the whole answer as one JSON document."""
    answer = Delta()
    for item in conversation.ask(question):
        if isinstance(item, Delta):
            answer = answer + item
        elif isinstance(item, Finished):
            print_json(
                {
                    "text": answer.text,
                    "reasoning": answer.reasoning,
                    "tool_calls": [asdict(call) for call in answer.tool_calls],
                    "finish_reason": item.reason,
                    "placement": choice.to_dict(),
                    "statistics": item.statistics.to_dict(),
                }
            )
