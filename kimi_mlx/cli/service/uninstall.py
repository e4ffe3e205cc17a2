"""`kimi-mlx service uninstall`: stop a server and remove its service."""

from __future__ import annotations

from kimi_mlx.cli.options import JsonOption
from kimi_mlx.cli.service.options import DEFAULT_NAME, NameOption


def uninstall(name: NameOption = DEFAULT_NAME, json: JsonOption = False) -> None:
    """Stop the server and remove the service.

    Its log is removed, too. Models, API keys and the prompt cache are kept.
    """
    # heavy imports: not for `--help` or a usage error
    from kimi_mlx.cli.output import print_json, slow_status, stderr
    from kimi_mlx.services.choose import service_manager
    from kimi_mlx.services.log_file import log_path, older_log
    from kimi_mlx.services.service import check_name

    check_name(name)
    manager = service_manager()
    path = manager.path(name)
    if not path.exists():
        from kimi_mlx.cli.service.options import missing_service

        raise missing_service(name, manager.names())
    with slow_status(json) as set_status:
        set_status("stopping the server")
        manager.remove(name)
    log = log_path(name)
    if log is not None:
        log.unlink(missing_ok=True)
        older_log(log).unlink(missing_ok=True)
    if json:
        print_json({"name": name, "removed": str(path)})
    else:
        stderr.print(f"removed: {path}", markup=False)
