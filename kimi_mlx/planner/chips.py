"""Chips of Macs: those of the package's `chips.json`, and the user's own in a file of the same name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, cast

from kimi_mlx.errors import ConfigError
from kimi_mlx.folders import config_folder

RDMA_THUNDERBOLT = 5
"""Thunderbolt generation that RDMA needs (with macOS 26.2)."""

NEURAL_ACCELERATORS_FROM = 5
"""Generation of Apple's chips from which GPU cores have neural accelerators, for matrix multiplications."""

ASSUMED_SSD_GB_PER_S = 6.0
"""Rate at which weights are read from the SSD of a chip without a published one."""

CHIP_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z][a-z0-9]*)*")

EXAMPLE = '{"chips": [{"chip": "m6-ultra", "memory_gb": [512], "bandwidth_gb_per_s": 1500, "tflops_fp16": 150}]}'
"""Example of a user's file, for hints."""


@dataclass(frozen=True)
class Chip:
    """A row of `chips.json`; None for unknown values.

    Args:
        chip: name, such as `m3-ultra`.
        gpu_cores: number of GPU cores of this variant; 0 if it is not known.
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
        ssd_gb_per_s: published rate at which the SSD reads.
        neural_accelerators: whether the GPU's cores have neural accelerators, which tflops_fp16 then includes.
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
    ssd_gb_per_s: float | None = None
    neural_accelerators: bool = False

    @property
    def bandwidth_bytes_per_s(self) -> float:
        """Memory bandwidth."""
        return self.bandwidth_gb_per_s * 1e9

    @property
    def flops(self) -> float:
        """Operations per second of the GPU's matrix multiplications."""
        return self.tflops_fp16 * 1e12

    @property
    def ssd_bytes_per_s(self) -> float:
        """Rate at which the SSD reads, published or assumed."""
        return (self.ssd_gb_per_s or ASSUMED_SSD_GB_PER_S) * 1e9

    @property
    def has_rdma(self) -> bool:
        """Whether the chip supports RDMA over Thunderbolt."""
        return self.thunderbolt >= RDMA_THUNDERBOLT


UNKNOWN_CHIP = Chip("unknown", 0, 0, 0, (), 0, 0, None, None, {}, "not in the table", None)


def chips() -> tuple[Chip, ...]:
    """Return the user's chips, then those of the package. Of several variants, the one with more GPU cores is first.

    Raises:
        ConfigError: the user's file is not valid.
    """
    return (*user_chips(), *known_chips())


@cache
def known_chips() -> tuple[Chip, ...]:
    """Return the chips of the package."""
    text = resources.files("kimi_mlx.planner").joinpath("chips.json").read_text(encoding="utf-8")
    rows: list[dict[str, Any]] = json.loads(text)["chips"]
    for row in rows:
        row["memory_gb"] = tuple(row["memory_gb"])
    return tuple(Chip(**row) for row in rows)


def user_chips_file() -> Path | None:
    """Return the path of the user's `chips.json`, in the folder of `config.toml`; None without a home folder."""
    folder = config_folder()
    return None if folder is None else folder / "chips.json"


def user_chips() -> tuple[Chip, ...]:
    """Return the chips of the user's file; none without one.

    Raises:
        ConfigError: the file cannot be read, or is not valid.
    """
    file = user_chips_file()
    if file is None:
        return ()
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return ()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"`{file}` cannot be read: {error}", hint="make it a readable text file, or remove it") from (
            error
        )
    return parse_chips(text, str(file))


def parse_chips(text: str, where: str) -> tuple[Chip, ...]:
    """Parse a user's file: an object whose `chips` is a list of objects with the fields of REQUIRED and OPTIONAL.

    Args:
        text: contents of the file.
        where: path of the file, for messages.

    Raises:
        ConfigError: it is not JSON, or a field is missing, unknown or invalid.
    """
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _error(where, f"is not JSON: {error}") from error
    rows: Any = cast("dict[str, Any]", value).get("chips") if isinstance(value, dict) else None
    if not isinstance(rows, list):
        raise _error(where, "has no list `chips`")
    numbered = enumerate(cast("list[Any]", rows), start=1)
    return tuple(_parse_chip(row, f"chip {number}", where) for number, row in numbered)


