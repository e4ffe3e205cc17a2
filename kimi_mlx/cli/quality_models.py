"""Open models and tokenize texts for `kimi-mlx compare` and `kimi-mlx importance`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from kimi_mlx.cli.quality_inputs import TextOptions
from kimi_mlx.errors import UsageError
from kimi_mlx.hub.client import find_local
from kimi_mlx.model.config import load_config
from kimi_mlx.quality.layerwise import LayerwiseModel
from kimi_mlx.quality.windows import TokenWindows, divide
from kimi_mlx.runtime.chat_tokenizer import ChatTokenizer
from kimi_mlx.runtime.load import compute_dtype, prepare_device
from kimi_mlx.store.model_ref import resolve_model_name


@dataclass(frozen=True)
class QualityModel:
    """A model and its tokenizer.

    Args:
        name: name as the user typed it.
        model: the model, which is read layer by layer.
        tokenizer: its tokenizer.
    """

    name: str
    model: LayerwiseModel
    tokenizer: ChatTokenizer

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.model.config.vocab_size


def open_model(name: str, dtype: str | None) -> QualityModel:
    """Open a model on this machine.

    Raises:
        KimiMlxError: there is no such model, or files are missing or broken.
    """
    target = resolve_model_name(name)
    folder = target.folder if target.repository is None else find_local(target.repository)
    if folder is None:
        raise UsageError(
            f"the files of `{name}` are not on this machine (a store does not have them all)",
            hint=f"run `kimi-mlx download {name}`",
        )
    config = load_config(folder)
    prepare_device()
    return QualityModel(name, LayerwiseModel(folder, config, compute_dtype(dtype, config)), ChatTokenizer.load(folder))


def tokenize(model: QualityModel, texts: Sequence[str], options: TextOptions) -> TokenWindows:
    """Return the windows of texts.

    Raises:
        TextError: the model has no tokenizer, or with `--chat` no chat template.
        UsageError: too few tokens, or windows that are longer than the context.
    """
    encode = _encode_conversations if options.chat else _encode_raw
    ids = [part for text in texts for part in encode(model.tokenizer, text)]
    return divide(ids, options.window, options.tokens, model.model.config.max_position_embeddings)


def check_same_tokens(a: QualityModel, b: QualityModel, texts: Sequence[str]) -> None:
    """Check that two models have the same vocabulary, and tokenize the texts alike.

    Raises:
        UsageError: they do not.
    """
    if a.vocab_size != b.vocab_size:
        raise UsageError(
            f"`{a.name}` has a vocabulary of {a.vocab_size:,} tokens and `{b.name}` one of {b.vocab_size:,}",
            hint="compare two versions of the same model",
        )
    for number, text in enumerate(texts, 1):
        ids = [model.tokenizer.encode(text) for model in (a, b)]
        if ids[0] != ids[1]:
            raise UsageError(
                f"`{a.name}` and `{b.name}` have different tokenizers: text {number} has {len(ids[0])} tokens with the "
                f"first and {len(ids[1])} with the second",
                hint="compare two versions of the same model",
            )


def _encode_raw(tokenizer: ChatTokenizer, text: str) -> list[list[int]]:
    return [tokenizer.encode(text)]


def _encode_conversations(tokenizer: ChatTokenizer, text: str) -> list[list[int]]:
    """Return the ids of a text as a user message, or of the conversations in it, with their answers."""
    conversations = _conversations(text) or [[{"role": "user", "content": text}]]
    return [tokenizer.apply_chat_template(messages) for messages in conversations]


def _conversations(text: str) -> list[list[dict[str, Any]]]:
    """Return the conversations of a text with one JSON object per line; empty for any other text.

    Raises:
        UsageError: the first line is a conversation, and a line is a wrong one or none.
    """
    conversations: list[list[dict[str, Any]]] = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: a message may have other line separators
        if not line.strip():
            continue
        messages = _messages(line)
        if messages is None and not conversations:
            return []
        values = cast("list[Any]", messages) if isinstance(messages, list) else []
        if not values or not all(isinstance(value, dict) for value in values):
            raise UsageError(
                f"line {number} of a text with conversations has no list of messages",
                hint='write one JSON object per line, such as `{"messages": [{"role": "user", "content": "Hello"}]}`',
            )
        conversations.append(values)
    return conversations


def _messages(line: str) -> Any:
    """Return `messages` of a JSON object; None if a line is not an object, or has none."""
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return cast("dict[str, Any]", value).get("messages") if isinstance(value, dict) else None
