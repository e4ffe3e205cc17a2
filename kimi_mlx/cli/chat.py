"""`kimi-mlx chat`: one answer, or a conversation."""

from __future__ import annotations

import os
import stat
import sys
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kimi_mlx.cli.option_groups import with_option_groups
from kimi_mlx.cli.options import SAMPLING, DiskCacheOptions, JsonOption, RunOptions, refuse_mlx_launch
from kimi_mlx.cli.output import print_json, stderr, stdout
from kimi_mlx.cli.stream import AnswerPrinter, statistics_line
from kimi_mlx.engine.request import Finished, Sampling
from kimi_mlx.errors import UsageError
from kimi_mlx.hub.catalogue import CatalogueEntry
from kimi_mlx.planner.choice import Choice
from kimi_mlx.runtime.chat_tokenizer import ChatTokenizer
from kimi_mlx.session.conversation import ChatOptions, Conversation
from kimi_mlx.text.messages import Delta

if TYPE_CHECKING:
    from kimi_mlx.store.model_ref import ModelRef


@dataclass(frozen=True)
class SamplingOptions:
    """Options of how tokens are sampled; None takes the model's default."""

    temperature: Annotated[
        float | None,
        typer.Option(
            "--temperature",
            "--temp",
            "-t",
            help="Sampling temperature; 0 is greedy. Default: the model's.",
            rich_help_panel=SAMPLING,
        ),
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option(
            "--top-p",
            metavar="P",
            help="Nucleus sampling: keep the most likely tokens whose probabilities add up to P.",
            rich_help_panel=SAMPLING,
        ),
    ] = None
    top_k: Annotated[
        int | None,
        typer.Option(
            "--top-k", metavar="K", help="Sample from the K most likely tokens; 0 disables.", rich_help_panel=SAMPLING
        ),
    ] = None
    min_p: Annotated[
        float | None,
        typer.Option(
            "--min-p",
            metavar="P",
            help="Drop tokens with less than P times the top token's probability.",
            rich_help_panel=SAMPLING,
        ),
    ] = None
    seed: Annotated[int | None, typer.Option("--seed", help="Random seed.", rich_help_panel=SAMPLING)] = None
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens",
            min=1,
            help="Maximum number of tokens to generate. Default: the remaining context.",
            rich_help_panel=SAMPLING,
        ),
    ] = None
    thinking: Annotated[
        bool | None,
        typer.Option(
            "--thinking/--no-thinking",
            help="Turn reasoning on or off, for models that can do both.",
            rich_help_panel=SAMPLING,
        ),
    ] = None


@dataclass(frozen=True)
class PromptOptions:
    """Options of the prompt."""

    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            "-p",
            help="Answer this prompt and exit. Piped input is appended to it; `-` uses only the piped input.",
            show_default=False,
        ),
    ] = None
    system: Annotated[str | None, typer.Option("--system", "-s", help="System prompt.")] = None


@with_option_groups
def chat(
    context: typer.Context,
    run: RunOptions,
    prompts: PromptOptions,
    sampling: SamplingOptions,
    disk: DiskCacheOptions,
    json: JsonOption = False,
) -> None:
    """Chat with a model in the terminal.

    With --prompt, or with piped input, it prints one answer and exits.
    """
    # heavy imports: not for a usage error
    from kimi_mlx.cli.open_model import launch_context, open_session, prepare_model, session_options
    from kimi_mlx.store.model_ref import resolve_model_name

    refuse_mlx_launch()
    target = resolve_model_name(run.model_name)
    prompt = _read_prompt(prompts.prompt, json)
    options = session_options(run, disk, has_sampling=sampling.temperature != 0)
    prepared = prepare_model(launch_context(context), target, run, is_quiet=json)
    text_side = None
    if prepared.folder is not None:  # read before loading: its errors come early, its defaults may be greedy
        text_side = _read_text_side(prepared.folder, target, sampling)
        options = replace(options, has_sampling=_is_sampling(text_side[1]))
    opened = open_session(prepared, options, run.ranks, json)
    with closing(opened.session) as session:
        tokenizer, chat_options = text_side or _read_text_side(opened.tokenizer_folder, target, sampling)
        conversation = Conversation(session, tokenizer, chat_options, prompts.system)
        if prompt is None:
            from kimi_mlx.cli.repl import run_repl  # prompt_toolkit: not for a single answer

            raise typer.Exit(run_repl(conversation, model_name=target.name))
        if json:
            _print_answer_json(conversation, prompt, prepared.choice)
        else:
            _print_answer(conversation, prompt)


