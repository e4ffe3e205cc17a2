"""The web page of the server: its files, and the endpoint that turns Markdown into HTML for it."""
