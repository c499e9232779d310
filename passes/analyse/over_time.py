"""System 1's time statistics: what becomes of each filter while the network learns.

With m_{j,e} = mean|F_j| and sd_{j,e} = std(F_j) of filter j at checkpoint e,

    M_j = mean_e m_{j,e},   S_j = mean_e sd_{j,e},   V_j = std_e(m_{j,e}) / M_j.

V_j is the filter's instability: one that still wanders late in training has not found its place. Only three sums per
filter are kept, however many checkpoints there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...ir.errors import ArtifactError, OptionError
from ...ir.graph import Graph
from ...runtime.atomic import write_atomically
from .moments import Moments
from .weights import FilterStatistics, filters_of

FloatArray = npt.NDArray[np.float64]
Checkpoint = Mapping[str, Tensor] | str | Path

_FORMAT = "fxpress weight statistics 1"


@dataclass
class FilterHistory:
    """The sums of one weight's filters, (filters,) in float64.

    Attributes:
        size: mean and deviations of m over the checkpoints.
        spread: the same of sd.
    """

    size: Moments
    spread: Moments

    @property
    def mean(self) -> FloatArray:
        """M: mean over the checkpoints of a filter's mean |w|."""
        return self.size.mean.numpy()

    @property
    def std(self) -> FloatArray:
        """S: mean over the checkpoints of the standard deviation of a filter's weights."""
        return self.spread.mean.numpy()

    @property
    def instability(self) -> FloatArray | None:
        """V: standard deviation of m over the checkpoints, divided by M; None from a single one.

        0 for a filter that was zero throughout.
        """
        if self.size.count < 2:
            return None
        wandering = self.size.variance.sqrt()
        return torch.where(self.size.mean > 0, wandering / self.size.mean, 0.0).numpy()


