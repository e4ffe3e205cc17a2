"""`kimi-mlx service start`, `stop` and `restart`: the server of an installed service."""

from __future__ import annotations

from kimi_mlx.cli.options import JsonOption
from kimi_mlx.cli.service.options import DEFAULT_NAME, NameOption


def start(name: NameOption = DEFAULT_NAME, json: JsonOption = False) -> None:
    """Start the server of an installed service."""
    _apply(name, json, is_stopped=False, is_started=True)


def stop(name: NameOption = DEFAULT_NAME, json: JsonOption = False) -> None:
    """Stop the server until the next login or start."""
    _apply(name, json, is_stopped=True, is_started=False)


def restart(name: NameOption = DEFAULT_NAME, json: JsonOption = False) -> None:
    """Restart the server, e.g. after an update."""
    _apply(name, json, is_stopped=True, is_started=True)


def _apply(name: str, is_json: bool, *, is_stopped: bool, is_started: bool) -> None:
    # heavy imports: not for `--help` or a usage error
    from kimi_mlx.cli.output import print_json, slow_status, stderr
    from kimi_mlx.cli.service.options import find_service
    from kimi_mlx.cli.service.report import make_report, print_notes, report_to_dict, wait_until_up

    manager, service = find_service(name)
    manager.check()
    if is_stopped:
        with slow_status(is_json) as set_status:
            set_status("stopping the server")
            manager.stop(name)
    if is_started:
        manager.start(name)
        report = wait_until_up(manager, service, is_quiet=is_json)
    else:
        report = make_report(manager, service)
    if is_json:
        print_json(report_to_dict(report))
    elif is_started:
        print_notes(report)
    else:
        stderr.print(f"stopped: {name}", markup=False)
