"""Objectives: what a student is asked for, given the targets and what its teacher says. One file, one objective."""

from .attention import AttentionTransfer
from .class_means import mean_scale_factors
from .cross_entropy import CrossEntropy
from .decoupled import DecoupledDistillation
from .distillation import KnowledgeDistillation, soft_divergence, standardised
from .hint import Hint
from .lesson import Lesson, Objective
from .measures import rank_correlation, ratio_error
from .ratios import scale_factors
from .scale_factor import ScaleFactor
from .weighted_sum import Sum

__all__ = [
    "AttentionTransfer",
    "CrossEntropy",
    "DecoupledDistillation",
    "Hint",
    "KnowledgeDistillation",
    "Lesson",
    "Objective",
    "ScaleFactor",
    "Sum",
    "mean_scale_factors",
    "rank_correlation",
    "ratio_error",
    "scale_factors",
    "soft_divergence",
    "standardised",
]
