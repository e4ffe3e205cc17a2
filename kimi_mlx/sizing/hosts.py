"""Memory that a model needs on its hosts, and the number of hosts that hold it."""

from __future__ import annotations

from kimi_mlx.units import GB

OVERHEAD = 0.1
"""Memory on top of the weights, as a fraction of them: temporary arrays of prefill, weights that every rank holds, and
fragmentation."""

CONTEXT_TOKENS = 8192
"""Tokens of context that the minimum memory has room for, on every host."""

SYSTEM_BYTES = 8 * GB
"""Memory for macOS and other programs, on every host."""

MAX_HOSTS = 8
"""Largest number of hosts that is suggested for a model."""


def with_overhead(weights_bytes: int) -> int:
    """Return the memory of weights and overhead."""
    return round(weights_bytes * (1 + OVERHEAD))


def minimum_memory_bytes(weights_bytes: int, kv_bytes_per_token: int, hosts: int = 1) -> int:
    """Return the memory of all hosts together: weights + 10 %, and on each host an 8k-token cache and 8 GB.

    Args:
        weights_bytes: size of the whole model in memory.
        kv_bytes_per_token: bytes per token of the KV cache of all layers, which every host holds.
        hosts: number of hosts.
    """
    return with_overhead(weights_bytes) + hosts * (CONTEXT_TOKENS * kv_bytes_per_token + SYSTEM_BYTES)


def hosts_needed(weights_bytes: int, kv_bytes_per_token: int, memory_bytes: int, gpu_bytes: int) -> int | None:
    """Return the smallest number of equal hosts that hold the model in even shares; None if above MAX_HOSTS.

    Args:
        weights_bytes: size of the whole model in memory.
        kv_bytes_per_token: bytes per token of the KV cache of all layers.
        memory_bytes: memory of each host.
        gpu_bytes: part of it that the GPU can use.
    """
    usable = min(memory_bytes, gpu_bytes + SYSTEM_BYTES)
    for hosts in range(1, MAX_HOSTS + 1):
        if minimum_memory_bytes(weights_bytes, kv_bytes_per_token, hosts) / hosts <= usable:
            return hosts
    return None
