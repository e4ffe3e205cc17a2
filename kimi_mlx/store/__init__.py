"""Shard stores: one rank's share of a model on disk; built from a checkpoint, found, checked and loaded."""
