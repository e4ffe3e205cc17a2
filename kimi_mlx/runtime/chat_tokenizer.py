"""All that a checkpoint says about text: tokenizer, chat template, default sampling."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kimi_mlx.engine.request import Sampling
from kimi_mlx.errors import TextError, UsageError
from kimi_mlx.model.config import read_json
from kimi_mlx.text.messages import Message
from kimi_mlx.text.output import OutputParser, starts_in_reasoning
from kimi_mlx.text.template import ChatTemplate
from kimi_mlx.text.tokenizer import Tokenizer

DEFAULT_TEMPERATURE = 0.6
"""Where neither `generation_config.json` nor the catalogue says otherwise: the value of K2's model cards."""

MessageLike = Message | Mapping[str, Any]


@dataclass(frozen=True)
class ChatTokenizer:
    """Tokenizer, template and defaults of one checkpoint.

    Args:
        tokenizer: between plain text and ids.
        template: from messages to a prompt.
        sampling: what is recommended: by `generation_config.json`, else by who loaded it.
    """

    tokenizer: Tokenizer
    template: ChatTemplate
    sampling: Sampling

    @classmethod
    def load(cls, folder: Path, defaults: Mapping[str, float] | None = None) -> ChatTokenizer:
        """Read them from a checkpoint's folder.

        Args:
            folder: the checkpoint's.
            defaults: values of Sampling, by name, for what `generation_config.json` leaves open.

        Raises:
            TextError: a file is missing or broken.
        """
        return cls(Tokenizer.load(folder), ChatTemplate.load(folder), _default_sampling(folder, defaults or {}))

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""
        return self.tokenizer.eos_token_ids

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; control tokens in it stay text."""
        return self.tokenizer.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids."""
        return self.tokenizer.decode(ids)

    def apply_chat_template(
        self,
        messages: Sequence[MessageLike],
        tools: Sequence[Mapping[str, Any]] | None = None,
        **template_kwargs: Any,
    ) -> list[int]:
        """Ids of a conversation up to where the assistant speaks; template_kwargs such as `thinking`."""
        return self.template.encode(self.tokenizer, messages, tools, **template_kwargs)

    def output_parser(self, prompt: Sequence[int]) -> OutputParser:
        """A parser for the answer to a prompt."""
        return OutputParser(self.tokenizer, starts_in_reasoning(self.tokenizer, prompt))


def _default_sampling(folder: Path, defaults: Mapping[str, float]) -> Sampling:
    path = folder / "generation_config.json"
    raw = read_json(path) if path.exists() else {}
    if raw.get("do_sample") is False:
        return Sampling(temperature=0.0)
    names = ("temperature", "top_p", "top_k", "min_p")
    known = {name: raw[name] for name in names if raw.get(name) is not None}
    try:
        return Sampling(**{"temperature": DEFAULT_TEMPERATURE, **defaults, **known})
    except UsageError as error:
        raise TextError(f"`{path}`: {error.message}", hint="correct the file, or fetch it again") from error
