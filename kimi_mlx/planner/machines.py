"""Macs: the chips of `chips.json`, and machines as the user writes them, such as `m3-ultra-512x2,m4-max-128`."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from kimi_mlx.cluster.hosts.machine import gpu_limit
from kimi_mlx.errors import UsageError
from kimi_mlx.sizing.hosts import usable_bytes
from kimi_mlx.units import GIB

MAX_MACHINES = 8

RDMA_THUNDERBOLT = 5
"""Thunderbolt generation that RDMA needs (with macOS 26.2)."""

SIMILAR_NAME_RATIO = 0.7
"""difflib's similarity from which a machine is suggested: `m3-ulta-512` has similar names, `mac-studio` has none."""

MACHINES_HINT = "name the Macs to plan for, for example `--machines m3-ultra-512x2`"
"""Hint for machines that the planner cannot predict."""

_MACHINE = re.compile(r"(?P<chip>m\d+(-[a-z]+?)?)(-(?P<memory>\d+)(-?gb)?)?(x(?P<count>\d+))?")


@dataclass(frozen=True)
class Chip:
    """A row of `chips.json`; None for unknown values.

    Args:
        chip: name, such as `m3-ultra`.
        gpu_cores: number of GPU cores of this variant.
        bandwidth_gb_per_s: memory bandwidth, as published by Apple.
        tflops_fp16: fp16 rate of the GPU's matrix multiplications.
        memory_gb: memory sizes that were sold, in GiB.
        thunderbolt: Thunderbolt generation.
        thunderbolt_ports: largest number of ports.
        watts_idle: idle power at the wall.
        watts_max: maximum power at the wall.
        price_usd: price of the cheapest Mac, by memory size.
        source: source of these facts.
        unverified: facts that the source does not confirm.
    """

    chip: str
    gpu_cores: int
    bandwidth_gb_per_s: float
    tflops_fp16: float
    memory_gb: tuple[int, ...]
    thunderbolt: int
    thunderbolt_ports: int
    watts_idle: float | None
    watts_max: float | None
    price_usd: Mapping[str, float]
    source: str
    unverified: str | None

    @property
    def bandwidth_bytes_per_s(self) -> float:
        """Memory bandwidth."""
        return self.bandwidth_gb_per_s * 1e9

    @property
    def flops(self) -> float:
        """Operations per second of the GPU's matrix multiplications."""
        return self.tflops_fp16 * 1e12

    @property
    def has_rdma(self) -> bool:
        """Whether the chip supports RDMA over Thunderbolt."""
        return self.thunderbolt >= RDMA_THUNDERBOLT


UNKNOWN_CHIP = Chip("unknown", 0, 0, 0, (), 0, 0, None, None, {}, "not in the table", None)


