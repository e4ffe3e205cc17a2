#!/usr/bin/env python3
"""Measure what `kimi-mlx convert` gains over min-max scales (mlx's own `quantize`) at the same bits.

scripts/bench_quantization.py                        kimi-mini and a synthetic model: the tables of docs/quantization.md
scripts/bench_quantization.py kimi-mini 2bit 3bit    one of them, and some presets

Each preset is converted with min-max scales, with searched scales, and with searched scales and importance. All three
have the same format and size. Importance is measured on other text than the text of the comparison.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import mlx.core as mx
import numpy as np

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from kimi_mlx.errors import UsageError
from kimi_mlx.model.config import load_config
from kimi_mlx.model.decoder import Model
from kimi_mlx.model.moe import MoE, swiglu
from kimi_mlx.quality.activations import record_inputs
from kimi_mlx.quality.compare import compare_states
from kimi_mlx.quality.layerwise import LayerwiseModel, Windows
from kimi_mlx.store.locate import ensure_downloaded
from kimi_mlx.text.tokenizer import Tokenizer
from kimi_mlx.weights.conversion import open_conversion
from kimi_mlx.weights.convert import convert
from kimi_mlx.weights.convert_options import ConvertOptions
from kimi_mlx.weights.importance import Importance, norm_digest, write_importance
from scripts.mini.dialogues import generate
from scripts.mini.render import Renderer
from tests.checkpoints import tensor_shapes

PRESETS = ("2bit", "2.5bit", "3bit", "4bit")
TASKS = ("chat", "arithmetic", "sums", "copy", "tools", "several", "retrieval")
NUM_DIALOGUES = 28

SYNTHETIC = {
    "model_type": "kimi_k2",
    "vocab_size": 2048,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 128,
    "q_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "torch_dtype": "bfloat16",
    "topk_method": "noaux_tc",
}
"""K2's shape on a small scale."""

DEGREES_OF_FREEDOM = 6
"""Matrices are drawn from Student's t distribution: like those of trained models, they have some large values."""
NORM_SPREAD = 0.7
"""Norms are exp of a normal distribution with this deviation: some columns are used far more than others."""
SYNTHETIC_WINDOWS, SYNTHETIC_LENGTH = 8, 128


@dataclass(frozen=True)
class Subject:
    """A model to quantize.

    Args:
        name: name in the table.
        folder: its checkpoint.
        calibration: text for importance.
        evaluation: text for the comparison.
    """

    name: str
    folder: Path
    calibration: Windows
    evaluation: Windows


def kimi_mini() -> Subject:
    """Return kimi-mini, with dialogues of its tasks."""
    folder = ensure_downloaded("kimi-mini")
    renderer = Renderer(Tokenizer.load(folder))

    def dialogues(seed: str) -> Windows:
        rng = Random(seed)
        return [renderer.render(generate(TASKS[i % len(TASKS)], rng, 160)).ids for i in range(NUM_DIALOGUES)]

    return Subject("kimi-mini", folder, dialogues("importance"), dialogues("comparison"))


