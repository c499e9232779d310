"""Training: losses, settings, and one loop on `accelerate` that every learning pass shares."""

from .callbacks import Callback
from .features import Taps
from .loop import train
from .losses import (
    AttentionTransfer,
    CrossEntropy,
    DecoupledDistillation,
    Hint,
    KnowledgeDistillation,
    Lesson,
    Objective,
    ScaleFactor,
    Sum,
)
from .results import EpochResult, TrainResult
from .settings import TrainSettings

__all__ = [
    "AttentionTransfer",
    "Callback",
    "CrossEntropy",
    "DecoupledDistillation",
    "EpochResult",
    "Hint",
    "KnowledgeDistillation",
    "Lesson",
    "Objective",
    "ScaleFactor",
    "Sum",
    "Taps",
    "TrainResult",
    "TrainSettings",
    "train",
]
