"""Machines as the user writes them, such as `m3-ultra-512x2,m4-max-128`, or as hosts describe themselves."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from kimi_mlx.cluster.hosts.machine import gpu_limit
from kimi_mlx.errors import UsageError
from kimi_mlx.planner.chips import UNKNOWN_CHIP, Chip, chips, make_chip
from kimi_mlx.sizing.hosts import MAX_HOSTS, usable_bytes
from kimi_mlx.units import GIB

SIMILAR_NAME_RATIO = 0.7
"""difflib's similarity from which a machine is suggested: `m3-ulta-512` has similar names, `mac-studio` has none."""

MACHINES_HINT = "name the Macs to plan for, for example `--machines m3-ultra-512x2`"
"""Hint for machines that the planner cannot predict."""

_MACHINE = re.compile(
    r"(?P<chip>[a-z][a-z0-9]*(-[a-z][a-z0-9]*?)*?)(-(?P<memory>\d{1,6})(-?gb)?)?(x(?P<count>\d{1,6}))?"
    r"(:(?P<rate>\d{1,6}(\.\d+)?)-?(?P<unit>[gt])b/s)?(:(?P<tflops>\d{1,6}(\.\d+)?)-?tflops)?(-?x(?P<times>\d{1,6}))?"
)
"""A machine in lower case, with hyphens instead of blanks."""

UNKNOWN_CHIP_HINT = (
    "for an unknown chip, give its bandwidth, and its fp16 rate if you know it: `m6-ultra-512:1500GB/s:150TFLOPS`"
)
"""Hint that shows how to name a machine whose chip is not in the table."""


@dataclass(frozen=True)
class SsdRate:
    """Rate at which an SSD reads, and where the number is from."""

    bytes_per_s: float
    source: Literal["given", "measured", "published", "assumed"]


@dataclass(frozen=True)
class Machine:
    """A host of a plan.

    Args:
        name: the user's name for it.
        chip: its chip.
        memory_bytes: size of its memory.
        gpu_bytes: memory that its GPU can use now.
        known_ssd: rate of its SSD, given by the user or measured; None for the chip's.
    """

    name: str
    chip: Chip
    memory_bytes: int
    gpu_bytes: int
    known_ssd: SsdRate | None = None

    @property
    def ssd(self) -> SsdRate:
        """Rate at which its SSD reads."""
        if self.known_ssd is not None:
            return self.known_ssd
        return SsdRate(self.chip.ssd_bytes_per_s, "published" if self.chip.ssd_gb_per_s else "assumed")

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


def machine_names() -> list[str]:
    """Return the names of all known machines."""
    return list(dict.fromkeys(f"{chip.chip}-{memory}" for chip in chips() for memory in chip.memory_gb))


