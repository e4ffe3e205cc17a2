"""Client of a running server: chats with a model that another process has loaded."""
