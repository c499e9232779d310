"""Images and targets: the `Data` that passes train and measure on, and the readers behind DATA names."""

from .batches import Batch, Inputs, check_targets, checked_batches, images_in
from .data import Data, Loader
from .sources import DATASETS, load_data, load_data_like

__all__ = [
    "DATASETS",
    "Batch",
    "Data",
    "Inputs",
    "Loader",
    "check_targets",
    "checked_batches",
    "images_in",
    "load_data",
    "load_data_like",
]
