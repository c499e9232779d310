"""Running a protocol: networks and rows that are not there yet, each kept as soon as it is finished."""

from __future__ import annotations

import hashlib
import json
import re
import time
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ...ir.trace import trace
from ...passes.compile import Compiled, load
from ...passes.compile import compile as compile_network
from ...passes.prune.criteria.oracle import rank_correlation
from ...runtime.atomic import write_atomically
from ...runtime.data import Data
from ...runtime.evaluate import accuracy
from .accuracy_data import Deal, Views, load_images
from .accuracy_latency import read_latency
from .accuracy_networks import build_network
from .accuracy_protocol import BASE, Case, Protocol
from .accuracy_report import Facts, Records
from .accuracy_teacher import RecordedTeacher


class Bench:
    """One protocol on its way.

    Args:
        protocol: what to measure.
        name: of the protocol, for files.
        work: keeps networks, answers of teachers, and finished rows.
        images: folder of the images.
        weights: folder of state dicts.
        console: where progress is told.
    """

    def __init__(
        self, protocol: Protocol, name: str, work: Path, images: Path | None, weights: Path | None, console: Console
    ) -> None:
        self.protocol, self.work, self.console = protocol, work, console
        self.images, self.weights = images, weights
        self.folder = work / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self._deals: dict[int, Deal] = {}

    def measure(self, cases: list[Case]) -> None:
        """Measure what is missing, all rows of a seed before the next seed; ends early only by an error."""
        self.measure_base()
        for seed in self.protocol.seeds:
            for case in cases:
                self._need(case, seed)

    def measure_base(self) -> None:
        """Accuracy and size of the network that the rows are compared with, of each seed where each has its own."""
        plan = self.protocol.networks.get(BASE)
        for seed in self._base_seeds() if plan is not None else ():
            if _read(self._base_place(seed), self._identity(BASE)) is not None:
                continue
            network = self.network(BASE, seed)
            data = replace(self.data(seed), val=self.test(seed))
            row = compile_network(network, [], self.image, data=data).report.rows[0]
            facts = {"accuracy": row.accuracy, "size_bytes": row.size_bytes}
            facts |= {"macs": 1.0, "parameters": 1.0, "bytes": 1.0}
            whole = {"whole": {"macs": row.macs, "parameters": row.parameters, "bytes": row.size_bytes}}
            _write(self._base_place(seed), self._identity(BASE), facts | whole)
            self.console.print(f"base: {row.accuracy:.2%}, {row.macs:,} MACs, {row.parameters:,} parameters")

    def bases(self) -> list[Facts]:
        """What `measure_base` found, an entry per seed that has a base of its own."""
        found = [_read(self._base_place(seed), self._identity(BASE)) for seed in self._base_seeds()]
        return [facts for facts in found if facts is not None]

    def _base_seeds(self) -> tuple[int, ...]:
        plan = self.protocol.networks.get(BASE)
        return self.protocol.seeds if plan is not None and plan.each_seed else (0,)

    def _base_place(self, seed: int) -> Path:
        return self.folder / ("base.json" if len(self._base_seeds()) == 1 else f"base-{seed}.json")

    def facts(self, case: Case, seed: int) -> Facts | None:
        """What was measured of a row, None where that is missing or belongs to another protocol."""
        return _read(self.place(case, seed), self._identity(self._content(case)))

    @cached_property
    def image(self) -> Tensor:
        """An example input."""
        inputs: Tensor = next(iter(self.data(0).need("val", who="an accuracy table")))[0]
        return inputs[:1].contiguous()

    def data(self, seed: int) -> Data:
        """The images that passes see, in the order of a seed."""
        return self._deal(seed).data

    def test(self, seed: int) -> Views:
        """The test images."""
        return self._deal(seed).test

    def _deal(self, seed: int) -> Deal:
        if seed not in self._deals:
            self._deals[seed] = load_images(self.protocol.images, self.images, self.work, seed)
        return self._deals[seed]

    def network(self, name: str, seed: int) -> nn.Module:
        """A network of the protocol, trained by its passes if it has some; kept for later runs."""
        plan = self.protocol.networks[name]
        if not plan.passes:
            return build_network(plan, self.image.shape[1], seed, self.weights)
        seed = seed if plan.each_seed else 0
        network = build_network(plan, self.image.shape[1], seed, self.weights)
        content = [plan.model_dump(mode="json"), self.protocol.images.model_dump(mode="json")]
        key = _key([*content, seed] if plan.each_seed else content)
        place = self.work / f"{plan.network}-{key}.safetensors"
        if not place.is_file():
            self.console.print(f"{name}: training {plan.network}, seed {seed}")
            compiled = compile_network(
                network, list(plan.passes), self.image, data=self.data(seed), workdir=self.work / place.stem,
                resume=True, seed=seed,
            )  # fmt: skip
            self.console.print(compiled.report)
            write_atomically(place, [save({k: v.contiguous() for k, v in compiled.module.state_dict().items()})])
        network.load_state_dict(load_file(place))
        return network

    def correlate(self) -> list[Facts]:
        """How the criteria rank the base's channels, against the change of the loss when each is removed."""
        plan, place = self.protocol.correlation, self.folder / "correlation.json"
        assert plan is not None
        identity = self._identity(plan.model_dump(mode="json"))
        facts = _read(place, identity)
        if facts is None:
            graph = trace(self.network(BASE, 0).eval(), self.image)
            found = rank_correlation(graph, self.data(0), plan.criteria, images=plan.images, console=self.console)
            facts = {"rows": [asdict(one) for one in found]}
            _write(place, identity, facts)
        rows: list[Facts] = facts["rows"]
        return rows

    def _need(self, case: Case, seed: int) -> Facts:
        """Numbers of a row, measured if they are not there; the row that it goes on from comes first."""
        if case.after is not None:
            self._need(self._before(case), seed)
        return self.facts(case, seed) or self._measure(case, seed)

    def _before(self, case: Case) -> Case:
        return next(row for row in self.protocol.rows if row.name == case.after)

    def _start(self, case: Case, seed: int) -> nn.Module | Compiled:
        """What the passes of a row work on."""
        if case.after is not None:
            return load(self.result(self._before(case), seed))
        model = self.network(case.model or self.protocol.model, seed)
        if case.peer is None:
            return model
        from .accuracy_peer import prune_group_norm

        return prune_group_norm(model, self.image, case.peer.macs)

    def _measure(self, case: Case, seed: int) -> Facts:
        place, started, cpu = self.place(case, seed), time.perf_counter(), time.process_time()
        model = self._start(case, seed)
        teacher = self.network(self.protocol.teacher or BASE, seed).eval()
        recorded = RecordedTeacher(teacher, self.folder / f"teacher-{seed}.safetensors") if case.record else None
        compiled = compile_network(
            model, case.steps, self.image, data=self.data(seed), teacher=recorded or teacher,
            workdir=self.workdir(case, seed), resume=True, seed=seed,
        )  # fmt: skip
        if recorded is not None:
            recorded.keep()
        spent = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}
        facts = self._facts(case, compiled) | spent | {"seed": seed}
        if self.protocol.images.validation:  # the report's accuracies are those on validation images
            facts |= {"accuracy": accuracy(compiled.graph, self.test(seed)), "accuracy_before_training": None}
        if self.protocol.ratios:
            facts |= measure_ratios(compiled.module, teacher, self.test(seed))
        _write(place, self._identity(self._content(case)), facts)
        self.console.print(f"[bold]{case.name}, seed {seed}[/bold]", compiled.report)
        return facts

    def _facts(self, case: Case, compiled: Compiled) -> Facts:
        """Numbers of a finished row, sizes as shares of the base's."""
        rows = compiled.report.rows
        last, whole = rows[-1], self.bases()[0]["whole"]
        cut = [row.accuracy for row in rows if row.semantics == "lossy"]
        if case.peer or case.after:
            cut = cut or [rows[0].accuracy]
        return {
            "accuracy": last.accuracy,
            "accuracy_before_training": cut[-1] if cut and last.semantics == "training" else None,
            "macs": last.macs / whole["macs"],
            "parameters": last.parameters / whole["parameters"],
            "bytes": last.size_bytes / whole["bytes"],
            "size_bytes": last.size_bytes,
            "pass_seconds": sum(row.seconds for row in rows[1:]),
            "notes": {row.name: row.notes for row in rows},
        }

    def place(self, case: Case, seed: int) -> Path:
        """File of a row's numbers."""
        slug = re.sub(r"[^a-z0-9]+", "-", case.name.lower()).strip("-")
        return self.folder / f"{slug}-{seed}.json"

    def workdir(self, case: Case, seed: int) -> Path:
        """Folder in which a row's networks are kept: another one where the protocol is another."""
        return self.place(case, seed).with_suffix(f".{self._identity(self._content(case))}")

    def result(self, case: Case, seed: int) -> Path:
        """File of a finished row's network."""
        return max(self.workdir(case, seed).glob("*.fxp"))  # they are numbered

    def _content(self, case: Case) -> Any:
        """What a row's numbers depend on, and so what its files are named after."""
        content = case.model_dump(mode="json", exclude={"after"})
        return content if case.after is None else [content, self._content(self._before(case))]

    def _identity(self, part: Any) -> str:
        plan = self.protocol
        networks = {name: network.model_dump(mode="json") for name, network in plan.networks.items()}
        return _key([part, plan.images.model_dump(mode="json"), networks, plan.model, plan.teacher])