def synthetic(folder: Path) -> Subject:
    """Write and return a random model with K2's structure."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    tensors: dict[str, mx.array] = {}
    for name, shape in tensor_shapes(SYNTHETIC).items():
        if name.endswith("e_score_correction_bias"):
            tensors[name] = mx.array(rng.normal(size=shape).astype(np.float32) * 0.05)
            continue
        if len(shape) == 1:
            values = np.exp(rng.normal(size=shape) * NORM_SPREAD)
        else:
            inputs = 1 if "embed_tokens" in name else shape[-1]
            values = (
                rng.standard_t(DEGREES_OF_FREEDOM, shape) * (2.0 if name == "lm_head.weight" else 0.8) / inputs**0.5
            )
        tensors[name] = mx.array(values.astype(np.float32)).astype(mx.bfloat16)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    (folder / "config.json").write_text(json.dumps(SYNTHETIC))

    def windows() -> Windows:
        vocabulary = int(SYNTHETIC["vocab_size"])
        return rng.integers(0, vocabulary, (SYNTHETIC_WINDOWS, SYNTHETIC_LENGTH)).tolist()

    return Subject("synthetic", folder, windows(), windows())


class ExpertOutputs:
    """Inputs and outputs of the experts of a model, and the error of those of another one on the same inputs."""

    def __init__(self) -> None:
        self._layers: dict[int, tuple[mx.array, mx.array, mx.array]] = {}
        self.error = self.total = 0.0

    def record(self, layer: int, model: Model) -> None:
        """Record the inputs of the experts of a layer, and compute their outputs."""
        mlp = model.layers[0].mlp
        if not isinstance(mlp, MoE):
            return
        gather_matmul = mlp.gate_up_proj.gather_matmul

        def run(x: mx.array, ids: mx.array, inputs: mx.array | None = None) -> mx.array:
            rows = x.reshape(-1, x.shape[-1])
            flat = ids.flatten()
            order = mx.argsort(flat)
            positions = mx.arange(len(rows)) if inputs is None else mx.broadcast_to(inputs, ids.shape).flatten()
            # shared experts are the last ones
            routed = int(np.count_nonzero(np.array(flat) < model.config.n_routed_experts))
            chosen, used = flat[order][:routed], rows[positions[order]][:routed, None]
            self._layers.setdefault(layer, (used, chosen, _outputs(mlp, used, chosen, gather_matmul)))
            return gather_matmul(x, ids, inputs)

        object.__setattr__(mlp.gate_up_proj, "gather_matmul", run)

    def compare(self, layer: int, model: Model) -> None:
        """Add the error of the experts of a layer of another model."""
        if layer in self._layers:
            used, chosen, expected = self._layers[layer]
            mlp = model.layers[0].mlp
            assert isinstance(mlp, MoE)
            found = _outputs(mlp, used, chosen, mlp.gate_up_proj.gather_matmul)
            self.error += float(np.square(np.array(found - expected)).sum())
            self.total += float(np.square(np.array(expected)).sum())


def _outputs(mlp: MoE, used: mx.array, chosen: mx.array, gather_matmul) -> mx.array:
    """Return the outputs of experts for rows sorted by expert."""
    gate, up = mx.split(gather_matmul(used, chosen), 2, axis=-1)
    return mlp.down_proj.gather_matmul(swiglu(gate, up), chosen)


def layerwise(folder: Path) -> LayerwiseModel:
    """Open a checkpoint in float32."""
    return LayerwiseModel(folder, load_config(folder), mx.float32)


def write_subject_importance(subject: Subject, path: Path) -> Importance:
    """Measure importance on the calibration text."""
    model = layerwise(subject.folder)
    arrays = record_inputs(model, subject.calibration, lambda done, total: None).arrays
    write_importance(path, arrays, {"model": subject.name, "weights": norm_digest(model.reader)})
    return Importance(path)


def measure(subject: Subject, work: Path, presets: Sequence[str]) -> None:
    """Print the table of one model."""
    importance = write_subject_importance(subject, work / f"{subject.name}.importance")
    tokens = sum(map(len, subject.evaluation))
    print(f"\n{subject.name}: {tokens:,} tokens; importance from {sum(map(len, subject.calibration)):,} others\n")
    print("| preset | scales | size | error of expert outputs | KL mean | KL p90 | top-1 agreement | perplexity |")
    print("| --- | --- | --: | --: | --: | --: | --: | --: |")
    outputs, original = ExpertOutputs(), layerwise(subject.folder)
    states = original.hidden(subject.evaluation, on_layer=outputs.record)
    perplexity = math.nan
    for preset in presets:
        for scales in ("min-max", "search", "search, importance"):
            options = ConvertOptions(preset=preset, scales="min-max" if scales == "min-max" else "search")
            folder = work / f"{subject.name}-{preset}-{scales}"
            start = time.perf_counter()
            try:
                conversion = open_conversion(subject.folder, options, importance if "importance" in scales else None)
            except UsageError:
                continue  # importance has no effect, because all matrices are copied
            result = convert(conversion, folder)
            seconds = time.perf_counter() - start
            model, outputs.error, outputs.total = layerwise(folder), 0.0, 0.0
            found = model.hidden(subject.evaluation, on_layer=outputs.compare)
            comparison = compare_states(original, model, subject.evaluation, states, found)
            perplexity = comparison.perplexity_a
            cells = [
                *(preset, scales, f"{result.size_bytes / 1e6:.1f} MB"),
                f"{100 * (outputs.error / outputs.total) ** 0.5:.1f} %",
                *(f"{comparison.kl_mean:.3g}", f"{comparison.kl_p90:.3g}"),
                *(f"{100 * comparison.top1_agreement:.1f} %", f"{comparison.perplexity_b:.4g}"),
            ]
            print(f"| {' | '.join(cells)} |", flush=True)
            print(f"{preset}, {scales}: {seconds:.1f} s", file=sys.stderr)
    print(f"\nperplexity of the original: {perplexity:.4g}")


def main() -> None:
    """Measure the models of the command line, or both."""
    mx.disable_compile()
    presets = [word for word in sys.argv[1:] if word in PRESETS] or PRESETS
    names = [word for word in sys.argv[1:] if word not in PRESETS] or ["kimi-mini", "synthetic"]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for name in names:
            measure(kimi_mini() if name == "kimi-mini" else synthetic(work / "source"), work, presets)


if __name__ == "__main__":
    main()
