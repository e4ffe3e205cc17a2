"""Load a model and chat with it: one answer, or a conversation."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import typer

from kimi_mlx.cli.chat.attachments import Attachment, PrepareMedia, read_attachment, show_attachment, with_attachments
from kimi_mlx.cli.chat.command import PromptOptions, SamplingOptions
from kimi_mlx.cli.chat.media_files import check_files
from kimi_mlx.cli.chat.one_shot import print_answer, print_answer_json
from kimi_mlx.cli.chat.prompt import read_prompt, resolve_chat_model
from kimi_mlx.cli.open_model import LaunchContext, PreparedModel, open_session, prepare_model, session_options
from kimi_mlx.cli.options import DiskCacheOptions, RunOptions
from kimi_mlx.cli.vision_check import require_vision, require_vision_in_catalogue
from kimi_mlx.engine.request import Sampling
from kimi_mlx.errors import UsageError
from kimi_mlx.hub.catalogue import CatalogueEntry
from kimi_mlx.images.limits import DEFAULT_LIMITS
from kimi_mlx.runtime.chat_tokenizer import ChatTokenizer
from kimi_mlx.session.conversation import ChatOptions, Conversation
from kimi_mlx.session.session import SessionOptions
from kimi_mlx.store.model_ref import ModelRef


def run_chat(
    launch: LaunchContext | None,
    run: RunOptions,
    prompts: PromptOptions,
    sampling: SamplingOptions,
    disk: DiskCacheOptions,
    *,
    is_json: bool,
) -> None:
    """Answer one prompt, or hold a conversation until the user exits.

    Args:
        launch: launched hosts; None for this machine.
        run: options of the model.
        prompts: prompt, system prompt, and files of the first message.
        sampling: options of how tokens are sampled.
        disk: options of the prompt cache on disk.
        is_json: whether to print JSON.

    Raises:
        KimiMlxError: wrong usage, the model cannot be loaded, or a file cannot be read.
        typer.Exit: the conversation has ended.
    """
    target = resolve_chat_model(run.model_name, prompts.prompt)
    if len(prompts.files) > (limit := DEFAULT_LIMITS.max_images):
        raise UsageError(f"{len(prompts.files)} images and videos are more than {limit}", hint="send fewer of them")
    check_files(path for path, _ in prompts.files)
    prompt = read_prompt(prompts.prompt, is_json)
    if prompts.files and target.folder is None:
        require_vision_in_catalogue(target)
    options = session_options(run, disk, has_sampling=sampling.temperature != 0)
    model = prepare_model(launch, target, run, is_quiet=is_json)
    with _open_conversation(target, model, options, prompts, sampling, run.ranks, is_json) as (conversation, files):
        if prompt is None:
            from kimi_mlx.cli.chat.repl import run_repl  # prompt_toolkit: not for a single answer

            raise typer.Exit(run_repl(conversation, target.name, files))
        content = with_attachments(prompt, files)
        if is_json:
            print_answer_json(conversation, content, model.choice)
        else:
            for file in files:
                show_attachment(file)
            print_answer(conversation, content)


@contextmanager
def _open_conversation(
    target: ModelRef,
    model: PreparedModel,
    options: SessionOptions,
    prompts: PromptOptions,
    sampling: SamplingOptions,
    ranks: int,
    is_quiet: bool,
) -> Generator[tuple[Conversation, list[Attachment]]]:
    """Load a model and read the files of the first message.

    Yields:
        The conversation, and the files.
    """
    early = None
    if model.folder is not None:  # before loading: its errors come early, and its defaults may be greedy
        if prompts.files:
            require_vision(model.folder, target.name)
        early = _read_tokenizer(model.folder, target, sampling)
        options = replace(options, has_sampling=_is_sampling(early[1]))
    files = _read_files(prompts, early[0].prepare_media if early else None, is_quiet)
    opened = open_session(model, options, ranks, is_quiet)
    with closing(opened.session) as session:
        tokenizer, chat_options = early or _read_tokenizer(opened.tokenizer_folder, target, sampling)
        conversation = Conversation(session, tokenizer, chat_options, prompts.system)
        if files and conversation.image_error is not None:
            raise conversation.image_error
        if early is None:  # again, with the limits of the hosts' model
            files = _read_files(prompts, tokenizer.prepare_media, is_quiet)
        yield conversation, files


def _read_files(prompts: PromptOptions, prepare: PrepareMedia | None, is_quiet: bool) -> list[Attachment]:
    """Read the images and videos of the first message.

    Args:
        prompts: options that name the files.
        prepare: function that decodes a file for the model; None decodes it for K2.5.
        is_quiet: whether to show no status if it takes long.

    Raises:
        UsageError: a file does not exist, is a folder, or cannot be read.
        ImageError: a file is too large, broken or of an unknown format, or a package is not installed.
    """
    return [read_attachment(path, kind, prepare, is_quiet) for path, kind in prompts.files]


def _read_tokenizer(folder: Path, target: ModelRef, sampling: SamplingOptions) -> tuple[ChatTokenizer, ChatOptions]:
    """Read the tokenizer of a checkpoint, and combine its defaults with the user's options.

    Raises:
        TextError: a file is broken, or the checkpoint cannot chat.
    """
    entry = target.entry
    tokenizer = ChatTokenizer.load(folder, defaults=entry.default_sampling() if entry else None)
    tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}])  # refuses a base model before it is loaded
    parameters = merge_sampling(tokenizer.sampling, entry if sampling.thinking is False else None, sampling)
    template = {} if sampling.thinking is None else {"thinking": sampling.thinking}
    return tokenizer, ChatOptions(sampling.max_tokens, parameters, None, template)


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
    user_values = {name: value for name in names if (value := getattr(options, name)) is not None}
    return replace(recommended, **{**without_thinking, **user_values})
