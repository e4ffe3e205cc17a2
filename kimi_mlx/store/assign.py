"""Assign source files to processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping


def assign_files(
    sizes: Mapping[int, int],
    num_processes: int,
    local_bytes: Callable[[int, int], int] = lambda process, number: 0,
) -> list[list[int]]:
    """Assign each file to one process, so that all processes get about the same number of bytes.

    Args:
        sizes: bytes of each file, by file number.
        num_processes: number of processes.
        local_bytes: (process, file number) -> bytes of the file on that process's disk. A file is assigned to a
            process that already has the largest part of it.

    Returns:
        The file numbers of each process: partly downloaded files first, then in ascending order.
    """
    assignments: list[list[int]] = [[] for _ in range(num_processes)]
    loads = [0] * num_processes
    largest = {number: max(local_bytes(process, number) for process in range(num_processes)) for number in sizes}
    for number in sorted(sizes, key=lambda number: (-largest[number], -sizes[number], number)):
        candidates = [process for process in range(num_processes) if local_bytes(process, number) == largest[number]]
        process = min(candidates, key=lambda process: loads[process])
        assignments[process].append(number)
        loads[process] += sizes[number]
    return [
        sorted(files, key=lambda number: (-local_bytes(process, number), number))
        for process, files in enumerate(assignments)
    ]
