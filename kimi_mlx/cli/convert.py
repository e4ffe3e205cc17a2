"""`kimi-mlx convert`: convert a checkpoint of any supported format to MLX's affine quantization."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from kimi_mlx.cli.option_groups import with_option_groups
from kimi_mlx.cli.options import QUANTIZATION, JsonOption, NoVisionOption

if TYPE_CHECKING:
    from kimi_mlx.weights.convert_options import ConvertOptions

Bits = Literal["2", "3", "4", "5", "6", "8", "bf16"]


@dataclass(frozen=True)
class QuantizationOptions:
    """Options of the target format."""

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

    def to_options(self, no_vision: bool) -> ConvertOptions:
        """Return the options as numbers."""
        from kimi_mlx.weights.convert_options import ConvertOptions

        group_size = int(self.group_size) if self.group_size else None
        return ConvertOptions(_number(self.bits), _number(self.expert_bits), group_size, no_vision)


@with_option_groups
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
        bool, typer.Option("--dry-run", help="Only show what would be done and the size of the result.")
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
        show_conversion(source, folder, options, is_json=json)
    else:
        convert_model(source, folder, options, is_json=json)


def _number(bits: Bits | None) -> int | None:
    from kimi_mlx.weights.convert_options import BFLOAT16_BITS

    return None if bits is None else BFLOAT16_BITS if bits == "bf16" else int(bits)
