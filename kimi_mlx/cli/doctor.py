"""`kimi-mlx doctor`: find problems of a Mac or a cluster, and the command that fixes each."""

from __future__ import annotations

from typing import Annotated

import typer

from kimi_mlx.cli.host_options import EnvOption, HostOptions
from kimi_mlx.cli.option_groups import with_option_groups
from kimi_mlx.cli.options import DraftOption, FastSyncOption, JsonOption, ModelArgument, model_name
from kimi_mlx.cluster.hosts.hostfile_check import check_envs
from kimi_mlx.errors import UsageError


@with_option_groups
def doctor(
    hosts: HostOptions,
    model: ModelArgument = None,
    draft: DraftOption = None,
    env: EnvOption = None,
    quick: Annotated[bool, typer.Option("--quick", help="Skip the self-test.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Also show the checks that passed.")] = False,
    json: JsonOption = False,
    fast_sync: FastSyncOption = False,
    gpu: Annotated[
        bool,
        typer.Option(
            "--gpu",
            help="Instead check the model on this machine's GPU: results against the CPU, times and memory. Takes "
            "minutes, and downloads nothing.",
        ),
    ] = False,
) -> None:
    """Find problems of a Mac or cluster, and the fix."""
    _, option = hosts.read()
    if gpu:
        has_names = any(name is not None for name in (model, draft, hosts.save))
        if option or env or has_names or quick or verbose or fast_sync:
            raise UsageError(
                "--gpu checks this machine; its only other option is --json",
                hint="run `kimi-mlx doctor --gpu [--json]`, on each host",
            )
        from kimi_mlx.cli.doctor_gpu import check_gpu  # heavy: not for `--help` or a usage error

        check_gpu(json)
        return
    check_envs(env or [], "`--env`")
    if hosts.save is not None and not option:
        raise UsageError(
            "--save writes a hostfile, but no hosts are given", hint="name them: `--hosts mac-a.local,mac-b.local`"
        )
    from kimi_mlx.cli.run_doctor import run_doctor  # heavy: not for `--help` or a usage error

    name = model_name(model)
    run_doctor(hosts, env or [], name, draft, quick=quick, verbose=verbose, json=json, fast_sync=fast_sync)
