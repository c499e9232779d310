"""Every pass by its name: one literal table.

The table holds places, not classes, so that `fxpress passes` and a pipeline file load only what they name.
"""

from __future__ import annotations

import importlib

from ..ir.errors import OptionError
from .base import Pass
from .options import nearest

PASSES: dict[str, str] = {
    "fold-batchnorm": "fuse.fold_batchnorm:FoldBatchnorm",
    "insert-masks": "prune.insert_masks:InsertMasks",
    "select-channels": "prune.select_channels:SelectChannels",
    "prune-channels": "prune.prune_channels:PruneChannels",
    "binarize": "binarize.binarize:Binarize",
    "alternate-update": "binarize.alternate_update:AlternateUpdate",
    "reestimate-batchnorm": "train.reestimate_batchnorm:ReestimateBatchnorm",
    "product-quantize": "quantize.product_quantize:ProductQuantize",
    "quantize-int8": "quantize.quantize_int8:QuantizeInt8",
    "distill": "train.distill:Distill",
    "emit": "emit.emit:Emit",
}
"""Name → module inside `fxpress.passes` and class."""


def find_pass(name: str) -> type[Pass]:
    """The class of a pass.

    Raises:
        OptionError: no such pass; says which there are and which name is near.
    """
    if name not in PASSES:
        raise OptionError(f"there is no pass {name!r}: {nearest(name, PASSES)}passes: {', '.join(PASSES)}")
    place, _, cls = PASSES[name].partition(":")
    found: type[Pass] = getattr(importlib.import_module(f"..{place}", __name__), cls)
    return found


def all_passes() -> dict[str, type[Pass]]:
    """Every pass, by name."""
    return {name: find_pass(name) for name in PASSES}
