"""Macs: the chips of `chips.json`, and machines as the user writes them, such as `m3-ultra-512x2,m4-max-128`."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from kimi_mlx.cluster.doctor.host_checks import SYSTEM_RESERVE_BYTES
from kimi_mlx.cluster.hosts.machine import gpu_limit
from kimi_mlx.errors import UsageError
from kimi_mlx.units import GIB

MAX_MACHINES = 8

RDMA_THUNDERBOLT = 5
"""RDMA over Thunderbolt needs this generation (and macOS 26.2)."""

_MACHINE = re.compile(r"(?P<chip>m\d+(-[a-z]+)?)-(?P<memory>\d+)(gb)?(x(?P<count>\d+))?", re.IGNORECASE)


@dataclass(frozen=True)
class Chip:
    """A row of `chips.json`; None where it is not known.

    Args:
        chip: its name, such as `m3-ultra`.
        gpu_cores: of this variant.
        bandwidth_gb_per_s: of the memory, by its maker.
        tflops_fp16: of the GPU's matrix products.
        memory_gb: sizes that were sold, in GiB as usual.
        thunderbolt: generation.
        thunderbolt_ports: at most.
        watts_idle: at the wall.
        watts_max: at the wall.
        price_usd: of the cheapest Mac by its memory.
        source: of these facts.
        unverified: which of them are not from there.
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
        """Of the memory."""
        return self.bandwidth_gb_per_s * 1e9

    @property
    def flops(self) -> float:
        """Of the GPU's matrix products, a second."""
        return self.tflops_fp16 * 1e12

    @property
    def has_rdma(self) -> bool:
        """Whether two of them can talk over RDMA."""
        return self.thunderbolt >= RDMA_THUNDERBOLT


UNKNOWN_CHIP = Chip("unknown", 0, 0, 0, (), 0, 0, None, None, {}, "no Mac of the table", None)


@dataclass(frozen=True)
class Machine:
    """A host of the plan.

    Args:
        name: as the user names it.
        chip: its chip.
        memory_bytes: all of it.
        gpu_bytes: what its GPU may wire as it is.
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
        """What it may wire once `iogpu.wired_limit_mb` is raised, with a reserve for the system."""
        return max(self.gpu_bytes, self.memory_bytes - SYSTEM_RESERVE_BYTES)

    @property
    def price_usd(self) -> float | None:
        """What it costs or has cost new."""
        return self.chip.price_usd.get(str(self.memory_bytes // GIB))


@cache
def chips() -> tuple[Chip, ...]:
    """All known ones; of several variants the one with more GPU cores first."""
    text = resources.files("kimi_mlx.planner").joinpath("chips.json").read_text(encoding="utf-8")
    rows: list[dict[str, Any]] = json.loads(text)["chips"]
    for row in rows:
        row["memory_gb"] = tuple(row["memory_gb"])
    return tuple(Chip(**row) for row in rows)


def machine_names() -> list[str]:
    """All machines that can be written."""
    return [f"{chip.chip}-{memory}" for chip in chips() for memory in chip.memory_gb]


def parse_machines(text: str) -> tuple[Machine, ...]:
    """Machines from `CHIP-GB`, `CHIP-GBxCOUNT`, or several of them with commas between.

    Raises:
        UsageError: no such machine (the hint has the nearest names), or too many.
    """
    names = [name for word in text.split(",") for name in _names(word.strip())]
    if len(names) > MAX_MACHINES:
        raise UsageError(f"{len(names)} machines are more than {MAX_MACHINES}", hint="leave some out")
    numbered = len(names) != len(set(names))
    return tuple(
        make_machine(f"{name} #{index + 1}" if numbered else name, *_split(name)) for index, name in enumerate(names)
    )


def _names(word: str) -> list[str]:
    found = _MACHINE.fullmatch(word)
    name = f"{found['chip']}-{int(found['memory'])}".lower() if found else word.lower()
    if name not in machine_names():
        raise UsageError(f"there is no machine `{word}`", hint=_nearest(name))
    assert found is not None
    count = int(found["count"] or 1)
    if not 1 <= count <= MAX_MACHINES:
        raise UsageError(f"`{word}` is {count} machines", hint=f"give from 1 to {MAX_MACHINES}")
    return [name] * count


def _nearest(name: str) -> str:
    chip, _, _ = name.rpartition("-")
    sizes = [size for each in chips() if each.chip == chip for size in each.memory_gb]
    if sizes:
        return f"{chip} was sold with {', '.join(map(str, sorted(sizes)))} GB, so `{chip}-{max(sizes)}`"
    near = difflib.get_close_matches(name, machine_names(), n=3, cutoff=0.3) or ["m3-ultra-512", "m4-max-128"]
    return f"did you mean {', '.join(f'`{each}`' for each in near)}? Several: `{near[0]}x2`"


def _split(name: str) -> tuple[Chip, int]:
    chip, _, memory = name.rpartition("-")
    return find_chip(chip, int(memory)), int(memory) * GIB


def find_chip(name: str, memory_gb: int) -> Chip:
    """The variant that was sold with so much memory, else the largest.

    Raises:
        UsageError: no such chip.
    """
    known = [chip for chip in chips() if chip.chip == name]
    if not known:
        raise UsageError(f"the chip `{name}` is not in the planner's table", hint=_nearest(f"{name}-{memory_gb}"))
    return next((chip for chip in known if memory_gb in chip.memory_gb), known[0])


def make_machine(name: str, chip: Chip, memory_bytes: int, wired_limit_mb: int | None = None) -> Machine:
    """A machine, with what macOS lets its GPU wire.

    Args:
        name: what to call it.
        chip: its chip.
        memory_bytes: all of it.
        wired_limit_mb: `iogpu.wired_limit_mb`, if it is known; 0 and None stand for the default.
    """
    limit = gpu_limit(memory_bytes, None if wired_limit_mb is None else str(wired_limit_mb))
    return Machine(name, chip, memory_bytes, limit)


def machine_of_host(name: str, brand: str | None, memory_bytes: int | None, wired_limit_mb: int | None) -> Machine:
    """A machine from what a host says of itself.

    Args:
        name: of the host.
        brand: such as `Apple M3 Ultra`.
        memory_bytes: all of it.
        wired_limit_mb: `iogpu.wired_limit_mb`.

    Raises:
        UsageError: it does not tell, or it is no Mac that we know.
    """
    hint = "say what to plan for: `--machines m3-ultra-512x2`"
    if brand is None or memory_bytes is None or not brand.lower().startswith("apple "):
        raise UsageError(f"`{name}` is no Mac that the planner knows: its chip is `{brand or 'not told'}`", hint=hint)
    memory_gb = round(memory_bytes / GIB)
    chip = find_chip(brand.lower().removeprefix("apple ").replace(" ", "-"), memory_gb)
    return make_machine(name, chip, memory_bytes, wired_limit_mb)


def any_machine(name: str, brand: str | None, memory_bytes: int, wired_limit_mb: int | None) -> Machine:
    """The same for any computer: of one that we do not know only the memory counts, all of which it can use."""
    try:
        return machine_of_host(name, brand, memory_bytes, wired_limit_mb)
    except UsageError:
        return Machine(name, UNKNOWN_CHIP, memory_bytes, max(memory_bytes - SYSTEM_RESERVE_BYTES, 0))
