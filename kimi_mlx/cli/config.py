"""`kimi-mlx config`: the values of a command's options, and where each of them comes from."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from kimi_mlx.cli.options import JsonOption

ConfigTopic = Literal["chat", "serve", "bench", "launch", "path"]


def config(
    context: typer.Context,
    topic: Annotated[
        ConfigTopic,
        typer.Argument(
            metavar="COMMAND|path",
            help="`chat`, `serve`, `bench` or `launch`: show the values of its options. `path`: print the path of "
            "config.toml.",
        ),
    ] = "chat",
    preset: Annotated[
        str | None,
        typer.Option("--preset", metavar="FILE", help="Preset of a chat, as in `kimi-mlx chat --preset FILE`."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Show defaults of options, and where they are set.

    From the strongest to the weakest: the command line, a preset, environment variables, config.toml, the model.
    """
    # heavy imports: not for `--help` or a usage error
    from kimi_mlx.cli.config_report import print_config_path, print_option_values

    if topic == "path":
        print_config_path(is_json=json)
    else:
        print_option_values(context, topic, preset, is_json=json)
