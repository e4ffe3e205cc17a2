"""Summary of a conversion for the user: what happens to each kind of matrix, and notes on the result."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from kimi_mlx.model.config_quantization import Quantization
from kimi_mlx.weights.convert_options import DTYPE_NAMES
from kimi_mlx.weights.converted_files import ConversionPlan, ConvertedWeight
from kimi_mlx.weights.importance import MIN_TOKENS, Importance
from kimi_mlx.weights.plan import WeightPlan


@dataclass(frozen=True)
class SummaryRow:
    """All matrices of one kind: stored format, format in the output, and size in the output."""

    kind: str
    source: str
    target: str
    size_bytes: int


def summarize(plan: ConversionPlan) -> list[SummaryRow]:
    """Return a row for each kind and format of matrix, the largest first."""
    sizes: Counter[tuple[str, str, str]] = Counter()
    for weight in plan.weights:
        sizes[weight.kind, _describe_stored(weight.stored_plans[0]), _describe_target(weight)] += weight.plan.size_bytes
    return [SummaryRow(*labels, size) for labels, size in sizes.most_common()]


def list_notes(plan: ConversionPlan) -> list[str]:
    """Return notes on the result: lost accuracy, matrices that stay float, and skipped parts."""
    notes: list[str] = []
    if requantized := [weight for weight in plan.weights if _is_requantized(weight)]:
        kinds = ", ".join(dict.fromkeys(map(_describe_requantized, requantized)))
        notes.append(
            f"these tensors are re-quantized, which loses accuracy (convert from the original if you can): {kinds}"
        )
    if floats := [weight for weight in plan.weights if weight.is_indivisible]:
        notes.append(
            f"{len(floats)} matrices stay {DTYPE_NAMES[plan.dtype]} because their columns do not divide into groups: "
            f"first `{floats[0].path}` with {floats[0].shape[-1]} columns"
        )
    if plan.lacks_vision:
        notes.append("the vision tower is left out, so the result does not see images")
    return notes


def list_importance_notes(importance: Importance | None) -> list[str]:
    """Return notes on experts and inputs that the texts of an importance file do not cover."""
    if importance is None:
        return []
    coverage = importance.coverage()
    notes: list[str] = []
    if coverage.rare:
        notes.append(
            f"importance: {coverage.rare:,} of {coverage.experts:,} experts saw fewer than {MIN_TOKENS} tokens "
            f"({coverage.unseen:,} of them none); they use the mean of their layer. More text helps"
        )
    if coverage.uniform:
        notes.append(f"importance: {coverage.uniform:,} inputs have no activations; their columns count equally")
    return notes


def _describe_requantized(weight: ConvertedWeight) -> str:
    """Describe a change of bits, such as `routed experts (4 to 2 bits)`."""
    old, new = weight.stored_plans[0].quantization, weight.plan.quantization
    assert old is not None
    assert new is not None
    return f"{weight.kind} ({old.bits} to {new.bits} bits)" if old.bits != new.bits else weight.kind


def _is_requantized(weight: ConvertedWeight) -> bool:
    stored = weight.stored_plans[0].quantization
    return not weight.is_copied and stored is not None and weight.plan.quantization is not None


def _describe_stored(plan: WeightPlan) -> str:
    field = plan.arrays[0].copies[0].field
    if field.decode == "fp8":
        return "FP8"
    if field.quantized is not None:
        return _describe_format(field.quantized.quantization, "F32")
    if any(array.copies[0].field.decode == "biases" for array in plan.arrays):
        assert plan.quantization is not None
        return f"INT{plan.quantization.bits}, groups of {plan.quantization.group_size}"
    return _describe_format(plan.quantization, field.dtype)


def _describe_target(weight: ConvertedWeight) -> str:
    description = _describe_format(weight.plan.quantization, weight.plan.arrays[0].dtype)
    is_float = weight.plan.quantization is None
    is_unchanged = weight.is_copied or (is_float and description == _describe_stored(weight.stored_plans[0]))
    return description + ", unchanged" * is_unchanged


def _describe_format(quantization: Quantization | None, dtype: str) -> str:
    if quantization is None:
        return DTYPE_NAMES[dtype]
    if quantization.mode != "affine":
        return quantization.mode
    return f"{quantization.bits} bits, groups of {quantization.group_size}"
