"""What is wrong with this machine or a cluster, and the command that fixes it."""
