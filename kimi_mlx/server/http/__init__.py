"""HTTP without any one API: bodies, streams, limits, access control, logging."""
