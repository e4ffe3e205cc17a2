"""Chat with a model: one answer, or a conversation."""

from __future__ import annotations

import typer

from kimi_mlx.cli.chat.attachments import show_attachment, with_attachments
from kimi_mlx.cli.chat.one_shot import print_answer, print_answer_json
from kimi_mlx.cli.chat.open_chat import OpenedChat, open_chat
from kimi_mlx.cli.chat.options import ChatArguments
from kimi_mlx.cli.chat.prompt import read_prompt, resolve_chat_model
from kimi_mlx.cli.open_model import LaunchContext


def run_chat(launch: LaunchContext | None, arguments: ChatArguments) -> None:
    """Answer one prompt, or hold a conversation until the user exits.

    Args:
        launch: launched hosts; None for this machine.
        arguments: arguments of the user.

    Raises:
        KimiMlxError: wrong usage, the model cannot be loaded, or a file cannot be read.
        typer.Exit: the conversation has ended.
    """
    target = resolve_chat_model(arguments.run.model_name, arguments.prompt.prompt)
    arguments.check()
    prompt = read_prompt(arguments.prompt.prompt, arguments.output.json)
    with open_chat(launch, target, arguments) as chat:
        if prompt is not None:
            answer_once(chat, prompt, is_json=arguments.output.json)
            return
        from kimi_mlx.cli.chat.repl import run_repl  # prompt_toolkit: not for a single answer

        raise typer.Exit(run_repl(chat.conversation, target.name, chat.files))


def answer_once(chat: OpenedChat, prompt: str, *, is_json: bool) -> None:
    """Print the answer to one prompt.

    Raises:
        KimiMlxError: the request is refused, or the session has failed.
    """
    content = with_attachments(prompt, chat.files)
    if is_json:
        print_answer_json(chat.conversation, content, chat.placement)
        return
    for file in chat.files:
        show_attachment(file)
    print_answer(chat.conversation, content)
