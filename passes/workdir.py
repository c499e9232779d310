"""The working directory of a compilation: a snapshot per finished pass, and going on after the last one."""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..ir.errors import ArtifactError, OptionError
from ..ir.graph import Graph
from ..runtime import artifact
from ..runtime.atomic import write_atomically
from ..runtime.processes import is_main
from ..runtime.training.checkpoint import clear_checkpoints
from .pipeline import Pipeline
from .report import Report

STATE = "state.json"
FORMAT = 1


@dataclass(frozen=True)
class Snapshot:
    """The network as one finished pass left it.

    Args:
        finished: how many passes are done.
        graph: the network.
        report: the rows so far, `trace` included.
    """

    finished: int
    graph: Graph
    report: Report


class Workdir:
    """Snapshots `NN-name.fxp` and `state.json`, which says what they belong to.

    Args:
        path: the directory; made where it does not exist.
        pipeline: the pipeline that runs.
        model: `fingerprint` of the traced network.
        seed: the effective seed.
    """

    def __init__(self, path: str | Path, pipeline: Pipeline, model: str, seed: int) -> None:
        self.path = Path(path)
        self.identity = {"pipeline": pipeline.fingerprint(), "model": model, "seed": seed}
        self.names = [f"{index:02d}-{one.name}" for index, one in enumerate(pipeline, start=1)]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OptionError(f"workdir {self.path} cannot be made: {error.strerror}") from None

    def start(self) -> None:
        """Forget an earlier run: remove its snapshots and checkpoints, and begin a new state."""
        finished = [Path(name).name for name in self._read_state().get("finished", [])]
        if is_main():
            for name in finished:
                (self.path / f"{name}.fxp").unlink(missing_ok=True)
            for name in {*finished, *self.names}:
                clear_checkpoints(self.path / name)
        self._write_state(0)

    def resume(self) -> Snapshot | None:
        """The last snapshot that can be read, or None where nothing is finished.

        A damaged snapshot is passed over, with a warning, for the one before it.

        Raises:
            OptionError: the directory belongs to another pipeline, model or seed.
        """
        state = self._read_state()
        if not state:
            self._write_state(0)
            return None
        self._refuse_other(state)
        for finished in range(len(state["finished"]), 0, -1):
            snapshot = self._try_load(finished)
            if snapshot is not None:
                return snapshot
        return None

    def save(self, finished: int, graph: Graph, report: Report) -> None:
        """Keep the network behind the pass number `finished` (from 1)."""
        if is_main():
            artifact.save(self._file(finished), graph, report=report.to_dict(), exact=True)
        self._write_state(finished)

    def scratch(self, index: int) -> Path:
        """A directory for the checkpoints of the pass number `index` (from 1)."""
        return self.path / self.names[index - 1]

    def _file(self, finished: int) -> Path:
        return self.path / f"{self.names[finished - 1]}.fxp"

    def _try_load(self, finished: int) -> Snapshot | None:
        try:
            return self._load(finished)
        except ArtifactError as error:
            warnings.warn(f"snapshot {self._file(finished)} is passed over: {error}", RuntimeWarning, stacklevel=5)
            return None

    def _load(self, finished: int) -> Snapshot:
        loaded = artifact.load(self._file(finished))
        try:
            report = Report.from_dict(loaded.report or {})
        except ValueError as error:
            raise ArtifactError(f"its report is damaged ({' '.join(str(error).split())})") from None
        if len(report.rows) != finished + 1:
            raise ArtifactError(f"its report has {len(report.rows)} rows instead of {finished + 1}")
        return Snapshot(finished, loaded.graph, report)

    def _refuse_other(self, state: dict[str, Any]) -> None:
        other = [key for key, value in self.identity.items() if state.get(key) != value]
        if other:
            raise OptionError(
                f"cannot resume: {self.path} was made with another {' and another '.join(other)}",
                hint="Give the same ones, another workdir, or resume=False to start over.",
            )

    def _read_state(self) -> dict[str, Any]:
        file = self.path / STATE
        if not file.exists():
            return {}
        try:
            state = json.loads(file.read_text(encoding="utf-8"))
            if state["format"] != FORMAT or not isinstance(state["finished"], list):
                raise ValueError("unknown format")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OptionError(f"{file} cannot be read ({error})", hint="Delete it to start over.") from None
        known: dict[str, Any] = state
        return known

    def _write_state(self, finished: int) -> None:
        state = {"format": FORMAT, **self.identity, "finished": self.names[:finished]}
        if is_main():
            write_atomically(self.path / STATE, [f"{json.dumps(state, indent=2)}\n".encode()])


def fingerprint(graph: Graph) -> str:
    """SHA-256 over the nodes of a network and all its tensors."""
    digest = hashlib.sha256()
    for node in graph.nodes:
        digest.update(f"{node.op} {node.target} {node.args} {node.kwargs}\n".encode())
    parameters = dict(graph.module.named_parameters(remove_duplicate=False))
    tensors = parameters | dict(graph.module.named_buffers(remove_duplicate=False))
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
