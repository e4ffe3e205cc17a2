"""A process on a host, and the JSON messages exchanged with it."""
