"""A process on a host, and the JSON messages that are exchanged with it."""
