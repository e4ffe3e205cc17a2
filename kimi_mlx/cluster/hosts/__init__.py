"""Hosts: names, addresses, access over ssh, and facts about their hardware and software."""
