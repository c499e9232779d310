"""How finely `pq_agreement` quantises EfficientNet-Lite0."""

from __future__ import annotations

from typing import Any

PROJECT = "_blocks.*._project_conv"
NARROW = ("_blocks.[679]._project_conv", "_blocks.10._project_conv")
LATE_EXPAND, LATE_PROJECT = "_blocks.1[2-5]._expand_conv", "_blocks.1[2-5]._project_conv"
HEAD = "_conv_head"


def options(ratio: int) -> dict[str, Any]:
    """Options of `product-quantize` with which the weights that it takes are about `ratio` times smaller.

    A 1x1 convolution shares its codewords among few vectors, one per output. Where outputs are few (80 to 320 of a
    projection), codewords are half of what it takes, and sub-spaces of one input with few codewords buy more: 480 to 80
    takes 12,000 bytes with d=2, K=8 and 13,440 with d=1, K=4, half a bit more per weight. The classifier holds 29 % of
    the weights, and the error of its outputs reaches nothing but these: it pays for the others. The first six blocks,
    1.5 % of the weights, are not quantised at all: on crops of calibration photographs, quantising them at 16x brought
    the agreement of first classes from 66 % down to 26 %.
    """
    general, last, exceptions = _TABLE[ratio]
    return {
        **_setting(*general),
        "codebook": "int8",
        "last": _setting(*last),
        "layers": {pattern: _setting(*setting) for pattern, setting in exceptions.items()},
    }


def _setting(subspace: int, codewords: int) -> dict[str, int]:
    return {"subspace": subspace, "codewords": codewords}


_Setting = tuple[int, int]
_TABLE: dict[int, tuple[_Setting, _Setting, dict[str, _Setting]]] = {
    10: ((2, 64), (4, 32), {PROJECT: (1, 8), **dict.fromkeys(NARROW, (1, 16))}),
    16: ((2, 16), (4, 16), {PROJECT: (1, 4), **dict.fromkeys(NARROW, (1, 8))}),
    20: ((2, 16), (4, 8), {PROJECT: (1, 4), LATE_EXPAND: (3, 16), LATE_PROJECT: (2, 8), HEAD: (3, 32)}),
}
"""Ratio → width d and codewords K of all layers, of the classifier, and exceptions, the last that fits."""
