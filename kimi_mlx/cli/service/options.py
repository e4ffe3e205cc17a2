"""Options and errors that the commands of `kimi-mlx service` share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from kimi_mlx.errors import ServiceError

if TYPE_CHECKING:
    from kimi_mlx.services.service import Service, ServiceManager

DEFAULT_NAME = "server"

NameOption = Annotated[
    str,
    typer.Option("--name", metavar="NAME", help="Name of the service; several services can run with different names."),
]
"""Name of a service."""


def find_service(name: str) -> tuple[ServiceManager, Service]:
    """Return the service manager of this machine and an installed service.

    Raises:
        ServiceError: there is no such service.
    """
    from kimi_mlx.services.choose import service_manager

    manager = service_manager()
    service = manager.read(name)
    if service is None:
        raise missing_service(name, manager.names())
    return manager, service


def missing_service(name: str, installed: list[str]) -> ServiceError:
    """Return the error for a service that is not installed."""
    if not installed:
        return ServiceError("no service is installed", hint="type `kimi-mlx service install MODEL`")
    others = " or ".join(f"`--name {each}`" for each in installed)
    return ServiceError(f"there is no service `{name}`", hint=f"installed services: {others}")
