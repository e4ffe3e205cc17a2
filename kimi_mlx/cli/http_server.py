"""The HTTP server of a loaded model: the names that it answers to, its log, and its greeting."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial

from kimi_mlx.cli.open_model import OpenedModel
from kimi_mlx.cli.output import stderr
from kimi_mlx.model.config import load_config
from kimi_mlx.runtime.chat_tokenizer import ChatTokenizer
from kimi_mlx.server.http.server_socket import ServerSocket
from kimi_mlx.server.model_info import ModelInfo
from kimi_mlx.server.server import Server, ServingOptions
from kimi_mlx.services.log_file import limit_log_size
from kimi_mlx.settings import Settings
from kimi_mlx.store.model_ref import ModelRef


def make_server(
    target: ModelRef,
    opened: OpenedModel,
    names: Sequence[str],
    options: ServingOptions,
    on_ready: Callable[[ChatTokenizer], None],
) -> Server:
    """Return the server of a loaded model.

    Args:
        target: the model.
        opened: the loaded model.
        names: additional names of the model for clients.
        options: options of the server.
        on_ready: callback, called once the server answers.
    """
    folder = opened.tokenizer_folder
    name, *aliases = served_names(target, names)
    context_tokens = load_config(folder).max_position_embeddings
    title = target.entry.title if target.entry is not None else ""
    model_info = ModelInfo(name, aliases, context_tokens, int(time.time()), title=title)
    tokenizer = ChatTokenizer.load(folder, defaults=target.sampling)
    on_start = partial(on_ready, tokenizer)
    return Server(opened.session, tokenizer, model_info, target.instant_sampling, opened.deployment, options, on_start)


def served_names(target: ModelRef, names: Sequence[str]) -> list[str]:
    """Return the names of a model in requests, without duplicates; the first one is in responses.

    Args:
        target: the model.
        names: the user's names, which come first.
    """
    entry = target.entry
    default_names = [target.name if target.folder is None or entry else target.folder.resolve().name]
    if entry is not None:
        known_names = (entry.alias, entry.repository, entry.original_repository, entry.earlier_repository)
        default_names += [name for name in known_names if name is not None]
    default_names += [name.partition("/")[2] for name in default_names if "/" in name]
    return list(dict.fromkeys([*names, *default_names]))


class ServerLogHandler(logging.StreamHandler):  # pyright: ignore[reportMissingTypeArgument]
    """Write the server's log to stderr; in a service, keep the log file small."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line."""
        limit_log_size()
        super().emit(record)


def start_log() -> None:
    """Send the server's log to stderr, one line per request."""
    handler = ServerLogHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    for name, level in (("kimi_mlx", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(level)


def key_placeholder(keys: Sequence[str]) -> str | None:
    """Return a placeholder for the key in the example command: others may see the terminal. None without keys."""
    if not keys:
        return None
    return "$KIMI_MLX_API_KEY" if Settings.from_environment().api_key in keys else "KEY"


def greet(name: str, server_socket: ServerSocket, key: str | None, tokenizer: ChatTokenizer, *, has_page: bool) -> None:
    """Print the URLs, and a command to try.

    Args:
        name: name of the model.
        server_socket: socket of the server.
        key: placeholder of the key in the command; None if no key is needed.
        tokenizer: tokenizer of the model.
        has_page: whether the web page is served.
    """
    stderr.print(f"{name} is ready at {server_socket.url}/v1 (Ctrl-C stops the server)", markup=False)
    if has_page:
        stderr.print(f"chat in the browser: {server_socket.url}", markup=False)
    if others := server_socket.other_urls:
        path = "" if has_page else "/v1"
        stderr.print(f"from other machines: {', '.join(f'{url}{path}' for url in others)}", markup=False)
    header = "" if key is None else f' -H "Authorization: Bearer {key}"'
    if tokenizer.has_chat_template and tokenizer.has_tokenizer:
        path, body = "chat/completions", '{"messages": [{"role": "user", "content": "Hello"}]}'
    elif tokenizer.has_tokenizer:
        path, body = "completions", '{"prompt": "Once upon a time", "max_tokens": 20}'
    else:
        path, body = "completions", '{"prompt": [1, 2, 3], "max_tokens": 20}'
    stderr.print(f"try: curl {server_socket.url}/v1/{path}{header} -d '{body}'", style="dim", markup=False)
