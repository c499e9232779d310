"""Training: losses, settings, and one loop on `accelerate` that every learning pass shares."""

from .loop import EpochResult, TrainResult, train
from .losses import CrossEntropy, KnowledgeDistillation, Lesson, Objective
from .settings import TrainSettings

__all__ = [
    "CrossEntropy",
    "EpochResult",
    "KnowledgeDistillation",
    "Lesson",
    "Objective",
    "TrainResult",
    "TrainSettings",
    "train",
]
