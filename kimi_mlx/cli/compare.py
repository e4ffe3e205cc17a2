"""`kimi-mlx compare`: measure how much a model differs from another one, on the same text."""

from __future__ import annotations

from typing import Annotated

import typer

from kimi_mlx.cli.option_groups import with_option_groups
from kimi_mlx.cli.options import JsonOption
from kimi_mlx.cli.quality_inputs import TextArguments, TextOptions, read_texts


@with_option_groups
def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="Reference model: an alias, a folder, or a repository.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Model to judge, such as a quantized version of A.")],
    texts: TextArguments,
    options: TextOptions,
    json: JsonOption = False,
) -> None:
    """Compare two models on the same text.

    Prints the divergence KL(A || B) of the next-token distributions (0: equal), how often both prefer the same token,
    and the perplexity of both. Both models are read layer by layer, first A, then B, so that only one layer is in
    memory, beside the hidden states of all tokens. Works in one process.
    """
    # heavy imports: not for `--help` or a usage error
    from dataclasses import asdict

    from kimi_mlx.cli.output import hides_messages, load_progress, print_json, print_note, stdout
    from kimi_mlx.cli.quality_models import check_same_tokens, open_model, tokenize
    from kimi_mlx.quality.compare import compare as compare_models
    from kimi_mlx.units import format_bytes

    is_quiet = hides_messages(json)
    contents = read_texts(texts)
    first, second = (open_model(name, options.dtype) for name in (a, b))
    check_same_tokens(first, second, contents)
    windows = tokenize(first, contents, options)
    with load_progress("comparing", is_quiet) as progress:
        result = compare_models(first.model, second.model, windows.windows, progress)
    if json:
        sizes = {
            "a": {"model": a, "bytes": first.model.size_bytes},
            "b": {"model": b, "bytes": second.model.size_bytes},
        }
        text = {"texts": len(contents), "tokens": windows.num_tokens, "tokens_left_out": windows.num_left_out}
        print_json({**sizes, **text, "window": options.window, "prompt": options.prompt, **asdict(result)})
        return
    if windows.num_left_out:
        print_note(f"{windows.num_left_out:,} tokens are left out: --tokens limits them to {options.tokens:,}")
    lines = (
        f"A  {a}, {format_bytes(first.model.size_bytes)}",
        f"B  {b}, {format_bytes(second.model.size_bytes)}",
        f"{len(contents)} text{'s' * (len(contents) > 1)}, {windows.num_tokens:,} tokens in windows of at most "
        f"{options.window:,}, {options.description}",
        "",
        f"KL(A || B)       mean {result.kl_mean:.4g}, p90 {result.kl_p90:.4g}, max {result.kl_max:.4g}",
        f"top-1 agreement  {100 * result.top1_agreement:.2f} %",
        f"perplexity       A {result.perplexity_a:.4g}, B {result.perplexity_b:.4g}",
    )
    stdout.print("\n".join(lines), markup=False)
