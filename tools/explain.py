"""Every dependency group of a network: what may be cut, and why the rest may not.

Shown by `fxpress explain MODEL`, by `print(fxpress.explain(model, inputs))`, and as a table in a notebook.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from torch import fx, nn
from torch.export import ExportedProgram

from ..ir.graph import Graph
from ..ir.groups import Groups, find_groups
from ..ir.nodes import shape_of
from ..ir.reasons import Locked, Reason, find_locked
from ..ir.trace import Inputs, trace

WIDTH = 100
SHOWN = 24
"""Columns of the printed table, and how many groups it lists before it sums up the rest."""


@dataclass(frozen=True)
class GroupInfo:
    """Channels that live and die together.

    Attributes:
        name: the first layer that produces them.
        channels: how many independent channels there are.
        producers: layers whose output channels they are.
        members: names of all nodes whose tensors hold them.
        parameters: names of the parameters and buffers that hold them.
        macs: multiply-accumulates per image that go when all of them go; those of two groups overlap where a layer
            reads the one and produces the other.
        params: parameters that go with them.
        cuttable: whether they may be cut.
        reasons: what stands in the way, one for each blocking operation; empty where they may be cut.
    """

    name: str
    channels: int
    producers: tuple[str, ...]
    members: tuple[str, ...]
    parameters: tuple[str, ...]
    macs: int
    params: int
    cuttable: bool
    reasons: tuple[Reason, ...] = ()


@dataclass(frozen=True)
class Explanation:
    """All groups of a graph, those with most MACs first.

    Attributes:
        macs: multiply-accumulates per image.
        params: number of parameters.
        cuttable_macs: share (0-1) of the MACs that goes when every group is cut down to one channel.
        groups: what may be cut and what may not.
        shown: how many groups the printed table lists; None lists all.
    """

    macs: int
    params: int
    cuttable_macs: float
    groups: tuple[GroupInfo, ...]
    shown: int | None = SHOWN

    @property
    def blocked(self) -> tuple[GroupInfo, ...]:
        """The groups that may not be cut."""
        return tuple(group for group in self.groups if not group.cuttable)

    @property
    def summary(self) -> str:
        """One line: what share of the MACs can be cut."""
        free = [group for group in self.groups if group.cuttable]
        channels = sum(group.channels for group in free)
        return (
            f"{_percent(self.cuttable_macs)} of {amount(self.macs)} MACs can be cut: {count(len(free), 'group')} with "
            f"{count(channels, 'channel')}; {count(len(self.blocked), 'group')} cannot."
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        fields = asdict(self)
        del fields["shown"]
        return {**fields, "summary": self.summary}

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=WIDTH, color_system=None).print(self)
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        free = [group for group in self.groups if group.cuttable]
        if free:
            yield self._table(free[: self.shown])
            yield from self._rest(free)
        for group in self.blocked[: self.shown]:
            yield self._why(group)
        if self.shown is not None and len(self.blocked) > self.shown:
            yield Text(f"… and {len(self.blocked) - self.shown} more that cannot be cut (--all lists them)\n", "dim")
        yield Text(self.summary, "bold")

    def _table(self, groups: list[GroupInfo]) -> Table:
        table = Table(title="Can be cut", title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
        table.add_column("group", overflow="fold")
        for column in ("channels", "MACs", "share", "parameters"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("members", overflow="ellipsis", no_wrap=True)
        for group in groups:
            cost = (amount(group.macs), _percent(self._share(group)), amount(group.params))
            table.add_row(Text(group.name), str(group.channels), *cost, Text(_members(group), "dim"))
        return table

    def _rest(self, free: list[GroupInfo]) -> RenderResult:
        left = free[len(free) if self.shown is None else self.shown :]
        if left:
            channels = sum(group.channels for group in left)
            yield Text(f"… and {len(left)} more groups with {channels:,} channels (--all lists them)", "dim")
        yield Text()

    def _why(self, group: GroupInfo) -> Group:
        head = Text.assemble(
            ("Cannot be cut: ", "bold"),
            f"{group.name}, {count(group.channels, 'channel')}, {amount(group.macs)} MACs ",
            f"({_percent(self._share(group))}), {amount(group.params)} parameters, ",
            count(len(group.members), "member"),
        )
        kinds: dict[tuple[str, str], list[Reason]] = {}
        for reason in group.reasons:
            kinds.setdefault((reason.op, reason.text), []).append(reason)
        lines = [line for alike in kinds.values() for line in _reason_lines(alike[0], len(alike) - 1)]
        return Group(head, *(Padding(line, (0, 0, 0, 2)) for line in lines), Text())

    def _share(self, group: GroupInfo) -> float:
        return group.macs / self.macs if self.macs else 0.0

    def _repr_html_(self) -> str:
        """A table for notebooks."""
        head = _html_row("th", ("group", "channels", "MACs", "share", "parameters", "can be cut"))
        rows = "".join(_html_row("td", self._cells(group)) for group in self.groups)
        return f"<table><caption>{escape(self.summary)}</caption>{head}{rows}</table>"

    def _cells(self, group: GroupInfo) -> tuple[str, ...]:
        why = "; ".join(f"{r.node} ({r.op}) {r.text} {r.source}".strip() for r in group.reasons[:2])
        cost = (amount(group.macs), _percent(self._share(group)), amount(group.params))
        return (group.name, str(group.channels), *cost, "yes" if group.cuttable else f"no: {why}")


def explain(
    model: nn.Module | ExportedProgram | Graph,
    example_inputs: Inputs | None = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
) -> Explanation:
    """Dependency groups of a model: what may be cut, and why the rest may not.

    Args:
        model: what `trace` takes.
        example_inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs; not needed for a `Graph`.
        example_kwargs: keyword inputs beside positional ones.

    Raises:
        TraceError: the model cannot be exported on these inputs.
    """
    graph = model if isinstance(model, Graph) else trace(model, example_inputs, example_kwargs=example_kwargs)
    groups = graph.analyse(find_groups)
    infos = [*_free(groups), *(_locked(groups, found) for found in find_locked(groups))]
    infos.sort(key=lambda info: -info.macs)
    total = groups.cost()
    return Explanation(round(total.macs), round(total.params), groups.cuttable_macs, tuple(infos))


def _html_row(tag: str, cells: tuple[str, ...]) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"


def amount(value: float) -> str:
    """`1.81 G`, `512 k`, `64`: three digits and a decimal prefix."""
    for factor, prefix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= 0.9995 * factor:
            scaled = value / factor
            return f"{scaled:.{0 if scaled >= 99.95 else 1 if scaled >= 9.995 else 2}f}{prefix}"
    return f"{value:.0f}"


def count(number: int, noun: str) -> str:
    """`1 group`, `1,024 groups`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _free(groups: Groups) -> list[GroupInfo]:
    infos = []
    for group in groups.groups:
        saving = groups.saving(group)
        slots = [(slot.name, slot.dim) for slot in group.slots]
        name = layer_of(groups.graph, group.name)
        names = (name, group.channels, _producers(groups.graph, slots), group.members, _parameters(slots))
        infos.append(GroupInfo(*names, round(saving.macs), round(saving.params), True))
    return infos


