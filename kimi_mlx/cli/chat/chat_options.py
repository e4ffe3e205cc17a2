"""The text side of a chat's model, and the options of its answers that the user has set."""

from __future__ import annotations

from pathlib import Path

from kimi_mlx.cli.chat.options import SamplingOptions
from kimi_mlx.cli.chat.schema import SCHEMA_NAME, Schema
from kimi_mlx.runtime.chat_tokenizer import ChatTokenizer
from kimi_mlx.session.chat_model import ChatOptions
from kimi_mlx.store.model_ref import ModelRef

SAMPLING_NAMES = ("temperature", "top_p", "top_k", "min_p", "seed")
"""Sampling parameters that a user can set."""


def read_tokenizer(folder: Path, target: ModelRef) -> ChatTokenizer:
    """Read the tokenizer of a checkpoint.

    Raises:
        TextError: a file is broken, or the checkpoint cannot chat.
    """
    entry = target.entry
    tokenizer = ChatTokenizer.load(folder, defaults=entry.default_sampling() if entry else None)
    tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}])  # refuses a base model before it is loaded
    return tokenizer


def instant_sampling(target: ModelRef) -> dict[str, float]:
    """Return the catalogue's recommended sampling parameters without thinking, by name."""
    instant = target.entry.instant_sampling if target.entry else None
    return instant.recommended() if instant else {}


def chat_options(sampling: SamplingOptions, schema: Schema | None = None) -> ChatOptions:
    """Return what the user has set of the options of answers.

    Args:
        sampling: options of how tokens are sampled.
        schema: JSON schema of the answers; None for text.
    """
    return ChatOptions(
        response_schema=schema,
        response_schema_name=SCHEMA_NAME,
        max_tokens=sampling.max_tokens,
        sampling={name: value for name in SAMPLING_NAMES if (value := getattr(sampling, name)) is not None},
        template_kwargs={} if sampling.thinking is None else {"thinking": sampling.thinking},
    )
