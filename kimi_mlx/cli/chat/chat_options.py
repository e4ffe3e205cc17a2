"""The text side of a chat's model, and the options of its answers: the user's, else the model's defaults."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from kimi_mlx.cli.chat.options import SamplingOptions
from kimi_mlx.engine.request import Sampling
from kimi_mlx.hub.catalogue import CatalogueEntry
from kimi_mlx.runtime.chat_tokenizer import ChatTokenizer
from kimi_mlx.session.conversation import ChatOptions
from kimi_mlx.store.model_ref import ModelRef


def read_tokenizer(folder: Path, target: ModelRef, sampling: SamplingOptions) -> tuple[ChatTokenizer, ChatOptions]:
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
