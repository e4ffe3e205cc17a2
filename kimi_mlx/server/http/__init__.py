"""HTTP without any API: bodies, streams, limits, access."""
