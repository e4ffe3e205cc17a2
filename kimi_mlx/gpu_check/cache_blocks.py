"""Blocks of the prompt cache in bfloat16: written, read and continued, with the same bits."""

from __future__ import annotations

import mlx.core as mx

from kimi_mlx.engine.kv_cache_pool import SequenceCache
from kimi_mlx.engine.prompt_cache.block_file import BLOCK_TOKENS
from kimi_mlx.gpu_check.context import Context
from kimi_mlx.gpu_check.random_model import random_tokens
from kimi_mlx.model.config import load_config
from kimi_mlx.model.decoder import SequenceSlice
from kimi_mlx.runtime.load import Fingerprint
from kimi_mlx.runtime.prompt_cache import open_prompt_cache
from kimi_mlx.store.locate import ensure_downloaded
from kimi_mlx.temporary import temporary_folder
from kimi_mlx.weights.assemble import load_model

MAX_BYTES = 10**9
BLOCKS = 2


def check(context: Context) -> None:
    """Store the rows of a prompt, open the cache again, and continue from what it returns."""
    folder = ensure_downloaded("kimi-mini", 1, "hybrid", None)
    with context.on_device():  # with the tuning of that device
        model = load_model(folder, load_config(folder), mx.bfloat16)
    length = BLOCKS * BLOCK_TOKENS
    ids = random_tokens(length + 1, model.config.vocab_size)
    tokens = [int(token) for token in ids[0].tolist()]  # pyright: ignore[reportArgumentType, reportGeneralTypeIssues]
    with temporary_folder("check-") as created, context.on_device():
        cache_dir = created.path
        computed = SequenceCache(model)
        mx.eval(model.hidden(ids[:, :length], [SequenceSlice(computed.layers, length)]))
        computed.tokens = tokens[:length]
        warnings: list[str] = []
        fingerprint = Fingerprint("check", "check")
        store = open_prompt_cache(cache_dir, MAX_BYTES, model, fingerprint, warn=warnings.append)
        store.put(computed.tokens, computed.rows)
        store.close()
        store = open_prompt_cache(cache_dir, MAX_BYTES, model, fingerprint, warn=warnings.append)
        restored = SequenceCache(model)
        for index, block in enumerate(store.find(tokens)):
            block_tokens = tokens[index * BLOCK_TOKENS : (index + 1) * BLOCK_TOKENS]
            restored.append(block_tokens, store.read(block, block_tokens), length)
        store.close()
        context.require("no warning: " + "; ".join(warnings) if warnings else "no warning", not warnings)
        context.require(f"{BLOCKS} blocks found", restored.tokens == tokens[:length])
        if restored.tokens != tokens[:length]:
            return
        rows = [cache.rows(0, length) for cache in (computed, restored)]
        context.require("rows have the same bits", _is_same(*rows))
        logits = [model(ids[:, length:], cache.layers) for cache in (computed, restored)]
        context.require("logits after them have the same bits", _is_same(*logits))


def _is_same(a: mx.array, b: mx.array) -> bool:
    return a.dtype == b.dtype and bool(mx.array_equal(a.view(mx.uint16), b.view(mx.uint16)).item())
