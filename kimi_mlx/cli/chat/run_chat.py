"""Chat with a model: one answer, or a conversation."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from typing import NoReturn

import typer

from kimi_mlx.cli.chat.answer_settings import kept_sources
from kimi_mlx.cli.chat.chat_history import ChatHistory
from kimi_mlx.cli.chat.files.attachments import show_attachment, with_attachments
from kimi_mlx.cli.chat.files.text_attachments import read_text_attachment
from kimi_mlx.cli.chat.model_choice import show_first_note
from kimi_mlx.cli.chat.one_shot import answer_once
from kimi_mlx.cli.chat.open_chat import open_chat
from kimi_mlx.cli.chat.options import ChatArguments
from kimi_mlx.cli.chat.prompt import read_prompt
from kimi_mlx.cli.chat.tools.open_tools import open_tools, wait_for_servers
from kimi_mlx.cli.open_model import LaunchContext
from kimi_mlx.cli.option_file import CONFIG_NAME
from kimi_mlx.cli.output import hides_messages
from kimi_mlx.cli.reader_watch import end_without_reader
from kimi_mlx.errors import KimiMlxError, UsageError
from kimi_mlx.store.model_ref import ModelRef


def run_chat(launch: LaunchContext | None, arguments: ChatArguments, sources: Mapping[str, str]) -> None:
    """Answer one prompt, or hold a conversation until the user exits.

    Args:
        launch: launched hosts; None for this machine.
        arguments: arguments of the user.
        sources: where the values of options come from, by name; without those that nothing has set.

    Raises:
        KimiMlxError: wrong usage, the model cannot be loaded, or a file cannot be read.
        typer.Exit: the conversation has ended.
    """
    with closing(ChatHistory.open(arguments.history)) as history:
        target = _find_target(launch, arguments, history, sources)
        arguments.check()
        prompt = read_prompt(arguments.prompt, arguments.output)
        if prompt is not None:
            _answer_once(launch, target, arguments, prompt, history, sources)
            return
        _converse(launch, target, arguments, history, sources)


def _find_target(
    launch: LaunchContext | None, arguments: ChatArguments, history: ChatHistory, sources: Mapping[str, str]
) -> ModelRef | None:
    """Return the model to load; None if the user has named a server that has one.

    Raises:
        UsageError: unknown name, an unsupported model, or a server together with launched hosts.
    """
    if arguments.remote.url is None:
        is_default = sources.get("model") == CONFIG_NAME and history.resumed is not None
        return history.resolve_model(None if is_default else arguments.run.model, arguments.prompt.prompt)
    if launch is not None:
        hint = f"without hosts: `kimi-mlx chat --url {arguments.remote.url}`"
        raise UsageError("--url and launched hosts exclude each other", hint=hint)
    return None


def _weak(sources: Mapping[str, str]) -> frozenset[str]:
    """Return the options that only `config.toml` sets: the settings of a continued conversation come before them."""
    return frozenset(name for name, source in sources.items() if source == CONFIG_NAME)


def _converse(
    launch: LaunchContext | None,
    target: ModelRef | None,
    arguments: ChatArguments,
    history: ChatHistory,
    sources: Mapping[str, str],
) -> NoReturn:
    """Load the model, and hold a conversation until the user exits.

    Raises:
        KimiMlxError: the model cannot be loaded, a file cannot be read, or the model is lost.
        typer.Exit: the conversation has ended.
    """
    from kimi_mlx.cli.chat.repl import run_repl  # prompt_toolkit: not for a single answer
    from kimi_mlx.cli.chat.repl_state import ReplState

    if target is not None and arguments.run.model is None and history.resumed is None:
        show_first_note()
    with open_tools(arguments.tools) as tools, open_chat(launch, target, arguments, sources) as chat:
        wait_for_servers(tools, can_skip=True)
        given = chat.conversation.options
        history.attach(chat.conversation, target, _weak(sources))
        model, options = chat.conversation.model, chat.conversation.options
        texts = [read_text_attachment(path, model, options, num_used=0) for path in arguments.prompt.text_files]
        output = arguments.output
        state = ReplState(
            chat.conversation,
            kept_sources(sources, given, options),
            placement=chat.placement,
            reasoning=output.reasoning,
            is_plain=output.plain,
            attached=[*chat.files, *texts],
            history=history,
            tools=tools,
        )
        try:
            raise typer.Exit(run_repl(state, keeps_input=not arguments.history.no_log))
        except (typer.Exit, KimiMlxError):
            history.note_id()
            raise


def _answer_once(
    launch: LaunchContext | None,
    target: ModelRef | None,
    arguments: ChatArguments,
    prompt: str,
    history: ChatHistory,
    sources: Mapping[str, str],
) -> None:
    """Load the model and print one answer, or stop as soon as its reader has ended.

    Raises:
        KimiMlxError: the model cannot be loaded, the request is refused, or the answer is of no use.
    """
    output = arguments.output
    is_quiet = output.quiet or hides_messages(output.json)
    with (
        end_without_reader(),
        open_tools(arguments.tools, is_quiet) as tools,
        open_chat(launch, target, arguments, sources, prompt) as chat,
    ):
        wait_for_servers(tools, is_quiet)
        for file in chat.files if not (output.json or output.quiet) else ():
            show_attachment(file)
        history.attach(chat.conversation, target, _weak(sources))
        answer_once(chat.conversation, with_attachments(prompt, chat.files), chat.placement, output, tools, history)
