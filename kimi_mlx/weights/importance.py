"""Importance files: mean squared activations of the input columns of a model's matrices.

An importance file is a safetensors file. For an input that one or more matrices share it has

    NAME.mean_square   float32 (columns), or (experts, columns): mean of the squared activations
    NAME.tokens        int64 (1), or (experts): number of tokens in this mean

NAME is `model.layers.N.` and an entry of kimi_mlx.model.tree, or `lm_head`: `self_attn.qkv_a_proj` (q_a or q, and
kv_a), `self_attn.q_b_proj`, `self_attn.o_proj`, `mlp.experts.gate_up_proj` (gate and up), `mlp.experts.down_proj`,
`mlp.shared_experts.gate_up_proj` and so on. The embedding and the projections from the latent have no entries. The
metadata of the header has `format` (FORMAT), `model` (name), `weights` (digest of the model's norms), `tokens`, `text`
(digest of the token ids) and `prompt` (`raw` or `chat`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from kimi_mlx.errors import WeightsError
from kimi_mlx.files import rename_durably, sha256_of
from kimi_mlx.model.names import TEXT_PREFIX, SourceMatrix
from kimi_mlx.weights.checkpoint import Checkpoint
from kimi_mlx.weights.converted_files import ConvertedWeight
from kimi_mlx.weights.header import read_header, read_metadata
from kimi_mlx.weights.layer_plan import plan_source
from kimi_mlx.weights.reader import CheckpointReader, to_stored_type

FORMAT = "kimi-mlx importance 1"
"""Format and version in the metadata."""

MIN_TOKENS = 32
"""Minimum number of tokens for an expert's own mean; with fewer, the mean of all experts of its layer is used."""

MAKE_HINT = "make one with `kimi-mlx importance MODEL TEXT... -o FILE`"

INPUTS = {
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
    **dict.fromkeys(("q_proj", "q_a_proj", "kv_a_proj_with_mqa"), "qkv_a_proj"),
}
"""Matrix -> entry of its input, for inputs that several matrices share."""

WITHOUT_IMPORTANCE = ("embed_tokens", "embed_q", "unembed_out", "kv_b_proj")
"""Matrices whose columns are all equally important."""


@dataclass(frozen=True)
class Coverage:
    """Coverage of the experts of a model by the texts of an importance file.

    Args:
        experts: number of routed experts in all layers.
        rare: number of experts with fewer than MIN_TOKENS tokens, which use the mean of their layer.
        unseen: number of experts without any token; included in `rare`.
        uniform: number of inputs without any activation, whose columns are equally important.
    """

    experts: int
    rare: int
    unseen: int
    uniform: int


