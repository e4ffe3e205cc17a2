"""`kimi-mlx importance`: measure which input columns of a model's matrices matter, for `kimi-mlx convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kimi_mlx.cli.option_groups import with_option_groups
from kimi_mlx.cli.options import JsonOption
from kimi_mlx.cli.quality_inputs import TextArguments, TextOptions, read_texts


@with_option_groups
def importance(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="An alias, a folder, or a repository, in any format.")],
    texts: TextArguments,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="File to write (safetensors).")],
    options: TextOptions,
    json: JsonOption = False,
) -> None:
    """Measure which inputs of a model matter.

    Runs the texts through the model and writes the mean squared activation of each input column of each matrix, and of
    each expert, to a file for `kimi-mlx convert --importance`. Use text like that which the model will see, some ten
    thousand tokens of it, so that most experts are chosen. The model is read layer by layer, so that only one layer is
    in memory. Works in one process.
    """
    # heavy imports: not for `--help` or a usage error
    from kimi_mlx.cli.output import hides_messages, print_json, print_note, stdout
    from kimi_mlx.cli.quality_models import open_model
    from kimi_mlx.cli.write_importance import check_output, measure_importance
    from kimi_mlx.weights.convert_report import list_importance_notes
    from kimi_mlx.weights.importance import Importance

    is_quiet = hides_messages(json)
    contents, target = read_texts(texts), output.expanduser()
    check_output(target)
    opened = open_model(model, options.dtype)
    windows = measure_importance(opened, contents, options, target, is_quiet)
    written = Importance(target)
    coverage = written.coverage()
    if json:
        print_json(
            {
                "file": str(target),
                "bytes": target.stat().st_size,
                "tokens": windows.num_tokens,
                "tokens_left_out": windows.num_left_out,
                "prompt": options.prompt,
                "experts": coverage.experts,
                "rare_experts": coverage.rare,
                "unseen_experts": coverage.unseen,
            }
        )
        return
    if windows.num_left_out:
        print_note(f"{windows.num_left_out:,} tokens are left out: --tokens limits them to {options.tokens:,}")
    stdout.print(
        f"{target}: {windows.num_tokens:,} tokens, {options.description}; {coverage.experts - coverage.rare:,} of "
        f"{coverage.experts:,} experts have importance of their own",
        markup=False,
    )
    for note in list_importance_notes(written):
        print_note(f"note: {note}")
