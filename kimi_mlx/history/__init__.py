"""The history of chats: conversations in an SQLite file of the user's data folder.

Each turn is written while it happens, so a chat that is killed loses nothing that it has shown.
"""
