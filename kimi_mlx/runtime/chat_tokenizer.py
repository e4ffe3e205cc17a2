"""The text side of a checkpoint: tokenizer, chat template, default sampling and default length of an answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kimi_mlx.engine.request import Sampling
from kimi_mlx.errors import ImageError, TextError
from kimi_mlx.images.limits import DEFAULT_LIMITS
from kimi_mlx.runtime.generation_config import GenerationConfig
from kimi_mlx.runtime.prompt import Prompt, build_prompt
from kimi_mlx.text.media import MediaKind, take_media
from kimi_mlx.text.messages import Message
from kimi_mlx.text.output import OutputParser, opens_reasoning
from kimi_mlx.text.template import TEMPLATE_FILE, ChatTemplate
from kimi_mlx.text.tokenizer import TokenIdTokenizer, Tokenizer
from kimi_mlx.text.tool_calls import names_of

if TYPE_CHECKING:
    from kimi_mlx.images.cache import MediaCache
    from kimi_mlx.images.video import MediaChunk

MessageLike = Message | Mapping[str, Any]


@dataclass(frozen=True)
class ChatTokenizer:
    """Tokenizer, chat template and defaults of one checkpoint.

    A checkpoint may lack its tokenizer or its chat template (base models). It still loads; an error is raised
    when the missing part is needed. Without a tokenizer, prompts are token ids, and decoded text is the ids in
    decimal, each followed by a space.

    Args:
        folder: folder of the checkpoint, for error messages.
        tokenizer: converts between plain text and ids.
        template: renders messages as a prompt; None if the checkpoint has no chat template.
        sampling: recommended sampling, from `generation_config.json`, else from the caller of `load`.
        max_tokens: default limit of an answer; None is the rest of the context.
    """

    folder: Path
    tokenizer: Tokenizer
    template: ChatTemplate | None
    sampling: Sampling
    max_tokens: int | None = None

    @classmethod
    def load(cls, folder: Path, defaults: Mapping[str, float] | None = None) -> ChatTokenizer:
        """Read the text side of a checkpoint.

        Args:
            folder: folder of the checkpoint.
            defaults: sampling parameters by name, for those that `generation_config.json` does not set.

        Raises:
            TextError: a file is broken, or the tokenizer lacks a special token that the chat template uses.
        """
        tokenizer, template = Tokenizer.find(folder), ChatTemplate.find(folder)
        if tokenizer and template:
            template.check_markers(tokenizer.special_tokens, folder)
        generation = GenerationConfig.load(folder, defaults)
        return cls(
            folder, tokenizer or TokenIdTokenizer.load(folder), template, generation.sampling, generation.max_tokens
        )

    @property
    def has_tokenizer(self) -> bool:
        """Whether the checkpoint has a tokenizer; without one, prompts can only be token ids."""
        return not isinstance(self.tokenizer, TokenIdTokenizer)

    @property
    def has_chat_template(self) -> bool:
        """Whether messages can be rendered; without a template, only plain completions work."""
        return self.template is not None

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids of the tokens that end an answer."""
        return self.tokenizer.eos_token_ids

    def encode(self, text: str) -> list[int]:
        """Return the ids of plain text. Text that spells a control token stays text.

        Raises:
            TextError: the checkpoint has no tokenizer.
        """
        return self.tokenizer.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids."""
        return self.tokenizer.decode(ids)

    def apply_chat_template(
        self,
        messages: Sequence[MessageLike],
        tools: Sequence[Mapping[str, Any]] | None = None,
        **template_kwargs: Any,
    ) -> list[int]:
        """Return the ids of a conversation of text, up to the beginning of the assistant's answer.

        Args:
            messages: messages, as objects or in OpenAI's format.
            tools: OpenAI-style tools that the model may call.
            template_kwargs: variables of the chat template, such as `thinking`.

        Raises:
            TextError: the checkpoint has no chat template or no tokenizer, or the messages do not fit the template.
            ImageError: the messages have images, whose pixels ids cannot hold.
        """
        prompt = self.prompt(messages, tools, **template_kwargs)
        if prompt.images:
            raise ImageError("messages", "token ids cannot hold their images", hint="use `ChatTokenizer.prompt`")
        return prompt.ids

    def prompt(
        self,
        messages: Sequence[MessageLike],
        tools: Sequence[Mapping[str, Any]] | None = None,
        **template_kwargs: Any,
    ) -> Prompt:
        """Return the prompt of a conversation, with its images, up to the beginning of the assistant's answer.

        Images and videos are parts of a message's content: `{"type": "image_url", "image_url": {"url": DATA_URL}}`, or
        the same with `video_url`.

        Args:
            messages: messages, as objects or in OpenAI's format.
            tools: OpenAI-style tools that the model may call.
            template_kwargs: variables of the chat template, such as `thinking`.

        Raises:
            TextError: the checkpoint has no chat template or no tokenizer, or the messages do not fit the template.
            ImageError: an image or video cannot be read, there are too many, or the template has no placeholder
                for one; its `place` is such as `messages[2].content[0]`.
            ConfigError: `preprocessor_config.json` is broken or not supported.
        """
        if self.template is None:
            raise TextError(
                f"`{self.folder}` has no chat template, so it cannot answer messages",
                hint=f"use plain completions, /v1/completions of `kimi-mlx serve`, or add a `{TEMPLATE_FILE}`",
            )
        parsed = [message if isinstance(message, Message) else Message.from_dict(message) for message in messages]
        stripped, media = take_media(parsed)
        parts = self.template.render_parts(self.tokenizer, stripped, tools, **template_kwargs)
        return build_prompt(self.tokenizer, parts, media, self.prepare_media, DEFAULT_LIMITS)

    def prepare_media(self, kind: MediaKind, source: str | bytes, place: str) -> Sequence[MediaChunk]:
        """Return an image as one chunk, or the chunks of a video, as `prompt` does. The latest are cached.

        Args:
            kind: `image` or `video`.
            source: data URL, or contents of a file.
            place: name or location of the image, for error messages.

        Raises:
            ImageError: the image or video cannot be read or exceeds a limit.
            ConfigError: `preprocessor_config.json` is broken or not supported.
        """
        return self._media_cache.prepare(kind, source, place)

    @cached_property
    def _media_cache(self) -> MediaCache:
        from kimi_mlx.images.cache import MediaCache  # imports PIL, which text does not need
        from kimi_mlx.images.preprocessing import Preprocessing

        return MediaCache(Preprocessing.load(self.folder))

    def output_parser(self, prompt: Sequence[int], tools: Sequence[Mapping[str, Any]] | None = None) -> OutputParser:
        """Return a parser for the answer to a prompt.

        Args:
            prompt: token ids of the prompt.
            tools: OpenAI-style tools that the model may call.
        """
        return OutputParser(self.tokenizer, opens_reasoning(self.tokenizer, prompt), names_of(tools))
