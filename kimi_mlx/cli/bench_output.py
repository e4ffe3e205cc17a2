"""Output of `kimi-mlx bench`: the terminal, a JSON file, a plot."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from kimi_mlx.cli.output import error_to_dict, print_json, stderr, stdout
from kimi_mlx.errors import KimiMlxError, UsageError

if TYPE_CHECKING:
    from kimi_mlx.bench.report import Report

TABLE_WIDTH = 200
"""Width of tables on any terminal, so that no number is cut; a narrow terminal wraps the lines."""


@dataclass(frozen=True)
class Output:
    """Formats and files of the results.

    Attributes:
        is_json: whether to print JSON on stdout.
        is_markdown: whether to print Markdown on stdout.
        file: JSON file to write; None for none.
        plot: PNG file to write; None for none.
    """

    is_json: bool
    is_markdown: bool
    file: Path | None
    plot: Path | None

    def check(self) -> None:
        """Check, before anything is measured, that all results can be written.

        Raises:
            UsageError: a file cannot be written, or options exclude each other.
        """
        if self.is_json and self.is_markdown:
            raise UsageError(
                "--json and --markdown exclude each other", hint="use `--output FILE` to write JSON as well"
            )
        if self.plot is not None:
            from kimi_mlx.bench.plot import require_matplotlib

            require_matplotlib()
        if self.file is not None and self.plot is not None and self.file.resolve() == self.plot.resolve():
            raise UsageError(f"--output and --plot both name `{self.plot}`", hint="name two files")
        for option, path in (("--output", self.file), ("--plot", self.plot)):
            if path is not None:
                _check_writable(option, path)

    def show(self, report: Report, stop: BaseException | None) -> None:
        """Print the results and write the files.

        Args:
            report: the results.
            stop: error or interrupt that ended the runs early; raised at the end. JSON contains an error's message.

        Raises:
            KimiMlxError: a file cannot be written, or `stop`.
            typer.Exit: `stop` is an error that is part of the JSON.
        """
        if self.is_json:
            print_json({**report.to_dict(), **(error_to_dict(stop) if isinstance(stop, KimiMlxError) else {})})
        elif self.is_markdown:
            stdout.print(report.markdown(), end="", markup=False)
        else:
            _print_tables(report)
        try:
            if self.file is not None:
                self.file.write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
            if self.plot is not None:
                from kimi_mlx.bench.plot import save_plot

                save_plot(report, self.plot)
            for path in (self.file, self.plot):
                if path is not None:
                    stderr.print(f"written: {path}", markup=False)
        except OSError as error:
            raise KimiMlxError(f"cannot write `{error.filename}`: {error.strerror}") from error
        if stop is not None:
            raise typer.Exit(1) if self.is_json and isinstance(stop, KimiMlxError) else stop


def _print_tables(report: Report) -> None:
    for line in report.heading():
        stdout.print(line, style="dim", markup=False)
    for table in report.tables():
        stdout.print()
        Console(width=TABLE_WIDTH, highlight=False, soft_wrap=True).print(table)
    stdout.print()
    for line in report.summary():
        stdout.print(line, markup=False)


def _check_writable(option: str, path: Path) -> None:
    exists = path.exists()
    try:
        with path.open("ab"):
            pass
        if not exists:
            path.unlink()
    except OSError as error:
        raise UsageError(
            f"{option}: cannot write `{path}`: {error.strerror}", hint="name a file in an existing folder"
        ) from error
