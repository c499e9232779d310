"""Torch-Pruning's group norm pruner (Fang et al. 2023, DepGraph), as its CIFAR benchmark runs it."""

from __future__ import annotations

import copy

import torch
import torch_pruning as tp
from torch import nn

from ...ir.errors import BudgetError
from .peer import count_macs

STEPS = 400  # of its benchmark (--iterative-steps)


def prune_group_norm(network: nn.Module, image: torch.Tensor, macs: float) -> nn.Module:
    """A copy of `network`, cut step by step with one threshold for all layers until `macs` of its MACs are left.

    The classifier is left alone. Without sparse training before, as the other rows have none either.

    Args:
        network: not changed.
        image: an example input.
        macs: share of the MACs that may remain, 0-1.

    Raises:
        BudgetError: it ends above the budget.
    """
    pruned, whole = copy.deepcopy(network).eval(), count_macs(network, image)
    pruner = tp.pruner.GroupNormPruner(
        pruned,
        image,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        global_pruning=True,
        pruning_ratio=0.98,
        iterative_steps=STEPS,
        ignored_layers=[module for module in pruned.modules() if isinstance(module, nn.Linear)],
    )
    for _ in range(STEPS):
        if count_macs(pruned, image) <= macs * whole:
            return pruned
        pruner.step()
    raise BudgetError(
        f"Torch-Pruning left {count_macs(pruned, image) / whole:.1%} of the MACs, {macs:.1%} were allowed"
    )
