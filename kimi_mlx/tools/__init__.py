"""Tools of MCP servers: start the servers, declare their tools to the model, and call them.

The official SDK (`mcp`, an extra) speaks the protocol. This package imports it only in the thread of the servers.
"""
