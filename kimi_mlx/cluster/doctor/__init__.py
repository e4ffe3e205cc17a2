"""Diagnose this machine or a cluster: problems, and the commands that fix them."""