class Importance:
    """An importance file, read through a memory map.

    Args:
        path: the file.

    Raises:
        WeightsError: it is not an importance file, is damaged, or has values that are negative or not finite.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._table = read_header(path)
            self.metadata = read_metadata(path)
        except WeightsError as error:
            raise WeightsError(error.message, hint=MAKE_HINT) from error
        if self.metadata.get("format") != FORMAT:
            raise WeightsError(
                f"`{path}` has the format `{self.metadata.get('format', 'unknown')}`, not `{FORMAT}`",
                hint=MAKE_HINT,
            )
        self._map = np.memmap(path, dtype=np.uint8, mode="r")
        for name, info in self._table.items():
            kind = name.rpartition(".")[2]
            expected = {"mean_square": "F32", "tokens": "I64"}.get(kind)
            if info.dtype != expected:
                raise WeightsError(
                    f"tensor `{name}` in `{path}` has type {info.dtype}, not {expected or 'one of importance'}",
                    hint="make the file again with `kimi-mlx importance`",
                )

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file."""
        return sha256_of(self.path)

    def values(self, name: str) -> np.ndarray:
        """Return a tensor."""
        info = self._table[name]
        dtype = np.float32 if info.dtype == "F32" else np.int64
        stored = self._map[info.start : info.start + info.size_bytes]
        return np.frombuffer(stored.tobytes(), dtype).reshape(info.shape)

    def of(self, weight: ConvertedWeight) -> np.ndarray | None:
        """Return the importance of a weight's columns, (members, columns) float32; None if all are equal.

        Experts that saw fewer than MIN_TOKENS tokens get the mean of all experts of their layer, weighted by tokens.

        Raises:
            WeightsError: a value is negative or not finite.
        """
        entry = entry_of(weight)
        if entry is None:
            return None
        squares, tokens = self.values(f"{entry}.mean_square"), self.values(f"{entry}.tokens")
        if not np.isfinite(squares).all() or (squares < 0).any() or (tokens < 0).any():
            raise WeightsError(
                f"`{entry}` in `{self.path}` has values that are negative or not finite",
                hint="make the file again with `kimi-mlx importance`",
            )
        if squares.ndim == 1:
            return squares[None]
        total = tokens.sum()
        if not total:
            return np.ones_like(squares)
        mean = (squares * (tokens / total)[:, None].astype(np.float32)).sum(axis=0)
        return np.where((tokens < MIN_TOKENS)[:, None], mean, squares)

    def check(self, weights: list[ConvertedWeight]) -> None:
        """Check that the file has the inputs of a model, with the same shapes.

        Raises:
            WeightsError: it is of another model.
        """
        hint = "use the importance file of this model: `kimi-mlx importance MODEL TEXT... -o FILE` makes one"
        expected = {
            f"{entry}.mean_square": (weight.shape[0], weight.shape[-1]) if len(weight.shape) == 3 else weight.shape[-1:]
            for weight in weights
            if (entry := entry_of(weight)) is not None
        }
        present = {name: info.shape for name, info in self._table.items() if name.endswith(".mean_square")}
        for name in sorted(expected.keys() ^ present.keys()):
            owner, other = ("model", "file") if name in expected else ("file", "model")
            raise WeightsError(
                f"`{self.path}` has {len(present)} inputs and the model {len(expected)}: the {owner} has "
                f"`{name.removesuffix('.mean_square')}`, the {other} does not",
                hint=hint,
            )
        for name, shape in expected.items():
            tokens = self._table.get(name.replace(".mean_square", ".tokens"))
            if present[name] != shape or tokens is None or tokens.shape != (shape[:-1] or (1,)):
                raise WeightsError(
                    f"`{name}` in `{self.path}` has shape {present[name]}, but the model has {shape}", hint=hint
                )

    def check_digest(self, digest: str, source: str) -> None:
        """Check that the file was made from the same weights, in any format.

        Args:
            digest: result of norm_digest for the model.
            source: name of the model.

        Raises:
            WeightsError: it is of another model.
        """
        own = self.metadata.get("weights", "")
        if own != digest:
            raise WeightsError(
                f"`{self.path}` was made from `{self.metadata.get('model', 'an unknown model')}` (norms {own[:12]}), "
                f"but `{source}` has other weights (norms {digest[:12]})",
                hint="make one for this model: `kimi-mlx importance MODEL TEXT... -o FILE`",
            )

    def coverage(self) -> Coverage:
        """Return the coverage of the experts by the texts."""
        counts = {
            name: self.values(name) for name in self._table if name.endswith(".tokens") and ".mlp.experts." in name
        }
        experts = [tokens for name, tokens in counts.items() if name.endswith(".gate_up_proj.tokens")]
        tokens = np.concatenate(experts) if experts else np.zeros(0, np.int64)
        uniform = sum(not self.values(name).any() for name in self._table if name.endswith(".tokens"))
        return Coverage(len(tokens), int((tokens < MIN_TOKENS).sum()), int((tokens == 0).sum()), uniform)


def entry_of(weight: ConvertedWeight) -> str | None:
    """Return the entry of an importance file for the input of a weight; None if it has none."""
    path = weight.path.removeprefix(TEXT_PREFIX)
    base, _, name = path.rpartition(".")
    if not weight.can_be_quantized or weight.kind == "vision tower" or name in WITHOUT_IMPORTANCE:
        return None
    entry = INPUTS.get(name, name)
    return f"{base}.{entry}".replace(".mlp.switch_mlp.", ".mlp.experts.") if base else entry


def norm_digest(reader: CheckpointReader[Checkpoint]) -> str:
    """Return a digest of a model's norms, which all formats of the same weights have in common.

    They are rounded to bfloat16, the type of the published weights.
    """
    config = reader.checkpoint.config
    names = [
        f"model.layers.{layer}.{name}"
        for layer in range(config.num_hidden_layers)
        for name in ("input_layernorm", "post_attention_layernorm")
    ]
    digest = hashlib.sha256(f"{config.num_hidden_layers} {config.hidden_size} {config.n_routed_experts}".encode())
    for name in [*names, "model.norm"]:
        (plan,) = plan_source(reader.checkpoint, SourceMatrix((name,), (config.hidden_size,)))
        (array,) = plan.arrays
        values = reader.read_slice(array.copies[0])
        if array.dtype != "BF16":
            values = to_stored_type(np.ascontiguousarray(values, np.float32), "BF16")
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()


def write_importance(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write an importance file; an existing file is replaced only by a complete one.

    Args:
        path: the file.
        arrays: float32 and int64 arrays by name.
        metadata: metadata except the format.

    Raises:
        OSError: the disk is full or fails.
    """
    header: dict[str, object] = {"__metadata__": {"format": FORMAT, **metadata}}
    offset = 0
    for name, array in arrays.items():
        dtype = {np.dtype(np.float32): "F32", np.dtype(np.int64): "I64"}[array.dtype]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for array in arrays.values():
                stream.write(np.ascontiguousarray(array).tobytes())
        rename_durably(part, path)
    finally:
        part.unlink(missing_ok=True)
