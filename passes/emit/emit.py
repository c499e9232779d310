"""`emit`: the last pass; what comes out is what runs."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import nn

from ...ir.graph import Graph
from ..base import EXACT, Context, Pass, PassResult, Semantics
from ..batch import example_batch
from ..fuse.fold_batchnorm import FoldBatchnorm
from ..fuse.fold_masks import fold_masks
from .layout import Choice, choose_layout, set_channels_last

DROPOUTS = (nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout)


class Emit(Pass):
    """Turn the graph into what runs: folded, without dropout, in the memory layout that is faster.

    Batch norms and channel masks are folded into the layers before them, and dropout goes.

    The layout is measured and not assumed: both are timed in turns on the example inputs, and channels-last (NHWC in
    memory, the shapes stay) is taken where it saves at least 3 %. Depthwise and narrow convolutions like it, networks
    that are mostly 1×1 convolutions on small maps may not, and which is which depends on the machine.

    The result is an `fx.GraphModule` of plain layers in evaluation mode: it can still be trained, exported with
    `torch.export`, compiled with `torch.compile` and frozen.
    """

    name: ClassVar[str] = "emit"
    semantics: ClassVar[Semantics] = EXACT

    engine: Literal["auto", "torch"] = "auto"
    """What will run the network: `torch`, or `auto` for the best one that there is."""
    layout: Literal["auto", "contiguous", "channels-last"] = "auto"
    """Memory layout of images; `auto` measures both."""

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Fold, drop, lay out."""
        masks, _ = fold_masks(graph, self.name)  # those between a layer and its batch norm
        result = FoldBatchnorm().run(graph, context)
        more, skips = fold_masks(graph, self.name)
        masks += more
        result.skips += skips
        dropouts = remove_dropout(graph, self.name)
        result.notes += [f"folded {masks} masks"] if masks else []
        result.notes += [f"removed {dropouts} dropout layers"] if dropouts else []
        choice = self._lay_out(graph, context)
        result.notes += [f"engine torch, {choice.reason}"]
        result.metrics |= {"engine": "torch", "layout": choice.layout, "channels_last_ratio": choice.ratio}
        return result

    def _lay_out(self, graph: Graph, context: Context) -> Choice:
        choice = choose_layout(graph, self.layout, example_batch(graph, context.inputs))
        if choice.layout == "channels-last":
            set_channels_last(graph, self.name)
        graph.module.eval()
        return choice


def remove_dropout(graph: Graph, author: str) -> int:
    """Take out what does nothing in evaluation mode; returns how many nodes went."""
    found = [node for node in graph.nodes if isinstance(graph.layer(node), DROPOUTS)]
    with graph.edit(author):
        for node in found:
            node.replace_all_uses_with(node.all_input_nodes[0])
    return len(found)
