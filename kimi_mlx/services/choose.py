"""The service manager of this machine."""

from __future__ import annotations

import sys

from kimi_mlx.services.launchd import LaunchAgents
from kimi_mlx.services.service import ServiceManager
from kimi_mlx.services.systemd import UserUnits


def service_manager() -> ServiceManager:
    """Return launchd on macOS, systemd elsewhere."""
    return LaunchAgents() if sys.platform == "darwin" else UserUnits()