def parse_machines(text: str) -> tuple[Machine, ...]:
    """Parse `CHIP-GB`, `CHIP-GBxCOUNT`, or several of them separated by commas.

    `:460GB/s` chooses the variant of a chip with this bandwidth, or describes an unknown chip; `:150TFLOPS` its fp16
    rate.

    Raises:
        UsageError: unknown machine (the hint has similar names), or too many machines.
        ConfigError: the user's file of chips is not valid.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise UsageError(
            f"`{text}` has a comma without a machine" if text.strip(", ") else "no machine is named", hint=MACHINES_HINT
        )
    named = [machine for word in words for machine in _parse_word(word)]
    if len(named) > MAX_HOSTS:
        raise UsageError(f"{len(named)} machines, but at most {MAX_HOSTS} can be planned for", hint="remove some")
    if len({machine.name for machine in named}) == len(named):
        return tuple(named)
    return tuple(replace(machine, name=f"{machine.name} #{index + 1}") for index, machine in enumerate(named))


def _parse_word(word: str) -> list[Machine]:
    """Return one or more equal machines, such as `m3-ultra-512x2`."""
    match = _MACHINE.fullmatch(re.sub(r"[\s_-]+", "-", word.strip().lower()))
    sizes = [] if match is None else _memory_sizes(match["chip"])
    if match is None or not (sizes or match["rate"]):
        raise UsageError(f"unknown machine `{word}`", hint=_similar_names_hint(word.lower()))
    if match["memory"] is None:
        hint = _memory_hint(match["chip"], sizes) if sizes else UNKNOWN_CHIP_HINT
        raise UsageError(f"`{word}` does not say how much memory the Mac has", hint=hint)
    memory, count = int(match["memory"]), int(match["count"] or 1) * int(match["times"] or 1)
    if memory == 0 or (memory not in sizes and match["rate"] is None):
        raise UsageError(
            f"`{word}`: no Mac with {match['chip']} and {match['memory']} GB was sold",
            hint=_memory_hint(match["chip"], sizes) if sizes else UNKNOWN_CHIP_HINT,
        )
    if not 1 <= count <= MAX_HOSTS:
        raise UsageError(f"`{word}` means {count} machines", hint=f"use 1 to {MAX_HOSTS}")
    chip = _named_chip(match, memory)
    rate = f":{chip.bandwidth_gb_per_s:g}GB/s" if match["rate"] else ""
    return [make_machine(f"{match['chip']}-{memory}{rate}", chip, memory * GIB)] * count


def _named_chip(match: re.Match[str], memory: int) -> Chip:
    """Return the chip of a machine: a variant in the table, or one that the user describes."""
    name, tflops = match["chip"], None if match["tflops"] is None else float(match["tflops"])
    rate = None if match["rate"] is None else float(match["rate"]) * (1000 if match["unit"] == "t" else 1)
    if rate == 0 or tflops == 0:
        raise UsageError(f"`{match[0]}` has a rate of 0", hint=UNKNOWN_CHIP_HINT)
    if rate is None:
        known = find_chip(name, memory)
    else:
        variants = [chip for chip in chips() if chip.chip == name and chip.bandwidth_gb_per_s == rate]
        if not variants:
            return make_chip(name, rate, tflops, [memory], "given by the user")
        known = variants[0]
    return known if tflops is None else replace(known, tflops_fp16=tflops, unverified="tflops_fp16: given by the user")


def _memory_sizes(chip: str) -> list[int]:
    """Return all memory sizes that a chip was sold with, in GB; none for an unknown chip."""
    return sorted(size for known in chips() if known.chip == chip for size in known.memory_gb)


def _memory_hint(chip: str, sizes: Sequence[int]) -> str:
    listed = f"{', '.join(map(str, sizes[:-1]))} or {sizes[-1]}" if len(sizes) > 1 else str(sizes[0])
    return f"it was sold with {listed} GB: for example `{chip}-{sizes[-1]}`, or `{chip}-{sizes[-1]}x2` for two"


def _similar_names_hint(name: str) -> str:
    similar = difflib.get_close_matches(name, machine_names(), n=3, cutoff=SIMILAR_NAME_RATIO)
    if not similar:
        return f"a machine is a chip and its memory in GB; {MACHINES_HINT}; {UNKNOWN_CHIP_HINT}"
    return f"did you mean {', '.join(f'`{name}`' for name in similar)}? For two: `{similar[0]}x2`; {UNKNOWN_CHIP_HINT}"


def find_chip(name: str, memory_gb: int) -> Chip:
    """Return the variant of a chip that was sold with this much memory, else the largest variant.

    Raises:
        UsageError: unknown chip.
        ConfigError: the user's file of chips is not valid.
    """
    known = [chip for chip in chips() if chip.chip == name]
    if not known:
        raise UsageError(f"unknown chip `{name}`", hint=_similar_names_hint(f"{name}-{memory_gb}"))
    return next((chip for chip in known if memory_gb in chip.memory_gb), known[0])


def name_of_kind(machine: Machine) -> str:
    """Return the name of a machine's kind, as `--machines` takes it."""
    memory_gb = round(machine.memory_bytes / GIB)
    is_default = machine.chip == find_chip(machine.chip.chip, memory_gb) if _memory_sizes(machine.chip.chip) else False
    return f"{machine.chip.chip}-{memory_gb}{'' if is_default else f':{machine.chip.bandwidth_gb_per_s:g}GB/s'}"


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
