"""HTTP, independent of any API: bodies, streams, limits, access control, logging."""
