"""`kimi-mlx convert`: convert a checkpoint of any supported format to MLX's affine quantization."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from kimi_mlx.cli.option_groups import with_option_groups
from kimi_mlx.cli.options import QUANTIZATION, JsonOption, NoVisionOption
from kimi_mlx.weights.presets import TABLE_HEADER, preset_rows

if TYPE_CHECKING:
    from kimi_mlx.weights.convert_options import ConvertOptions

Bits = Literal["2", "3", "4", "5", "6", "8", "bf16"]


@dataclass(frozen=True)
class QuantizationOptions:
    """Options of the target format."""

    preset: Annotated[
        Literal["2bit", "2.5bit", "3bit", "4bit"] | None,
        typer.Option(
            "--preset",
            help="Bits of each kind of matrix, from the table below. Matrices that SRC stores with no more bits are "
            "copied unchanged. Where the columns do not divide into the groups, they are smaller.",
            show_default=False,
            rich_help_panel=QUANTIZATION,
        ),
    ] = None
    bits: Annotated[
        Bits | None,
        typer.Option(
            "--bits",
            help="Bits of all quantizable matrices; bf16 keeps them as bfloat16. Default: copy quantized matrices "
            "unchanged, or use 4 bits if there are none (FP8, floats).",
            show_default=False,
            rich_help_panel=QUANTIZATION,
        ),
    ] = None
    expert_bits: Annotated[
        Bits | None,
        typer.Option(
            "--expert-bits",
            help="Bits of the routed experts, which are most of the model. Default: --bits. With --expert-bits, --bits "
            "applies to the rest (default: 8).",
            show_default=False,
            rich_help_panel=QUANTIZATION,
        ),
    ] = None
    group_size: Annotated[
        Literal["32", "64", "128"] | None,
        typer.Option(
            "--group-size",
            help="Number of values that share a scale and a bias. Default: 64; 32 if SRC has experts in groups of 32.",
            show_default=False,
            rich_help_panel=QUANTIZATION,
        ),
    ] = None
    scales: Annotated[
        Literal["search", "min-max"] | None,
        typer.Option(
            "--scales",
            help="`search`: scales and biases of least squared error, found group by group; slower. `min-max`: those "
            "of mlx-lm. Both give the same format and size. Default: search with --preset or --importance, else "
            "min-max.",
            show_default=False,
            rich_help_panel=QUANTIZATION,
        ),
    ] = None
    importance: Annotated[
        Path | None,
        typer.Option(
            "--importance",
            metavar="FILE",
            help="Weigh errors by how strongly the model uses each column: a file that `kimi-mlx importance` made "
            "from this model, in any format.",
            show_default=False,
            rich_help_panel=QUANTIZATION,
        ),
    ] = None

    def to_options(self, no_vision: bool) -> ConvertOptions:
        """Return the options as numbers.

        Raises:
            UsageError: --importance with --scales min-max, which does not weigh errors.
        """
        from kimi_mlx.errors import UsageError
        from kimi_mlx.weights.convert_options import ConvertOptions

        if self.importance is not None and self.scales == "min-max":
            raise UsageError("--importance has no effect with --scales min-max", hint="omit one of them")
        is_searched = self.preset is not None or self.importance is not None
        return ConvertOptions(
            _number(self.bits),
            _number(self.expert_bits),
            int(self.group_size) if self.group_size else None,
            no_vision,
            self.preset,
            self.scales or ("search" if is_searched else "min-max"),
        )


def _table() -> str:
    rows = [TABLE_HEADER, *preset_rows()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(TABLE_HEADER))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(f"  {line}" for line in lines)


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="Checkpoint to convert: an alias, a folder, or a Hugging Face repository `owner/name`; FP8, INT4, "
            "floats, or MLX's own format.",
        ),
    ],
    target: Annotated[
        Path, typer.Argument(metavar="DST", help="New folder, or one with an unfinished run of the same conversion.")
    ],
    quantization: QuantizationOptions,
    no_vision: NoVisionOption = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Only show what would be done, the size of the result, and how long the search for scales takes here. "
            "It needs no weights, and for a known model no network.",
        ),
    ] = False,
    json: JsonOption = False,
) -> None:
    """Convert a checkpoint to MLX's quantized format.

    mlx-lm and others read the result too. Memory use is small for any model size. Run the same command again to
    resume. Tensors already in the requested format are copied unchanged; others are re-quantized, which loses more
    than quantizing the original floats. Norms and the router are never quantized. Floats keep the type of SRC. A vision
    tower is copied unchanged.
    """
    # heavy imports: not for `--help` or a usage error
    from kimi_mlx.cli.convert_model import convert_model, show_conversion

    options, folder = quantization.to_options(no_vision), target.expanduser()
    if dry_run:
        show_conversion(source, folder, options, quantization.importance, is_json=json)
    else:
        convert_model(source, folder, options, quantization.importance, is_json=json)


convert.__doc__ = f"""{inspect.cleandoc(convert.__doc__ or "")}

Bits of each preset (gate, up and down are the projections of routed experts; the router becomes float32):

\b
{_table()}
"""
convert = with_option_groups(convert)


def _number(bits: Bits | None) -> int | None:
    from kimi_mlx.weights.convert_options import BFLOAT16_BITS

    return None if bits is None else BFLOAT16_BITS if bits == "bf16" else int(bits)