@dataclass(frozen=True)
class Machine:
    """A host of a plan.

    Args:
        name: the user's name for it.
        chip: its chip.
        memory_bytes: size of its memory.
        gpu_bytes: memory that its GPU can use now.
    """

    name: str
    chip: Chip
    memory_bytes: int
    gpu_bytes: int

    @property
    def is_known(self) -> bool:
        """Whether its speed can be predicted."""
        return self.chip is not UNKNOWN_CHIP

    @property
    def raised_gpu_bytes(self) -> int:
        """Memory that the GPU can use once `iogpu.wired_limit_mb` is raised, with a reserve for the system."""
        return max(self.gpu_bytes, usable_bytes(self.memory_bytes))

    @property
    def price_usd(self) -> float | None:
        """Price when new."""
        return self.chip.price_usd.get(str(self.memory_bytes // GIB))


@cache
def chips() -> tuple[Chip, ...]:
    """Return all known chips. Of several variants, the one with more GPU cores comes first."""
    text = resources.files("kimi_mlx.planner").joinpath("chips.json").read_text(encoding="utf-8")
    rows: list[dict[str, Any]] = json.loads(text)["chips"]
    for row in rows:
        row["memory_gb"] = tuple(row["memory_gb"])
    return tuple(Chip(**row) for row in rows)


def machine_names() -> list[str]:
    """Return the names of all known machines."""
    return [f"{chip.chip}-{memory}" for chip in chips() for memory in chip.memory_gb]


def parse_machines(text: str) -> tuple[Machine, ...]:
    """Parse `CHIP-GB`, `CHIP-GBxCOUNT`, or several of them separated by commas.

    Raises:
        UsageError: unknown machine (the hint has similar names), or too many machines.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise UsageError(
            f"`{text}` has a comma without a machine" if text.strip(", ") else "no machine is named", hint=MACHINES_HINT
        )
    names = [name for word in words for name in _names(word)]
    if len(names) > MAX_MACHINES:
        raise UsageError(f"{len(names)} machines, but at most {MAX_MACHINES} can be planned for", hint="remove some")
    has_duplicates = len(names) != len(set(names))
    return tuple(
        make_machine(f"{name} #{index + 1}" if has_duplicates else name, *_chip_and_memory(name))
        for index, name in enumerate(names)
    )


def _names(word: str) -> list[str]:
    """Return the names of one or more equal machines, such as `m3-ultra-512x2`."""
    match = _MACHINE.fullmatch(re.sub(r"[\s_-]+", "-", word.strip().lower()))
    sizes = [] if match is None else _memory_sizes(match["chip"])
    if match is None or not sizes:
        raise UsageError(f"unknown machine `{word}`", hint=_similar_names_hint(word.lower()))
    if match["memory"] is None or int(match["memory"]) not in sizes:
        raise UsageError(_memory_problem(word, match["chip"], match["memory"]), hint=_memory_hint(match["chip"], sizes))
    count = int(match["count"] or 1)
    if not 1 <= count <= MAX_MACHINES:
        raise UsageError(f"`{word}` means {count} machines", hint=f"use 1 to {MAX_MACHINES}")
    return [f"{match['chip']}-{int(match['memory'])}"] * count


def _memory_sizes(chip: str) -> list[int]:
    """Return all memory sizes that a chip was sold with, in GB; none for an unknown chip."""
    return sorted(size for known in chips() if known.chip == chip for size in known.memory_gb)


def _memory_problem(word: str, chip: str, memory: str | None) -> str:
    if memory is None:
        return f"`{word}` does not say how much memory the Mac has"
    return f"`{word}`: no Mac with {chip} and {memory} GB was sold"


def _memory_hint(chip: str, sizes: Sequence[int]) -> str:
    listed = f"{', '.join(map(str, sizes[:-1]))} or {sizes[-1]}" if len(sizes) > 1 else str(sizes[0])
    return f"it was sold with {listed} GB: for example `{chip}-{sizes[-1]}`, or `{chip}-{sizes[-1]}x2` for two"


def _similar_names_hint(name: str) -> str:
    similar = difflib.get_close_matches(name, machine_names(), n=3, cutoff=SIMILAR_NAME_RATIO)
    if not similar:
        return f"a machine is a chip and its memory in GB; {MACHINES_HINT}"
    return f"did you mean {', '.join(f'`{name}`' for name in similar)}? For two: `{similar[0]}x2`"


def _chip_and_memory(name: str) -> tuple[Chip, int]:
    chip, _, memory = name.rpartition("-")
    return find_chip(chip, int(memory)), int(memory) * GIB


def find_chip(name: str, memory_gb: int) -> Chip:
    """Return the variant of a chip that was sold with this much memory, else the largest variant.

    Raises:
        UsageError: unknown chip.
    """
    known = [chip for chip in chips() if chip.chip == name]
    if not known:
        raise UsageError(f"unknown chip `{name}`", hint=_similar_names_hint(f"{name}-{memory_gb}"))
    return next((chip for chip in known if memory_gb in chip.memory_gb), known[0])


def make_machine(name: str, chip: Chip, memory_bytes: int, wired_limit_mb: int | None = None) -> Machine:
    """Return a machine with the memory limit that macOS sets for its GPU.

    Args:
        name: name for the machine.
        chip: its chip.
        memory_bytes: size of its memory.
        wired_limit_mb: value of `iogpu.wired_limit_mb`, if it is known; 0 and None mean the default.
    """
    limit = gpu_limit(memory_bytes, None if wired_limit_mb is None else str(wired_limit_mb))
    return Machine(name, chip, memory_bytes, limit)


def machine_of_host(name: str, brand: str | None, memory_bytes: int | None, wired_limit_mb: int | None) -> Machine:
    """Return a machine from a host's own description.

    Args:
        name: name of the host.
        brand: name of its processor, such as `Apple M3 Ultra`.
        memory_bytes: size of its memory.
        wired_limit_mb: value of `iogpu.wired_limit_mb`.

    Raises:
        UsageError: the description is incomplete, or not of a known Mac.
    """
    if brand is None or memory_bytes is None or not brand.lower().startswith("apple "):
        raise UsageError(f"`{name}` is not a known Mac (chip: {brand or 'unknown'})", hint=MACHINES_HINT)
    memory_gb = round(memory_bytes / GIB)
    chip = find_chip(brand.lower().removeprefix("apple ").replace(" ", "-"), memory_gb)
    return make_machine(name, chip, memory_bytes, wired_limit_mb)


def any_machine(name: str, brand: str | None, memory_bytes: int, wired_limit_mb: int | None) -> Machine:
    """Return a machine for any computer. One that is not a known Mac has UNKNOWN_CHIP and can use all memory but the
    system's reserve."""
    try:
        return machine_of_host(name, brand, memory_bytes, wired_limit_mb)
    except UsageError:
        return Machine(name, UNKNOWN_CHIP, memory_bytes, usable_bytes(memory_bytes))