def _read_text_side(folder: Path, target: ModelRef, sampling: SamplingOptions) -> tuple[ChatTokenizer, ChatOptions]:
    """Read the tokenizer of a checkpoint, and combine its defaults with the user's options."""
    entry = target.entry
    tokenizer = ChatTokenizer.load(folder, defaults=entry.default_sampling() if entry else None)
    merged = merge_sampling(tokenizer.sampling, entry if sampling.thinking is False else None, sampling)
    template = {} if sampling.thinking is None else {"thinking": sampling.thinking}
    return tokenizer, ChatOptions(sampling.max_tokens, merged, None, template)


def _is_sampling(options: ChatOptions) -> bool:
    return options.sampling is not None and options.sampling.temperature > 0


def merge_sampling(recommended: Sampling, instant: CatalogueEntry | None, options: SamplingOptions) -> Sampling:
    """Return the sampling parameters: the user's, else those without thinking, else the recommended ones.

    Args:
        recommended: defaults of the checkpoint and the catalogue.
        instant: catalogue entry of the model if thinking is off, else None.
        options: options of the user.
    """
    without_thinking = instant.instant_sampling.recommended() if instant and instant.instant_sampling else {}
    names = ("temperature", "top_p", "top_k", "min_p", "seed")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    return replace(recommended, **{**without_thinking, **given})


def require_prompt(prompt: str | None) -> None:
    """Check that there is a prompt, a pipe or a terminal, without reading from it.

    Raises:
        UsageError: there is none.
    """
    has_stdin = sys.stdin is not None  # pyright: ignore[reportUnnecessaryComparison]
    mode = os.fstat(sys.stdin.fileno()).st_mode if has_stdin else 0
    is_piped = stat.S_ISFIFO(mode) or stat.S_ISREG(mode)
    if prompt is None and not is_piped and not (has_stdin and sys.stdin.isatty()):
        raise UsageError("no prompt given and no terminal to ask on", hint='add a prompt: `-p "Hello"`')


def _read_prompt(prompt: str | None, is_json: bool) -> str | None:
    """Return the prompt from --prompt, a pipe, or both; None for a conversation."""
    if prompt == "-":
        prompt = _read_pipe()
        if prompt is None:
            raise UsageError("`-p -` reads piped input, but nothing is piped", hint='use `kimi-mlx chat -p "Hello"`')
    elif (piped := _read_pipe()) and piped.strip():
        prompt = piped if prompt is None else f"{prompt}\n\n{piped}"
    elif piped is not None and prompt is None:
        prompt = piped
    if prompt is None:
        if sys.stdin is None or not sys.stdin.isatty():  # pyright: ignore[reportUnnecessaryComparison]
            raise UsageError("no prompt given and no terminal to ask on", hint='use `kimi-mlx chat -p "Hello"`')
        if is_json:
            raise UsageError("--json needs a prompt", hint='use `kimi-mlx chat --json -p "Hello"`')
        return None
    if not prompt.strip():
        raise UsageError("the prompt is empty", hint='use `kimi-mlx chat -p "Hello"`, or no -p for a conversation')
    return prompt


def _read_pipe() -> str | None:
    """Return piped or redirected standard input; None if there is neither."""
    if sys.stdin is None:  # pyright: ignore[reportUnnecessaryComparison]
        return None
    mode = os.fstat(sys.stdin.fileno()).st_mode
    if not (stat.S_ISFIFO(mode) or stat.S_ISREG(mode)):
        return None
    return sys.stdin.buffer.read().decode("utf-8", errors="replace")


def _print_answer(conversation: Conversation, prompt: str) -> None:
    """Stream the answer to stdout; reasoning and statistics go to stderr."""
    with AnswerPrinter(stdout, show_reasoning=stderr.is_terminal, plain=True) as printer:
        for item in conversation.ask(prompt):
            printer.show(item)
            if isinstance(item, Finished):
                printer.finish()
                suffix = " · stopped at the token limit" if item.reason == "length" else ""
                stderr.print(statistics_line(item.statistics) + suffix, style="dim")


def _print_answer_json(conversation: Conversation, prompt: str, choice: Choice) -> None:
    """Print the complete answer as one JSON document."""
    answer = Delta()
    for item in conversation.ask(prompt):
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
