"""Background services of the user, which launchd (macOS) or systemd (Linux) starts at login and after a crash."""
