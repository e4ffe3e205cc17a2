"""Models that a server offers, and the choice among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from kimi_mlx.errors import ServerError, UsageError

MAX_LISTED = 10
"""Maximum number of names in an error message."""

OWNERS_WITH_PROGRESS = ("kimi-mlx", "llamacpp")
"""Values of `owned_by` of servers that report progress and times if a request asks for them."""


@dataclass(frozen=True)
class ServedModel:
    """A model of a server.

    Args:
        name: name in requests.
        aliases: other names that requests may use.
        context_tokens: size of the context; 0 if the server does not report it.
        media: kinds of media besides text, `image` and `video`; None if the server does not report it.
        owner: value of `owned_by`: `kimi-mlx` for our server.
    """

    name: str
    aliases: tuple[str, ...] = ()
    context_tokens: int = 0
    media: tuple[str, ...] | None = None
    owner: str = ""

    @property
    def is_ours(self) -> bool:
        """Whether the server is `kimi-mlx serve`."""
        return self.owner == "kimi-mlx"

    @property
    def reports_progress(self) -> bool:
        """Whether the server knows `return_progress`."""
        return self.owner in OWNERS_WITH_PROGRESS


def read_models(answer: Any, url: str) -> list[ServedModel]:
    """Return the models in the answer to GET /models.

    Args:
        answer: body of the answer.
        url: address of the server, for error messages.

    Raises:
        ServerError: the answer is not a list of models.
    """
    try:
        entries = cast("Sequence[Any]", answer["data"])
        return [_read_model(entry) for entry in entries if entry.get("id")]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        hint = "check the address: it should be that of an OpenAI-compatible API"
        raise ServerError(f"{url} does not answer with a list of models", hint=hint) from error


def choose_model(models: Sequence[ServedModel], wanted: str | None, url: str) -> ServedModel:
    """Return the model with a name, or the only one.

    Args:
        models: models of the server.
        wanted: name that the user gave; None for none.
        url: address of the server, for error messages.

    Raises:
        UsageError: there is no such model, or there are several and no name was given.
    """
    for model in models:
        if wanted is not None and wanted in (model.name, *model.aliases):
            return model
    names = ", ".join(f"`{model.name}`" for model in models[:MAX_LISTED])
    names += f" and {len(models) - MAX_LISTED} more" if len(models) > MAX_LISTED else ""
    if wanted is not None:
        hint = f"it serves {names}" if models else "it serves none"
        raise UsageError(f"{url} does not serve `{wanted:.100}`", hint=hint)
    if not models:
        raise ServerError(f"{url} serves no model", hint="load one there")
    if len(models) > 1:
        hint = f"name one of them: `kimi-mlx chat {models[0].name} --url {url}`"
        raise UsageError(f"{url} serves {len(models)} models: {names}", hint=hint)
    return models[0]


def _read_model(entry: Mapping[str, Any]) -> ServedModel:
    architecture: Any = entry.get("architecture") or {}
    modalities: Any = architecture.get("input_modalities")
    meta: Any = entry.get("meta") or {}
    sizes = (entry.get("context_length"), entry.get("max_model_len"), meta.get("n_ctx"), meta.get("n_ctx_train"))
    return ServedModel(
        name=str(entry["id"]),
        aliases=tuple(map(str, entry.get("aliases") or ())),
        context_tokens=next((int(size) for size in sizes if size), 0),
        media=None if modalities is None else tuple(name for name in modalities if name in ("image", "video")),
        owner=str(entry.get("owned_by") or ""),
    )
