"""Hosts: their names, how to reach them, and what they are."""
