"""Run Hypothesis without time limits, because the machine may be busy."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile("no-time-limit", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("no-time-limit")
