"""The checks of `kimi-mlx doctor --gpu` on any device, for developers: `python -m kimi_mlx.gpu_check --device cpu`."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import closing
from dataclasses import replace

from kimi_mlx.gpu_check.checks import CHECKS
from kimi_mlx.gpu_check.report import check_lines, conclusion, heading, is_ok, measurement_lines, to_dict
from kimi_mlx.gpu_check.runner import describe, run_checks


def main() -> int:
    """Run the checks and print the report; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m kimi_mlx.gpu_check")
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--sizes", choices=("full", "small"), default="full")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--limit-s", type=float, help="time limit of each check; a CPU needs more than a GPU")
    names = [check.name for check in CHECKS]
    parser.add_argument("checks", nargs="*", help=f"checks to run, of {', '.join(names)}; default: all")
    options = parser.parse_args()
    if unknown := set(options.checks) - set(names):
        parser.error(f"no such check: {', '.join(sorted(unknown))}")
    checks = [check for check in CHECKS if not options.checks or check.name in options.checks]
    if options.limit_s is not None:
        checks = [replace(check, limit_s=options.limit_s) for check in checks]
    description = describe(options.device)
    print(heading(description), file=sys.stderr if options.json else sys.stdout)
    results = []
    running = run_checks(
        options.device, options.sizes, lambda check, text: print(f"{check.name}: {text}", file=sys.stderr), checks
    )
    with closing(running):
        for result in running:
            results.append(result)
            if not options.json:
                print(*check_lines(result), sep="\n", flush=True)
    if options.json:
        print(json.dumps(to_dict(description, results), indent=2))
    else:
        print(*measurement_lines(results), conclusion(results), sep="\n")
    return 0 if is_ok(results) else 1


if __name__ == "__main__":
    sys.exit(main())