def _parse_chip(value: Any, which: str, where: str) -> Chip:
    if not isinstance(value, dict):
        raise _error(where, f"{which} is not an object, but {json.dumps(value)}")
    row = cast("dict[str, Any]", value)
    if missing := [name for name in REQUIRED if name not in row]:
        raise _error(where, f"{which} has no `{missing[0]}`")
    for name, field in row.items():
        if name not in REQUIRED and name not in OPTIONAL:
            known = ", ".join([*REQUIRED, *OPTIONAL])
            raise _error(where, f"{which} has an unknown field `{name}`; the fields are {known}")
        expected = (REQUIRED | OPTIONAL)[name]
        if not CHECKS[expected](field):
            raise _error(where, f"`{name}` of {which} is {json.dumps(field)}, but must be {expected}")
    chip = make_chip(row["chip"], row["bandwidth_gb_per_s"], row.get("tflops_fp16"), row["memory_gb"], f"`{where}`")
    return replace(chip, **{name: row[name] for name in OPTIONAL if name in row and name != "tflops_fp16"})


def _error(where: str, problem: str) -> ConfigError:
    return ConfigError(f"`{where}`: {problem}", hint=f"write it like this: {EXAMPLE}")


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and CHIP_NAME.fullmatch(value) is not None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e6


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1e6


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(size and _is_count(size) for size in value)  # pyright: ignore


def _are_prices(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    return all(size.isdigit() and _is_number(price) for size, price in cast("dict[str, Any]", value).items())


CHECKS: Mapping[str, Callable[[Any], bool]] = {
    "a name such as m6-ultra": _is_name,
    "a list of sizes in GB, such as [256, 512]": _are_sizes,
    "a number above 0": _is_number,
    "a whole number from 0": _is_count,
    "true or false": _is_flag,
    'prices by memory size, such as {"512": 9499}': _are_prices,
}
"""Description of a field's valid values -> check of a value."""

_NAME, _SIZES, _NUMBER, _COUNT, _FLAG, _PRICES = CHECKS

REQUIRED = {"chip": _NAME, "memory_gb": _SIZES, "bandwidth_gb_per_s": _NUMBER}
"""Fields that a user's chip must have -> description of their values."""

OPTIONAL = {
    "tflops_fp16": _NUMBER,
    "ssd_gb_per_s": _NUMBER,
    "gpu_cores": _COUNT,
    "thunderbolt": _COUNT,
    "thunderbolt_ports": _COUNT,
    "neural_accelerators": _FLAG,
    "watts_idle": _NUMBER,
    "watts_max": _NUMBER,
    "price_usd": _PRICES,
}
"""Fields that it may have -> description of their values."""

assert {*REQUIRED, *OPTIONAL} < {field.name for field in fields(Chip)}


def make_chip(name: str, bandwidth: float, tflops: float | None, memory_gb: list[int], source: str) -> Chip:
    """Return a chip with few known facts. The rest is assumed to be as in the newest similar chip.

    Args:
        name: name of the chip.
        bandwidth: memory bandwidth in GB/s.
        tflops: fp16 rate; None for the similar chip's, in proportion to the bandwidth.
        memory_gb: memory sizes in GiB.
        source: source of these facts.
    """
    generation = re.match(r"m(\d+)", name)
    is_old = generation is not None and int(generation[1]) < NEURAL_ACCELERATORS_FROM
    similar = next(chip for chip in known_chips() if chip.chip == ("m3-ultra" if is_old else "m5-ultra"))
    assumed = f"Thunderbolt, SSD{'' if tflops else ' and tflops_fp16'}: as {similar.chip}"
    return replace(
        similar,
        chip=name,
        gpu_cores=0,
        bandwidth_gb_per_s=bandwidth,
        tflops_fp16=tflops or similar.tflops_fp16 * bandwidth / similar.bandwidth_gb_per_s,
        memory_gb=tuple(sorted(memory_gb)),
        watts_idle=None,
        watts_max=None,
        price_usd={},
        source=source,
        unverified=assumed,
    )
