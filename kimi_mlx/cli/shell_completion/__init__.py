"""Completion of command lines in zsh, bash and fish: the scripts, and what they call at each Tab."""
