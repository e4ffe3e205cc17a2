"""Checkpoints for a fair comparison of two servers: the same tokenizer, one float type, answers of fixed length.

They are made from kimi-mini or from the synthetic shapes of `workloads.py`, and kept in the user's cache folder:

- `tokenizer.json` is written, because mlx-lm's server does not run code of a repository and so cannot read
  `tiktoken.model`;
- floats are cast to the compute dtype of kimi-mlx on this machine (float32 on the CPU), because mlx-lm's server has no
  option for it, and 16-bit floats are many times slower there;
- the head's rows of control tokens are 0, so that no answer ends early, thinks or calls tools, and neither server needs
  a logit bias.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import mlx.core as mx
import tokenizers

from kimi_mlx.bench.workloads import (
    FORMAT,
    SEED,
    Config,
    Tensors,
    require_cache_folder,
    synthetic_config,
    write_synthetic,
)
from kimi_mlx.errors import WeightsError
from kimi_mlx.model.config import load_config
from kimi_mlx.runtime.load import compute_dtype
from kimi_mlx.text.vocabulary import build, find_splits, read_ranks

MINI = Path(__file__).parents[2] / "kimi_mlx" / "models" / "kimi-mini"
"""Folder of kimi-mini, whose tokenizer and template all checkpoints use."""

MODELS = ("kimi-mini", "wide", "deep")
COPIED = ("chat_template.jinja", "tiktoken.model")
KNOWN_TYPE = "deepseek_v3"
"""`model_type` of the same architecture that transformers, which loads mlx-lm's tokenizers, supports."""

LAYOUT = 2
"""Version of the files; increased when they change."""


def serving_checkpoint(model: str) -> Path:
    """Return the folder of one of MODELS; created once.

    Raises:
        WeightsError: the folder cannot be written.
    """
    caches = require_cache_folder()
    config = _read(MINI / "config.json") if model == "kimi-mini" else _synthetic(model)
    kind = str(mx.default_device().type)
    source = (MINI / "model.safetensors").read_bytes() if model == "kimi-mini" else b""
    key = json.dumps([LAYOUT, FORMAT, SEED, config, kind, hashlib.sha256(source).hexdigest()], sort_keys=True)
    folder = caches / "serving" / f"{model}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
    if not (folder / "config.json").is_file():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.", suffix=".part") as part:
                _make(Path(part), model, config)
                os.replace(Path(part) / "made", folder)
        except (OSError, RuntimeError) as error:  # MLX raises RuntimeError if it cannot write
            if not (folder / "config.json").is_file():  # else another process was faster
                raise WeightsError(
                    f"the checkpoint `{folder}` cannot be written: {error}",
                    hint="free some space, or set XDG_CACHE_HOME to another folder",
                ) from error
    return folder


def _synthetic(shape: str) -> Config:
    """Return the configuration of a shape with kimi-mini's vocabulary."""
    mini = _read(MINI / "config.json")
    ids = {name: mini[name] for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    return synthetic_config(shape, **ids)


def _make(part: Path, model: str, config: Config) -> None:
    source, target_folder = (MINI if model == "kimi-mini" else part / "source"), part / "made"
    target_folder.mkdir()
    if model != "kimi-mini":
        write_synthetic(source, config)
    target = compute_dtype(None, load_config(source))
    tokens = read_ranks(MINI / "tiktoken.model")
    for path in sorted(source.glob("*.safetensors")):
        tensors: Tensors = mx.load(str(path))  # pyright: ignore[reportAssignmentType]
        changed = {name: _convert(name, tensor, target, len(tokens)) for name, tensor in tensors.items()}
        mx.save_safetensors(str(target_folder / path.name), changed, {"format": "mlx"})
    index = source / "model.safetensors.index.json"
    if index.exists():
        shutil.copy(index, target_folder)
    _write_text(target_folder, tokens)
    dtype = str(target).removeprefix("mlx.core.")
    (target_folder / "config.json").write_text(json.dumps(config | {"model_type": KNOWN_TYPE, "torch_dtype": dtype}))


def _convert(name: str, tensor: mx.array, target: mx.Dtype, ordinary: int) -> mx.array:
    """Cast a tensor to the compute dtype; give control tokens the logit 0, which never wins."""
    if mx.issubdtype(tensor.dtype, mx.floating) and not name.endswith("e_score_correction_bias"):
        tensor = tensor.astype(target)
    if name in ("lm_head.scales", "lm_head.biases"):
        tensor[ordinary:] = 0
    return tensor


def _write_text(folder: Path, tokens: list[bytes]) -> None:
    """Write tokenizer and template, for kimi-mlx and for transformers."""
    for name in COPIED:
        shutil.copy(MINI / name, folder)
    text = _read(MINI / "tokenizer_config.json")
    names = {int(id): str(entry["content"]) for id, entry in text["added_tokens_decoder"].items()}
    bpe = build(tokens, find_splits(tokens))
    bpe.decoder = tokenizers.decoders.ByteLevel()
    size = _read(MINI / "config.json")["vocab_size"]
    special = [names.get(id, f"<|reserved_token_{id}|>") for id in range(len(tokens), size)]
    bpe.add_special_tokens([tokenizers.AddedToken(token, normalized=False, special=True) for token in special])
    bpe.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(text | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    shutil.copy(MINI / "generation_config.json", folder)


def _read(path: Path) -> Config:
    return json.loads(path.read_text(encoding="utf-8"))
