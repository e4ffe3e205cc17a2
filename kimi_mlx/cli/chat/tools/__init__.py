"""Tools of MCP servers in a chat: opening, permission, and the loop of calls and results."""
