"""`kimi-mlx doctor --gpu`: check the model on this machine's GPU."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

import typer

from kimi_mlx.cli.output import hides_messages, print_json, slow_status, stdout
from kimi_mlx.gpu_check.checks import CHECKS, Check, CheckResult, Device
from kimi_mlx.gpu_check.report import check_lines, conclusion, heading, is_ok, measurement_lines, to_dict
from kimi_mlx.gpu_check.runner import SizesName, describe, run_checks


def check_gpu(
    is_json: bool, device: Device = "gpu", sizes: SizesName = "full", checks: Sequence[Check] = CHECKS
) -> None:
    """Run the checks and print each result as it comes.

    Args:
        is_json: whether to print only a JSON document, at the end.
        device: device to check.
        sizes: how much to compute.
        checks: checks to run.

    Raises:
        UsageError: MLX has no such device here.
        typer.Exit: a check did not pass.
    """
    results: list[CheckResult] = []
    with slow_status(hides_messages(is_json)) as set_status:

        def show(check: Check, text: str) -> None:
            set_status(f"{checks.index(check) + 1} of {len(checks)}, {check.title}: {text}")

        set_status("start MLX")
        description = describe(device)
        if not is_json:
            stdout.print(heading(description), markup=False)
        with closing(run_checks(device, sizes, show, checks)) as new_results:
            for result in new_results:
                results.append(result)
                if not is_json:
                    stdout.print(*check_lines(result), sep="\n", markup=False)
    if is_json:
        print_json(to_dict(description, results))
    else:
        stdout.print(*measurement_lines(results), sep="\n", markup=False)
        stdout.print(conclusion(results), markup=False)
    if not is_ok(results):
        raise typer.Exit(1)