@dataclass
class TimeStatistics:
    """The history of every filter, by the name of its weight (`layer1.0.conv1.weight`).

    A criterion asks `statistics.filters(name, count)` for each weight and falls back to the present weights, without V,
    where that is None.

    Attributes:
        checkpoints: how many were looked at.
        history: the sums.
    """

    checkpoints: int = 0
    history: dict[str, FilterHistory] = field(default_factory=dict)

    def add(self, rows: Mapping[str, Tensor]) -> None:
        """Look at one checkpoint: the filters (filters, weights) of each weight, see `weights.filters_of`.

        Raises:
            OptionError: other weights, or other numbers of filters, than in the checkpoints before.
        """
        seen = {name: FilterStatistics.of(values) for name, values in rows.items()}
        if not self.checkpoints:
            self.history = {name: _empty(len(found.std)) for name, found in seen.items()}
        self._check_same({name: len(found.std) for name, found in seen.items()})
        for name, found in seen.items():
            self.history[name].size.merge(_one(found.mean_abs))
            self.history[name].spread.merge(_one(found.std))
        self.checkpoints += 1

    def filters(self, name: str, count: int) -> FilterHistory | None:
        """The history of one weight's filters, None where that weight was not recorded.

        Args:
            name: of the weight, such as `conv1.weight`.
            count: how many filters it has now.

        Raises:
            OptionError: it had another number of filters when it was recorded.
        """
        found = self.history.get(name)
        if found is None:
            return None
        recorded = len(found.size.mean)
        if recorded != count:
            raise OptionError(
                f"{name!r} has {count} filters, its recorded statistics are of {recorded}",
                hint="Channels were cut since: record again while the cut network trains, or drop the record.",
            )
        return found

    def state_dict(self) -> dict[str, Any]:
        """All sums as tensors by name."""
        state: dict[str, Any] = {"checkpoints": torch.tensor(self.checkpoints)}
        for name, one in self.history.items():
            state |= {f"{name}/{part}": tensor for part, tensor in _parts(one).items()}
        return state

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> TimeStatistics:
        """The inverse of `state_dict`.

        Raises:
            ArtifactError: something is missing or of another form.
        """
        try:
            count = int(state["checkpoints"])
            names = dict.fromkeys(key.rpartition("/")[0] for key in state if "/" in key)
            return cls(count, {name: _from_parts(name, state, count) for name in names})
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise ArtifactError(f"these are no weight statistics: {error} is missing or of another form") from None

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, atomically."""
        state = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        write_atomically(Path(path), [safetensors.torch.save(state, {"format": _FORMAT})])

    @classmethod
    def load(cls, path: str | Path) -> TimeStatistics:
        """Read what `save` wrote.

        Raises:
            ArtifactError: the file cannot be read or holds something else.
        """
        try:
            with safe_open(path, "pt") as file:
                if (file.metadata() or {}).get("format") != _FORMAT:
                    raise ArtifactError(
                        f"{path} holds no weight statistics", hint="They are written by `distill` with `record: FILE`."
                    )
                return cls.from_state({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"weight statistics {path} cannot be read: {error}") from None

    def _check_same(self, counts: Mapping[str, int]) -> None:
        known = {name: len(one.size.mean) for name, one in self.history.items()}
        other = [name for name in {**known, **counts} if known.get(name) != counts.get(name)]
        if other:
            name = other[0]
            raise OptionError(
                f"checkpoint {self.checkpoints + 1} has {counts.get(name, 'no')} filters in {name!r}, those before it "
                f"have {known.get(name, 'none')}",
                hint="Take checkpoints of one network, of the same widths.",
            )


def time_statistics(network: nn.Module | Graph, checkpoints: Iterable[Checkpoint]) -> TimeStatistics:
    """Time statistics over a list of checkpoints, which are read one after the other.

    Args:
        network: of which they are: says where its filters lie.
        checkpoints: state dicts, or files: `.safetensors`, or `.pt` (read with `weights_only`).

    Raises:
        ModelError: a checkpoint lacks a weight or has it in another shape.
        ArtifactError: a file cannot be read.
        OptionError: no checkpoint at all.
    """
    module, found = network.module if isinstance(network, Graph) else network, TimeStatistics()
    for checkpoint in checkpoints:
        state = read_state(checkpoint) if isinstance(checkpoint, (str, Path)) else checkpoint
        found.add(filters_of(module, state))
    if not found.checkpoints:
        raise OptionError("time statistics need at least one checkpoint, and none was given")
    return found


def find_statistics(
    network: nn.Module | Graph, given: Sequence[str | Path], recorded: TimeStatistics | None
) -> TimeStatistics | None:
    """The statistics that a criterion is to use.

    Args:
        network: whose filters they are of.
        given: files named by the user: one that `TimeStatistics.save` wrote, or checkpoints in any number.
        recorded: what an earlier pass recorded (`context.records.statistics`); taken where no file is named.

    Raises:
        ArtifactError, ModelError: as `time_statistics`.
    """
    if not given:
        return recorded
    if len(given) == 1 and _is_record(given[0]):
        return TimeStatistics.load(given[0])
    return time_statistics(network, given)


def _is_record(path: str | Path) -> bool:
    """Whether a file holds statistics rather than weights."""
    try:
        with safe_open(path, "pt") as file:
            return bool((file.metadata() or {}).get("format") == _FORMAT)
    except (OSError, SafetensorError):
        return False  # no safetensors file: whoever reads it as a checkpoint says what is wrong


def read_state(path: str | Path) -> dict[str, Tensor]:
    """A state dict from a file; of a `.pt` file also one that lies under `state_dict`, `model` or `student`.

    Raises:
        ArtifactError: the file cannot be read or holds something else.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ArtifactError(f"checkpoint {path} cannot be read: {' '.join(str(error).split())[:200]}") from None
    if isinstance(state, Mapping):
        state = next((state[key] for key in ("state_dict", "model", "student") if key in state), state)
    if not isinstance(state, Mapping):
        raise ArtifactError(f"checkpoint {path} holds a {type(state).__name__}, not a state dict")
    return dict(state)


def _one(values: FloatArray) -> Moments:
    return Moments(1, torch.from_numpy(values), torch.zeros(len(values), dtype=torch.float64))


def _empty(filters: int) -> FilterHistory:
    return FilterHistory(Moments.empty(filters), Moments.empty(filters))


def _parts(one: FilterHistory) -> dict[str, Tensor]:
    return {
        "size": one.size.mean,
        "size_deviations": one.size.deviations,
        "spread": one.spread.mean,
        "spread_deviations": one.spread.deviations,
    }


def _from_parts(name: str, state: Mapping[str, Any], count: int) -> FilterHistory:
    size, moved, spread, spread_moved = (state[f"{name}/{part}"].double() for part in _parts(_empty(0)))
    if not size.shape == moved.shape == spread.shape == spread_moved.shape:
        raise ValueError(name)
    return FilterHistory(Moments(count, size, moved), Moments(count, spread, spread_moved))
