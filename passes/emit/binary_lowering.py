"""A region of a graph as the program of a packed network: what is folded, fused, and in which order it runs.

    layer → (batch norm, max pool, ReLU) → quantizer     one step `conv_levels`; pools run on levels: a byte a value
    x → batch norm → quantizer                           one step `levels`, once for all that read the quantizer
    layer → batch norm → add → ReLU                      one step `conv`; a ReLU of what is added is part of it
    max pool of ReLU of batch norm                       pooled first where no factor is negative: fewer values

A max pool may wait until values are levels if what stands between rises: max(f(x)) = f(max(x)). Where a negative factor
stands behind a pool, the pool runs on floats, and the quantizer reads these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.modules.batchnorm import _BatchNorm

from ...ir.graph import Graph
from ...ir.nodes import arguments, operand, shape_of
from ...runtime.kernels.network_program import FIELDS, Program, Step
from ...runtime.layers import BinaryConv2d, BinaryLayer, HalfWaveQuantizer
from ..binarize.sources import op_name
from .binary_folding import Affine, fold_cuts, fold_thresholds, of_layer, of_norm, unchanged
from .binary_regions import Region

Tensors = tuple[Tensor, ...]
_FLAT = ("flatten", "view", "reshape", "_unsafe_view")


@dataclass
class Lowered:
    """A region as steps.

    Attributes:
        program: the steps.
        tensors: those of each step.
        outputs: for each of the region's outputs, which of the program's.
        meaning: value of the program → the node whose value it is, and the step of its levels (None: a float).
        float_pools: quantizers behind a pool and a negative factor, which read floats.
    """

    program: Program
    tensors: list[Tensors]
    outputs: list[int]
    meaning: dict[int, tuple[fx.Node, float | None]]
    float_pools: list[str] = field(default_factory=list)


def lower(graph: Graph, region: Region, steps: dict[fx.Node, float]) -> Lowered:
    """Steps that compute what a region does.

    Args:
        graph: of the region.
        region: what to lower.
        steps: step of every node whose values are levels.
    """
    return _Lowering(graph, region, steps).run()


class _Lowering:
    def __init__(self, graph: Graph, region: Region, steps: dict[fx.Node, float]) -> None:
        self.graph, self.region, self.level_steps = graph, region, steps
        self.members = set(region.nodes)
        self.order = {node: index for index, node in enumerate(region.nodes)}
        self.inputs = {node: index for index, node in enumerate(region.inputs)}
        self.steps: list[Step] = []
        self.tensors: list[Tensors] = []
        self.floats: dict[fx.Node, int] = {}
        self.levels: dict[fx.Node, int] = {}
        self.pools: dict[Any, int] = {}
        self.meaning: dict[int, tuple[fx.Node, float | None]] = {}
        self.float_pools: list[str] = []

    def run(self) -> Lowered:
        """Values are made on demand; asking for quantizers and sums in their order keeps the recursion shallow."""
        for node in self.region.nodes:
            if isinstance(self.graph.layer(node), HalfWaveQuantizer):
                self.level(node)
            elif (
                op_name(node) in ("add", "cat")
                and node not in self.level_steps
                and self.only_reader(node, "relu") is None
            ):
                self.value(node)
        made = [self.value(node) for node in self.region.outputs]
        distinct = list(dict.fromkeys(made))
        inputs = [_step("input", channels=shape_of(node)[1]) for node in self.region.inputs]
        ranks = {at: len(shape_of(node)) for at, node in zip(made, self.region.outputs, strict=True)}
        outputs = [_step("output", x=at, dims=ranks[at]) for at in distinct]
        program, tensors, number = _without_dead(
            Program(tuple(inputs), tuple(self.steps), tuple(outputs)), self.tensors
        )
        meaning = {number[at]: what for at, what in self.meaning.items() if at in number}
        return Lowered(program, tensors, [distinct.index(at) for at in made], meaning, self.float_pools)

    def emit(self, kind: str, tensors: Tensors = (), node: fx.Node | None = None, **fields: Any) -> int:
        """Append a step; the number of its value. `node` is whose value that is."""
        self.steps.append(_step(kind, **fields))
        self.tensors.append(tensors)
        number = len(self.inputs) + len(self.steps) - 1
        if node is not None:
            self.meaning[number] = (node, None)
        return number

    # -- what the graph says ------------------------------------------------------------------------------------

    def only_reader(self, node: fx.Node, name: str) -> fx.Node | None:
        """The one node that reads this one, if it is a certain operation of the region."""
        readers = list(node.users)
        return readers[0] if len(readers) == 1 and readers[0] in self.members and op_name(readers[0]) == name else None

    def alone(self, node: fx.Node) -> bool:
        """Whether a node belongs to the region and one other node reads it."""
        return node in self.members and len(node.users) == 1

    def norm(self, node: fx.Node) -> Affine | None:
        """The affine map of a batch norm of the region."""
        layer = self.graph.layer(node)
        return of_norm(layer) if node in self.members and isinstance(layer, _BatchNorm) else None

    def binary(self, node: fx.Node) -> BinaryLayer | None:
        """The binary layer of a node of the region."""
        layer = self.graph.layer(node)
        return layer if node in self.members and isinstance(layer, BinaryLayer) else None

    # -- floats -------------------------------------------------------------------------------------------------

    def value(self, node: fx.Node) -> int:
        """Number of the value that holds a node's floats."""
        if node in self.inputs:
            return self.inputs[node]
        if node not in self.floats:
            self.floats[node] = self._value(node)
        return self.floats[node]

    def _value(self, node: fx.Node) -> int:
        if node in self.level_steps:
            step = torch.tensor([self.level_steps[node]])
            return self.emit("decode", (step,), x=self.level(node))
        layer, name = self.graph.layer(node), op_name(node)
        if isinstance(layer, BinaryLayer):
            return self._layer(node, unchanged(), node)
        if isinstance(layer, _BatchNorm):
            return self._normed(node, relu=False, result=node)
        if name == "relu" and self._fusible(operand(node)):
            return self._summed(operand(node), relu=True, result=node)
        if name == "add":
            return self._summed(node, relu=False, result=node)
        if name in ("slice", "pad", "constant_pad_nd"):
            return self._shortcut(node, peel=False)[0]
        return self._plain(node, name)

    def _plain(self, node: fx.Node, name: str) -> int:
        if name == "max_pool2d":
            return self._pooled(node)
        if name == "cat":
            return self.emit("cat", node=node, x=tuple(self.value(part) for part in arguments(node)["tensors"]))
        x = self.value(operand(node))
        if name == "avg_pool2d":
            window = _window(node, ("kernel_size", "stride", "padding"))
            return self.emit(
                "average_pool", node=node, x=x, count_padding=int(arguments(node)["count_include_pad"]), **window
            )
        kind = "relu" if name == "relu" else "flatten" if name in _FLAT else "mean"
        return self.emit(kind, node=node, x=x)

    def _fusible(self, node: fx.Node) -> bool:
        """Whether a ReLU behind this node can be part of the step that makes it."""
        return self.alone(node) and (self.norm(node) is not None or op_name(node) == "add")

    def _summed(self, node: fx.Node, *, relu: bool, result: fx.Node) -> int:
        """A sum or a batch norm, with a ReLU behind; a layer on one side of the sum takes it into its own step."""
        if op_name(node) != "add":
            return self._normed(node, relu=relu, result=result)
        parts: list[fx.Node] = [arguments(node)["self"], arguments(node)["other"]]
        layers = [(part, self._layer_before(part)) for part in parts if self.alone(part)]
        found = [(part, layer) for part, layer in layers if layer is not None]
        if not found or parts[0] is parts[1]:
            x, (y, rectified) = self.value(parts[0]), self._peeled(parts[1])
            return self.emit("add", node=result, x=x, y=y, y_relu=int(rectified), relu=int(relu))
        part, (layer, affine) = max(found, key=lambda pair: self.order[pair[1][0]])
        added, rectified = self._peeled(parts[1] if part is parts[0] else parts[0])
        return self._layer(layer, affine, result, added=added, added_relu=int(rectified), relu=int(relu))

    def _layer_before(self, node: fx.Node) -> tuple[fx.Node, Affine] | None:
        """A binary layer that nothing but this node's chain reads, and the batch norm between them."""
        affine = unchanged()
        norm = self.norm(node)
        if norm is not None:
            node, affine = operand(node), norm
        return (node, affine) if self.alone(node) and self.binary(node) is not None else None

    def _peeled(self, node: fx.Node) -> tuple[int, bool]:
        """A value, and whether a ReLU of it is still to be taken: a step that adds it does so."""
        if node in self.members and node not in self.floats:
            if op_name(node) == "relu" and not self._fusible(operand(node)):
                return self.value(operand(node)), True
            if op_name(node) in ("slice", "pad", "constant_pad_nd"):
                return self._shortcut(node, peel=True)
        return self.value(node), False

    def _normed(self, node: fx.Node, *, relu: bool, result: fx.Node) -> int:
        norm = self.norm(node)
        assert norm is not None
        layer = self._layer_before(node)
        if layer is not None:
            return self._layer(layer[0], norm, result, relu=int(relu))
        x = self.value(operand(node))
        return self.emit("affine", (norm.stacked(),), result, x=x, channels=len(norm.factor), relu=int(relu))

    def _layer(self, node: fx.Node, after: Affine, result: fx.Node, **end: int) -> int:
        """A layer with floats as outputs."""
        layer: Any = self.graph.layer(node)
        plus, affine = of_layer(layer, self.level_steps[operand(node)])
        return self.emit("conv", (_filters(plus), affine.then(after).stacked()), result, **self._geometry(node), **end)

    def _geometry(self, node: fx.Node) -> dict[str, Any]:
        layer: Any = self.graph.layer(node)
        x = self.level(operand(node))
        if not isinstance(layer, BinaryConv2d):
            return {"x": x, "outputs": layer.out_features, "channels": layer.in_features, "linear": 1}
        sizes = {"outputs": layer.out_channels, "channels": layer.in_channels // layer.groups, "groups": layer.groups}
        window = {"kernel": layer.kernel_size, "stride": layer.stride, "padding": layer.padding}
        return {"x": x, **sizes, **window, "dilation": layer.dilation}

    def _pooled(self, node: fx.Node) -> int:
        """A max pool of floats; ReLU and batch norm in front of it come behind it, where that changes nothing."""
        source, chain = operand(node), []
        while self.alone(source) and (op_name(source) == "relu" or self.norm(source) is not None):
            norm = self.norm(source)
            if norm is not None and (bool((norm.factor < 0).any()) or self._layer_before(source) is not None):
                break
            chain.append(source)
            source = operand(source)
        pooled = self._pool_of(self.value(source), node, None if chain else node)
        while chain:
            step = chain.pop()
            norm, rectified = self.norm(step), bool(chain) and op_name(chain[-1]) == "relu"
            result = node if len(chain) <= int(rectified and norm is not None) else None
            if norm is None:
                pooled = self.emit("relu", node=result, x=pooled)
                continue
            if rectified:
                chain.pop()
            fields: dict[str, Any] = {"channels": len(norm.factor), "relu": int(rectified)}
            pooled = self.emit("affine", (norm.stacked(),), result, x=pooled, **fields)
        return pooled

    def _pool_of(self, x: int, node: fx.Node, result: fx.Node | None) -> int:
        """One max pool of a value: the same one is not run twice."""
        window = _window(node, ("kernel_size", "stride", "padding", "dilation"))
        window["ceil"] = int(arguments(node)["ceil_mode"])
        key = (x, *window.values())
        if key not in self.pools:
            self.pools[key] = self.emit("max_pool", node=result, x=x, **window)
        return self.pools[key]

    def _shortcut(self, node: fx.Node, *, peel: bool) -> tuple[int, bool]:
        """Slices and padding of channels in one step, with a ReLU before them left to the reader if `peel`."""
        start, stride, before, after = node, [1, 1], 0, 0
        while node in self.members and (node is start or len(node.users) == 1):
            given, name = arguments(node) if node.op == "call_function" else {}, op_name(node)
            if name == "slice":
                stride[given["dim"] % 4 - 2] *= given["step"]
            elif name in ("pad", "constant_pad_nd"):
                before, after = before + given["pad"][4], after + given["pad"][5]
            else:
                break
            node = operand(node)
        rectified = peel and node in self.members and op_name(node) == "relu" and node not in self.floats
        rectified = rectified and not self._fusible(operand(node))
        x = self.value(operand(node) if rectified else node)
        fields: dict[str, Any] = {"stride": tuple(stride), "before": before, "after": after}
        return self.emit("shortcut", node=None if rectified else start, x=x, **fields), rectified

    # -- levels -------------------------------------------------------------------------------------------------

    def level(self, node: fx.Node) -> int:
        """Number of the value that holds a node's levels."""
        if node not in self.levels:
            self.levels[node] = number = self._level(node)
            self.meaning[number] = (node, self.level_steps[node])
        return self.levels[node]

    def _level(self, node: fx.Node) -> int:
        step, name = self.level_steps[node], op_name(node)
        if node not in self.members:  # comes from outside as floats
            thresholds = (0.5 * step, 1.5 * step, 2.5 * step)
            return self._compared(self.value(node), unchanged(shape_of(node)[1]), thresholds)
        if isinstance(self.graph.layer(node), HalfWaveQuantizer):
            return self._quantized(node)
        if name == "cat":
            return self.emit("cat", x=tuple(self.level(part) for part in arguments(node)["tensors"]))
        if name == "max_pool2d":
            return self._pool_of(self.level(operand(node)), node, None)
        return self.emit("flatten", x=self.level(operand(node)))

    def _compared(self, x: int, affine: Affine, thresholds: tuple[float, ...]) -> int:
        return self.emit("levels", (fold_thresholds(affine, thresholds),), x=x, channels=len(affine.factor))

    def _quantized(self, node: fx.Node) -> int:
        quantizer: Any = self.graph.layer(node)
        source, affine, pools = self._behind_layer(operand(node), str(node.target))
        if self.alone(source) and self.binary(source) is not None:
            found = self._cut(source, affine, quantizer.thresholds)
            for pool in reversed(pools):
                found = self._pool_of(found, pool, None)
            return found
        source, norm = operand(node), self.norm(operand(node))
        if norm is not None and self.alone(source):
            return self._compared(self.value(operand(source)), norm, quantizer.thresholds)
        return self._compared(self.value(source), unchanged(shape_of(source)[1]), quantizer.thresholds)

    def _behind_layer(self, node: fx.Node, quantizer: str) -> tuple[fx.Node, Affine, list[fx.Node]]:
        """Go back over batch norms, pools and ReLU that can be folded into the levels of a layer's sums."""
        affine, pools, plain = unchanged(), [], True
        while self.alone(node):
            norm, name = self.norm(node), op_name(node)
            if norm is not None:
                affine, plain = norm.then(affine), False
            elif name == "max_pool2d" and node not in self.level_steps:
                if bool((affine.factor < 0).any()):
                    self.float_pools.append(quantizer)
                    break
                pools.append(node)
            elif name != "relu" or not plain:  # a ReLU right before the quantizer: no threshold lies below zero
                break
            node = operand(node)
        return node, affine, pools

    def _cut(self, node: fx.Node, after: Affine, thresholds: tuple[float, ...]) -> int:
        """A layer with levels as outputs."""
        layer: Any = self.graph.layer(node)
        plus, affine = of_layer(layer, self.level_steps[operand(node)])
        terms = math.prod(plus.shape[1:])
        flip, cuts = fold_cuts(affine.then(after), thresholds, terms)
        plus = _filters(plus) ^ flip[:, None, None, None]
        return self.emit("conv_levels", (plus, cuts), **self._geometry(node))


def _step(kind: str, **fields: Any) -> Step:
    assert fields.keys() <= FIELDS[kind].keys(), (kind, fields)
    return Step(kind, {name: fields.get(name, default) for name, default in FIELDS[kind].items()})


def _filters(plus: Tensor) -> Tensor:
    """Signs `(O, C, kh, kw)`, of a linear layer with one tap."""
    return plus if plus.dim() == 4 else plus[:, :, None, None]


def _window(node: fx.Node, names: Iterable[str]) -> dict[str, Any]:
    """Kernel, stride, padding (and dilation) of a pool, as pairs; a stride that is not given is the kernel's size."""
    given = arguments(node)
    found = {name.removesuffix("_size"): list(given[name]) or list(given["kernel_size"]) for name in names}
    return {name: (sizes[0], sizes[-1]) for name, sizes in found.items()}


def _without_dead(program: Program, tensors: list[Tensors]) -> tuple[Program, list[Tensors], dict[int, int]]:
    """The program without steps that nothing reads; also the new number of every value that stays."""
    first = len(program.inputs)
    used = {step["x"] for step in program.outputs}
    for index in range(len(program.steps) - 1, -1, -1):
        if first + index in used:
            used.update(program.steps[index].operands())
    kept = [index for index in range(len(program.steps)) if first + index in used]
    number = {**{at: at for at in range(first)}, **{first + old: first + new for new, old in enumerate(kept)}}
    steps = tuple(renumbered(program.steps[index], number.__getitem__) for index in kept)
    outputs = tuple(renumbered(step, number.__getitem__) for step in program.outputs)
    return Program(program.inputs, steps, outputs), [tensors[index] for index in kept], number


def renumbered(step: Step, number: Callable[[int], int]) -> Step:
    """A step that reads its values under other numbers."""
    fields = dict(step.fields)
    for name in ("x", "y", "added"):
        value = fields.get(name, -1)
        if isinstance(value, tuple):
            fields[name] = tuple(map(number, value))
        elif value >= 0:
            fields[name] = number(value)
    return Step(step.kind, fields)
