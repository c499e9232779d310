"""`quantize-int8`: weights and inputs of 8 bits."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from ...ir.graph import Graph, submodule
from ...runtime.layers import BinaryLayer, Int8Layer, PQLayer
from ..base import LOSSY, Context, Pass, PassResult, Semantics, Skip
from ..runner import check_finite
from .int8 import install_int8, observe_inputs, unfit
from .settings import matching


class QuantizeInt8(Pass):
    """Give convolutions and linear layers weights and inputs of 8 bits.

    A weight is a whole number from -127 to 127 times the step of its output, an input a byte q that stands for
    s (q - z) on one grid for the layer, on which zero lies exactly. A layer then adds up whole numbers,

        y[o] = s step[o] Σ (q - z) w[o] + bias[o]

    and a file holds one byte for each weight: a quarter. Inputs are rounded within the least and largest value that
    calibration images (or else training images, or else the example inputs) gave there; what lies beyond counts as the
    nearest end. The layers can be trained further, and `emit` makes the integer kernels run; fold batch norms before or
    after, which comes to the same but for rounding.

    Source: B. Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference, CVPR 2018.
    """

    name: ClassVar[str] = "quantize-int8"
    semantics: ClassVar[Semantics] = LOSSY

    ignore: tuple[str, ...] = ()
    """Patterns of layers that stay as they are."""

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Quantise what can be quantised; the rest is skipped with its reason."""
        check_finite(graph.module)
        chosen, skips = self._choose(graph)
        with graph.edit(self.name):
            install_int8(graph, chosen)
        calibrated = observe_inputs(graph, list(chosen.values()), context, self.name)
        result = PassResult(skips=skips, metrics={"int8_layers": list(chosen)})
        result.notes.append(self._tell(graph, list(chosen)))
        result.notes += [calibrated] if calibrated else []
        return result

    def _choose(self, graph: Graph) -> tuple[dict[str, fx.Node], list[Skip]]:
        """Layers by path, and why others are left alone."""
        mixers = {str(node.target): node for node in graph.nodes if _mixes(graph, node)}
        who = f"{self.title()}, option 'ignore'"
        ignored = {path for pattern in self.ignore for path in matching(pattern, mixers, who)}
        chosen, skips = dict[str, fx.Node](), list[Skip]()
        for path, node in mixers.items():
            reason = "ignored by option" if path in ignored else _unfit(graph, node)
            if reason is None:
                chosen[path] = node
            elif reason:
                skips.append(Skip(path, reason))
        return chosen, skips

    def _tell(self, graph: Graph, paths: list[str]) -> str:
        if not paths:
            return "no layer is left to quantise"
        layers: list[Any] = [submodule(graph.module, path) for path in paths]
        small = sum(layer.weight.numel() for layer in layers)
        total = sum(parameter.numel() for parameter in graph.module.parameters())
        return f"weights of {len(paths)} layers have 8 bits: {small:,} of {total:,} parameters"


def _mixes(graph: Graph, node: fx.Node) -> bool:
    return isinstance(graph.layer(node), (_ConvNd, nn.Linear, BinaryLayer, Int8Layer, PQLayer))


def _unfit(graph: Graph, node: fx.Node) -> str | None:
    """Why a layer keeps its precision; empty where it has 8 bits already."""
    groups = getattr(graph.layer(node), "groups", 1)
    if groups != 1:
        return f"a convolution of {groups} groups: the 8-bit kernels have one, it would lose accuracy and gain no time"
    return unfit(graph, node)
