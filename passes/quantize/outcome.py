"""What quantisation did to each layer and to all of them: sentences and numbers for the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ...runtime.layers.pq_codebook import bits
from .plan import Job
from .recipe import Recipe


@dataclass(frozen=True)
class Outcome:
    """One layer.

    Attributes:
        layer: its path.
        subspace: inputs per sub-space, d.
        codewords: per sub-space, K.
        codebook: what a file keeps of the codewords.
        dense_bytes: of its weight before.
        bytes: of codebook and packed indices.
        weight_error: ‖W − Ŵ‖ / ‖W‖ of the weight as it is stored.
        index_bits: mean bits of an index with an ideal code for the layer: the entropy of the ranks of codewords, by
            how often their sub-space uses them, at most log2(K).
        before: relative error ‖Y − X Ŵ‖ / ‖Y‖ of k-means on the calibration data; None without data.
        after: the same behind error correction, with codewords as they are stored.
        errors: what error correction minimises, to begin with and behind each sweep, in the same unit: the error of
            the response, λ ‖W − Ŵ‖², and with a weight on the rate μ times the bits of all indices.
        place: where a new constant went: `bias`, `running mean`, `new bias`, or `unchanged`.
    """

    layer: str
    subspace: int
    codewords: int
    codebook: str
    dense_bytes: int
    bytes: int
    weight_error: float
    index_bits: float
    before: float | None = None
    after: float | None = None
    errors: list[float] = field(default_factory=list)
    place: str = "unchanged"


def describe(outcomes: Sequence[Outcome], jobs: Sequence[Job], recipe: Recipe, images: int) -> list[str]:
    """Sentences for the report."""
    if not outcomes:
        return ["no layer was quantised"]
    dense, small = sum(o.dense_bytes for o in outcomes), sum(o.bytes for o in outcomes)
    settings = {f"d={o.subspace}, K={o.codewords}" for o in outcomes}
    how = f" ({'; '.join(sorted(settings))})" if len(settings) <= 3 else ""
    notes = [
        f"{len(jobs)} layers as codebooks and indices{how}: {dense:,} → {small:,} bytes of weights, "
        f"{dense / small:.1f} times smaller"
    ]
    if recipe.entropy:
        notes.append(_rate(outcomes, jobs, recipe.rate_weight))
    pairs = [(o.before, o.after) for o in outcomes if o.before is not None and o.after is not None]
    if pairs:
        first, last = (sum(side) / len(pairs) for side in zip(*pairs, strict=True))
        inputs = "the quantised layers before" if recipe.correction == "accumulated" else "the original network"
        notes.append(
            f"error correction on {images:,} images, inputs from {inputs}: mean relative error of the responses "
            f"{first:.3f} → {last:.3f}"
        )
    return notes


def _rate(outcomes: Sequence[Outcome], jobs: Sequence[Job], rate_weight: float) -> str:
    counts = [job.layout.indices for job in jobs]
    coded = sum(count * o.index_bits for count, o in zip(counts, outcomes, strict=True)) / sum(counts)
    packed = sum(count * bits(o.codewords) for count, o in zip(counts, outcomes, strict=True)) / sum(counts)
    priced = f"; they count in what was minimised, with rate weight {rate_weight:g}" if rate_weight else ""
    return f"indices have {coded:.2f} bits of entropy, {packed:.2f} bits packed{priced}"


def numbers(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Numbers for the report, as JSON values."""
    dense, small = sum(o.dense_bytes for o in outcomes), sum(o.bytes for o in outcomes)
    return {"layers": [asdict(outcome) for outcome in outcomes], "weight_bytes": {"before": dense, "after": small}}
