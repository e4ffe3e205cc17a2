"""How a chat is shown: Markdown as it streams, on terminals and as plain text."""
