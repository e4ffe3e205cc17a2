"""Open the model of a chat, with the files of the first message: here, on launched hosts, or behind a server."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from kimi_mlx.cli.chat.files.attachments import Attachment, PrepareMedia, read_attachment
from kimi_mlx.cli.chat.options import ChatArguments, SamplingOptions, ToolOptions
from kimi_mlx.cli.chat.prompt import check_prompt_size
from kimi_mlx.cli.chat.schema import SCHEMA_NAME, Schema
from kimi_mlx.cli.chat.server_choice import ServerChoice, named_server, running_server, unused_options
from kimi_mlx.cli.open_model import LaunchContext, open_session, prepare_model, session_options
from kimi_mlx.cli.output import closing_with_status, hides_messages, print_note, slow_status
from kimi_mlx.cli.vision_check import require_vision, require_vision_in_catalogue
from kimi_mlx.client.remote import RemoteChatModel
from kimi_mlx.engine.request import SAMPLING_RANGES
from kimi_mlx.model.config import load_config
from kimi_mlx.planner.choice import Choice
from kimi_mlx.runtime.chat_tokenizer import ChatTokenizer
from kimi_mlx.session.chat_model import ChatOptions
from kimi_mlx.session.conversation import Conversation
from kimi_mlx.session.local_chat_model import LocalChatModel
from kimi_mlx.store.model_ref import ModelRef


@dataclass(frozen=True)
class OpenedChat:
    """A conversation with a loaded model.

    Attributes:
        conversation: the conversation, still empty.
        files: images and videos of the first message.
        placement: placement of the model.
    """

    conversation: Conversation
    files: list[Attachment]
    placement: Choice


@contextmanager
def open_chat(
    launch: LaunchContext | None,
    target: ModelRef | None,
    arguments: ChatArguments,
    sources: Mapping[str, str],
    text: str | None = None,
) -> Generator[OpenedChat]:
    """Load a model or connect to a server that has it, and read the files of the first message.

    Args:
        launch: launched hosts; None for this machine.
        target: the model; None for that of the server which the user has named.
        arguments: arguments of the user.
        sources: where the values of options come from, by name.
        text: text of the first message; None for a conversation.

    Raises:
        KimiMlxError: the model cannot be loaded, the server does not answer, or a file cannot be read.
    """
    server = named_server(arguments, sources)
    if server is None and target is not None and launch is None:
        server = running_server(target, arguments, sources, is_conversation=text is None)
    if server is not None:
        if unused := unused_options(sources):
            print_note(f"without effect at a server: {', '.join(unused)}")
        with _open_remote(server, arguments, is_conversation=text is None) as chat:
            yield chat
        return
    assert target is not None
    with _open_here(launch, target, arguments, text or "") as chat:
        yield chat


@contextmanager
def _open_remote(server: ServerChoice, arguments: ChatArguments, *, is_conversation: bool) -> Generator[OpenedChat]:
    """Connect to a server.

    Raises:
        ServerError: it does not answer, or refuses the key.
        UsageError: it does not have the model, or an option is wrong.
    """
    prompt, is_quiet = arguments.prompt, arguments.output.quiet or arguments.output.json
    answers = chat_options(arguments.sampling, arguments.output.read_schema(), arguments.tools.tool_arguments)
    with slow_status(is_quiet) as set_status:
        set_status(f"connecting to {server.address.url}")
        model = RemoteChatModel(server.address, server.key, server.model)
    with closing(model):
        if prompt.media and model.image_error is not None:
            raise model.image_error
        files = _read_files(arguments, model.prepare_media)
        placement = Choice("", f"served at {model.url}")
        if is_conversation:
            print_note(f"connected to {model.url}")
        yield OpenedChat(Conversation(model, answers, prompt.read_system()), files, placement)


@contextmanager
def _open_here(
    launch: LaunchContext | None, target: ModelRef, arguments: ChatArguments, text: str
) -> Generator[OpenedChat]:
    """Load a model on this machine or on launched hosts."""
    prompt, run, is_quiet = arguments.prompt, arguments.run, arguments.output.quiet
    system = prompt.read_system()
    answers = chat_options(arguments.sampling, arguments.output.read_schema(), arguments.tools.tool_arguments)
    instant = target.instant_sampling
    if prompt.media and target.folder is None:
        require_vision_in_catalogue(target)
    options = session_options(run, arguments.disk)
    model = prepare_model(launch, target, run, is_quiet=is_quiet or hides_messages(arguments.output.json))
    early = None
    if model.folder is not None:  # before loading, so that its errors come early
        if prompt.media:
            require_vision(model.folder, target.name)
        with slow_status(is_quiet) as set_status:
            set_status("reading the tokenizer")
            early = _read_tokenizer(model.folder, target)
        check_prompt_size((system or "", text), early, load_config(model.folder).max_position_embeddings)
    files = _read_files(arguments, early.prepare_media if early else None)
    opened = open_session(model, options, run.ranks, is_quiet)
    with closing_with_status(opened.session, is_quiet) as session:
        tokenizer = early or _read_tokenizer(opened.tokenizer_folder, target)
        chat_model = LocalChatModel(session, tokenizer, opened.deployment, instant)
        if files and chat_model.image_error is not None:
            raise chat_model.image_error
        if early is None:  # again, with the limits of the hosts' model
            files = _read_files(arguments, tokenizer.prepare_media)
        yield OpenedChat(Conversation(chat_model, answers, system), files, model.choice)


def _read_tokenizer(folder: Path, target: ModelRef) -> ChatTokenizer:
    """Read the tokenizer of a checkpoint.

    Raises:
        TextError: a file is broken, or the checkpoint cannot chat.
    """
    tokenizer = ChatTokenizer.load(folder, defaults=target.sampling)
    tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}])  # refuses a base model before it is loaded
    return tokenizer


def chat_options(
    sampling: SamplingOptions, schema: Schema | None = None, tool_arguments: str = ToolOptions.tool_arguments
) -> ChatOptions:
    """Return what the user has set of the options of answers.

    Args:
        sampling: options of how tokens are sampled.
        schema: JSON schema of the answers; None for text.
        tool_arguments: `schema`, or `as-written`.
    """
    return ChatOptions(
        constrains_arguments=tool_arguments == "schema",
        response_schema=schema,
        response_schema_name=SCHEMA_NAME,
        max_tokens=sampling.max_tokens,
        sampling={name: value for name in SAMPLING_RANGES if (value := getattr(sampling, name)) is not None},
        template_kwargs={} if sampling.thinking is None else {"thinking": sampling.thinking},
    )


def _read_files(arguments: ChatArguments, prepare: PrepareMedia | None) -> list[Attachment]:
    """Read the images and videos of the first message.

    Args:
        arguments: arguments that name the files.
        prepare: function that decodes a file for the model; None decodes it for K2.5.

    Raises:
        UsageError: a file does not exist, is a folder, or cannot be read.
        ImageError: a file is too large, broken or of an unknown format, or a package is not installed.
    """
    return [read_attachment(path, kind, prepare, arguments.output.quiet) for path, kind in arguments.prompt.media]
