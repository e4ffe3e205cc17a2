"""Commands of a conversation that begin with a slash."""
