"""Training: losses, settings, and one loop on `accelerate` that every learning pass shares."""

from .loop import EpochResult, TrainResult, train
from .losses import CrossEntropy, KnowledgeDistillation, Objective
from .settings import TrainSettings

__all__ = [
    "CrossEntropy",
    "EpochResult",
    "KnowledgeDistillation",
    "Objective",
    "TrainResult",
    "TrainSettings",
    "train",
]
