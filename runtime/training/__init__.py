"""Training: losses, settings, and one loop on `accelerate` that every learning pass shares."""

from .callbacks import Callback
from .features import Taps
from .loop import train
from .losses import CrossEntropy, KnowledgeDistillation, Lesson, Objective
from .results import EpochResult, TrainResult
from .settings import TrainSettings

__all__ = [
    "Callback",
    "CrossEntropy",
    "EpochResult",
    "KnowledgeDistillation",
    "Lesson",
    "Objective",
    "Taps",
    "TrainResult",
    "TrainSettings",
    "train",
]