def records_of(bench: Bench) -> Records:
    """Everything that is measured by now, in the order of the protocol."""
    bases, records = bench.bases(), {}
    if bases:
        records[BASE] = bases
    times = read_latency(bench)
    for case in bench.protocol.rows:
        facts = [found for seed in bench.protocol.seeds if (found := bench.facts(case, seed)) is not None]
        if facts:
            records[case.name] = [fact | times.get(case.name, {}) for fact in facts]
    return records


@torch.no_grad()
def measure_ratios(student: nn.Module, teacher: nn.Module, test: Views) -> Facts:
    """How well ratios of class pairs are learned, on the test images (see `ratio_error` and `rank_correlation`)."""
    from ...runtime.training.losses import rank_correlation as ratio_rank
    from ...runtime.training.losses import ratio_error

    student.eval()
    batches = [(student(inputs), teacher(inputs), targets) for inputs, targets in test]
    mine, others, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return {
        "ratio_error": ratio_error(mine, others, targets),
        "ratio_rank": ratio_rank(mine, others, targets),
    }


def _key(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _read(place: Path, identity: str) -> Facts | None:
    if not place.is_file():
        return None
    content: dict[str, Any] = json.loads(place.read_text())
    facts: Facts = content["facts"]
    return facts if content["identity"] == identity else None


def _write(place: Path, identity: str, facts: Facts) -> None:
    write_atomically(place, [json.dumps({"identity": identity, "facts": facts}, indent=1).encode()])
