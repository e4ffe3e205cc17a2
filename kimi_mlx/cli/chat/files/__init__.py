"""Files that are attached to a message."""