def _locked(groups: Groups, found: Locked) -> GroupInfo:
    producers = _producers(groups.graph, found.slots)
    names = (
        title_of_locked(groups.graph, found),
        found.channels,
        producers,
        tuple(found.members),
        _parameters(found.slots),
    )
    return GroupInfo(*names, round(found.macs), round(found.params), False, found.reasons)


_LEAVES = (".weight", ".indices", ".codebook")


def title_of_locked(graph: Graph, found: Locked) -> str:
    """A name for channels that no group holds: the first layer that produces them, else the first that has them."""
    names = [*_producers(graph, found.slots), *(layer_of(graph, name) for name, _ in found.slots), *found.members]
    return names[0]


def _producers(graph: Graph, slots: list[tuple[str, int]]) -> tuple[str, ...]:
    """Layers whose weight, of two dimensions or more, holds the channels in its first: convolutions, linear layers.

    Product-quantized ones hold them in the last of their indices; the first of their codebooks are what they read.
    """
    own = [
        name
        for name, dim in slots
        if (name.endswith(".indices") and dim == 2)
        or (dim == 0 and not name.endswith(("bias", ".codebook")) and _rank(graph, name) > 1)
    ]
    return tuple(dict.fromkeys(layer_of(graph, name) for name in own))


def _rank(graph: Graph, slot: str) -> int:
    if not slot.startswith("%"):
        return graph.tensor(slot).dim()
    return len(shape_of(_computed(graph, slot)))


def layer_of(graph: Graph, slot: str) -> str:
    """The layer that holds a slot: `layer1.conv1` for `layer1.conv1.weight`, and for a weight that is computed before
    use (slot `%node`) the module that computes it."""
    if slot.startswith("%"):
        node = _computed(graph, slot)
        return str(node.meta.get("path") or node.name)
    return next((slot.removesuffix(leaf) for leaf in _LEAVES if slot.endswith(leaf)), slot)


def _computed(graph: Graph, slot: str) -> fx.Node:
    return next(node for node in graph.nodes if node.name == slot[1:])


def _parameters(slots: list[tuple[str, int]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for name, _ in slots if not name.startswith("%")))


def _members(group: GroupInfo, show: int = 2) -> str:
    """`12: layer1.0.conv2, layer1.1.conv2 …`: the count, and the first of the layers beside the one in the name."""
    others = [name for name in group.producers if name != group.name]
    more = " …" if len(others) > show else ""
    return f"{len(group.members)}{': ' if others else ''}{', '.join(others[:show])}{more}"


def _reason_lines(reason: Reason, more: int) -> list[Text]:
    others = f" (and {count(more, 'more such place')})" if more else ""
    lines = [Text(f"{reason.node} ({reason.op}) {reason.text}{others}")]
    if reason.source:
        lines.append(Text(reason.source, "cyan"))
    if reason.hint:
        lines.append(Text(reason.hint, "dim"))
    return lines


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
