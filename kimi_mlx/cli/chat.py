"""`kimi-mlx chat`: one answer, or a conversation."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kimi_mlx.cli.option_groups import with_option_groups
from kimi_mlx.cli.options import SAMPLING, DiskCacheOptions, JsonOption, RunOptions, refuse_mlx_launch

MAX_TEMPERATURE = 2
"""Maximum temperature: that of the OpenAI API."""

if TYPE_CHECKING:
    from kimi_mlx.cli.attachments import Attachment, PrepareMedia
    from kimi_mlx.engine.request import Sampling
    from kimi_mlx.hub.catalogue import CatalogueEntry
    from kimi_mlx.runtime.chat_tokenizer import ChatTokenizer
    from kimi_mlx.session.conversation import ChatOptions
    from kimi_mlx.store.model_ref import ModelRef
    from kimi_mlx.text.media import MediaKind


@dataclass(frozen=True)
class SamplingOptions:
    """Options of how tokens are sampled; None takes the model's default."""

    temperature: Annotated[
        float | None,
        typer.Option(
            "--temperature",
            "--temp",
            "-t",
            min=0,
            max=MAX_TEMPERATURE,
            help="Sampling temperature; 0 is greedy. Default: the model's.",
            rich_help_panel=SAMPLING,
        ),
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option(
            "--top-p",
            min=0,
            max=1,
            metavar="P",
            help="Nucleus sampling: keep the most likely tokens whose probabilities add up to P.",
            rich_help_panel=SAMPLING,
        ),
    ] = None
    top_k: Annotated[
        int | None,
        typer.Option(
            "--top-k",
            min=0,
            metavar="K",
            help="Sample from the K most likely tokens; 0 disables.",
            rich_help_panel=SAMPLING,
        ),
    ] = None
    min_p: Annotated[
        float | None,
        typer.Option(
            "--min-p",
            min=0,
            max=1,
            metavar="P",
            help="Drop tokens with less than P times the top token's probability.",
            rich_help_panel=SAMPLING,
        ),
    ] = None
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Random seed.", rich_help_panel=SAMPLING)] = None
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
    image: Annotated[
        list[Path] | None,
        typer.Option(
            "--image",
            "-i",
            metavar="FILE",
            help="Image for the prompt, or for the first message; repeatable.",
            show_default=False,
        ),
    ] = None
    video: Annotated[
        list[Path] | None,
        typer.Option(
            "--video",
            metavar="FILE",
            help="Video for the prompt, or for the first message; repeatable. Needs the extra `kimi-mlx[video]`.",
            show_default=False,
        ),
    ] = None

    @property
    def files(self) -> list[tuple[Path, MediaKind]]:
        """Images, then videos."""
        return [*((path, "image") for path in self.image or ()), *((path, "video") for path in self.video or ())]

    def read_attachments(self, prepare: PrepareMedia | None = None) -> list[Attachment]:
        """Read the images and videos.

        Args:
            prepare: function that decodes a file for the model; None decodes it for K2.5.

        Raises:
            UsageError: a file does not exist, is a folder, or cannot be read.
            ImageError: a file is too large, broken or of an unknown format, or an extra is not installed.
        """
        from kimi_mlx.cli.attachments import read_attachment  # heavy: not for `--help` or a usage error

        return [read_attachment(path, kind, prepare) for path, kind in self.files]


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
    refuse_mlx_launch()
    # heavy imports: not for `--help` or a usage error
    from kimi_mlx.cli.attachments import (
        require_vision,
        require_vision_in_catalogue,
        show_attachment,
        with_attachments,
    )
    from kimi_mlx.cli.chat_answer import print_answer, print_answer_json
    from kimi_mlx.cli.chat_prompt import read_prompt, resolve_chat_model
    from kimi_mlx.cli.media_files import check_files
    from kimi_mlx.cli.open_model import launch_context, open_session, prepare_model, session_options
    from kimi_mlx.session.conversation import Conversation

    target = resolve_chat_model(run.model_name, prompts.prompt)
    check_files(path for path, _ in prompts.files)
    prompt = read_prompt(prompts.prompt, json)
    if prompts.files and target.folder is None:
        require_vision_in_catalogue(target)
    options = session_options(run, disk, has_sampling=sampling.temperature != 0)
    prepared = prepare_model(launch_context(context), target, run, is_quiet=json)
    early = None
    if prepared.folder is not None:  # before loading: its errors come early, and its defaults may be greedy
        if prompts.files:
            require_vision(prepared.folder, target.name)
        early = _read_tokenizer(prepared.folder, target, sampling)
        options = replace(options, has_sampling=_is_sampling(early[1]))
    attachments = prompts.read_attachments(early[0].prepare_media if early else None)
    opened = open_session(prepared, options, run.ranks, json)
    with closing(opened.session) as session:
        tokenizer, chat_options = early or _read_tokenizer(opened.tokenizer_folder, target, sampling)
        conversation = Conversation(session, tokenizer, chat_options, prompts.system)
        if attachments:
            if conversation.image_error is not None:
                raise conversation.image_error
            if early is None:  # again, with the limits of the hosts' model
                attachments = prompts.read_attachments(tokenizer.prepare_media)
        if prompt is None:
            from kimi_mlx.cli.repl import run_repl  # prompt_toolkit: not for a single answer

            raise typer.Exit(run_repl(conversation, target.name, attachments))
        content = with_attachments(prompt, attachments)
        if json:
            print_answer_json(conversation, content, prepared.choice)
        else:
            for attachment in attachments:
                show_attachment(attachment)
            print_answer(conversation, content)


def _read_tokenizer(folder: Path, target: ModelRef, sampling: SamplingOptions) -> tuple[ChatTokenizer, ChatOptions]:
    """Read the tokenizer of a checkpoint, and combine its defaults with the user's options.

    Raises:
        TextError: a file is broken, or the checkpoint cannot chat.
    """
    from kimi_mlx.runtime.chat_tokenizer import ChatTokenizer
    from kimi_mlx.session.conversation import ChatOptions

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
