"""What a pass leaves for those that come after it."""

from __future__ import annotations

from pathlib import Path

from .analyse.over_time import TimeStatistics

FILE = "weight-statistics.safetensors"


class Records:
    """Statistics that a training pass recorded, for a later pass of the same pipeline.

    Args:
        folder: keeps them as a file as well, so that a resumed run finds them; None keeps them in memory alone.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._statistics: TimeStatistics | None = None

    @property
    def statistics(self) -> TimeStatistics | None:
        """The history of the filters while the network trained last (`distill` with `record: true`); None without one.

        Raises:
            ArtifactError: the file of an earlier part of this run cannot be read.
        """
        if self._statistics is None and self.folder is not None and (self.folder / FILE).exists():
            self._statistics = TimeStatistics.load(self.folder / FILE)
        return self._statistics

    @statistics.setter
    def statistics(self, found: TimeStatistics) -> None:
        self._statistics = found
        if self.folder is not None:
            found.save(self.folder / FILE)

    def clear(self) -> None:
        """Forget those of an earlier run."""
        self._statistics = None
        if self.folder is not None:
            (self.folder / FILE).unlink(missing_ok=True)
