"""`kimi-mlx chat`: one answer, or a conversation."""

from __future__ import annotations

import typer

from kimi_mlx.cli.chat.options import ChatArguments
from kimi_mlx.cli.option_groups import with_option_groups
from kimi_mlx.cli.options import refuse_mlx_launch


@with_option_groups
def chat(context: typer.Context, arguments: ChatArguments) -> None:
    """Chat with a model in the terminal.

    With --prompt, or with piped input, it prints one answer and exits.
    """
    refuse_mlx_launch()
    # heavy imports: not for `--help` or a usage error
    from kimi_mlx.cli.chat.run_chat import run_chat
    from kimi_mlx.cli.open_model import launch_context
    from kimi_mlx.cli.option_defaults import option_sources

    run_chat(launch_context(context), arguments, option_sources(context))
