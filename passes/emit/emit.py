"""`emit`: the last pass; what comes out is what runs."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import nn

from ...ir.graph import Graph
from ...ir.verify import prove_equal
from ...runtime.layers import HalfWaveQuantizer, Int8Layer
from ...runtime.layers.pq_layer import PQLayer
from ..base import EXACT, LOSSY, Context, Pass, PassResult, Semantics
from ..batch import example_batch
from ..clone import clone_graph
from ..fuse.fold_batchnorm import FoldBatchnorm
from ..fuse.fold_masks import fold_masks
from .binary import pack_binary, settle_latent
from .binary_proof import prove_folded
from .epilogues import fuse_epilogues
from .identity_pools import remove_identity_pools
from .kernels import Tables, metrics_of, notes_of
from .layout import Choice, choose_layout
from .packed_pools import fuse_packed_pools

DROPOUTS = (nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout)


class Emit(Pass):
    """Turn the graph into what runs: folded, without dropout, in the memory layout and by the kernels that are faster.

    Batch norms and channel masks are folded into the layers before them; dropout goes, and so does a pool whose output
    is its input, as AlexNet's to 6×6 pixels where there are no more than these. A batch norm behind a
    product-quantized layer stays: outputs share codewords, so that none of them can have a factor of its own.

    The layout is measured and not assumed: both are timed in turns on the example inputs, and channels-last (NHWC in
    memory, the shapes stay) is taken where it saves at least 3 %. Depthwise and narrow convolutions like it, networks
    that are mostly 1×1 convolutions on small maps may not, and which is which depends on the machine.

    A product-quantized layer can run in two ways: with its weight decoded once, as the dense layer that it replaces, or
    by tables of the products of its input with the codewords, in which the indices look up what to add. `kernels: auto`
    times both on the input that the layer gets in this network, in either layout, and keeps the faster one. Who allows
    tables of 8 bits allows a convolution a decoded weight of 8 bits, too, on inputs of 8 bits: it is timed as well, and
    taken where it is the fastest and moves the outputs no further than the tables would. The sums of
    `tables: fp32` are those of the decoded weight but for rounding; int16 and int8 tables are faster and move the
    outputs: `emit` is then a lossy pass, everything else that it does is proven before, and the distance is reported
    for each layer and for the network.

    Binary layers, the batch norms, quantizers, pools and sums between them become packed networks (`binary`): one bit
    for each weight, norms and quantizers folded to whole numbers that sums are compared with, one call for each one.
    The latent weights are gone with that: such a network trains no more. Equality is proven step by step in double
    precision, and holds but for levels whose value lies on a threshold, where rounding decides; the outputs of whole
    networks can differ by such levels. Binary layers that no packed network can hold keep their place, and a file
    keeps their weights as bits too.

    8-bit layers compute with whole numbers from here on; a batch norm behind one goes into the steps of its weights. A
    ReLU or a max pool that alone reads an 8-bit layer becomes a part of it, and so does a ReLU that reads a product-
    quantized one by table, and a max pool behind that.

    The result is an `fx.GraphModule` of plain layers in evaluation mode: it can still be trained, exported with
    `torch.export`, compiled with `torch.compile` and frozen.
    """

    name: ClassVar[str] = "emit"
    semantics: ClassVar[Semantics] = EXACT

    engine: Literal["auto", "torch"] = "auto"
    """What will run the network: `torch`, or `auto` for the best one that there is."""
    layout: Literal["auto", "contiguous", "channels-last"] = "auto"
    """Memory layout of images; `auto` measures both."""
    kernels: Literal["auto", "dense", "table"] = "auto"
    """How product-quantized layers run: decoded to dense weights, by table, or what is fastest on each (`auto`)."""
    tables: Tables = "fp32"
    """Numbers in the tables of layers that run by table; other than fp32 they change the outputs. With int8,
    `kernels: auto` may also run a convolution by its decoded weight of 8 bits."""

    binary: Literal["packed", "off"] = "packed"
    """Whether binary layers are packed, or stay as they can be trained."""

    def meaning(self) -> Semantics:
        """Lossy where tables are quantised, exact otherwise."""
        return EXACT if self.tables == "fp32" else LOSSY

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Fold, drop, prove, pack, lay out and choose kernels."""
        levels = any(isinstance(layer, HalfWaveQuantizer) for layer in graph.module.modules())
        alone = self.meaning() is LOSSY or levels
        before = clone_graph(graph) if context.verify and alone else None
        masks, _ = fold_masks(graph, self.name)  # those between a layer and its batch norm
        result = FoldBatchnorm().run(graph, context)
        more, skips = fold_masks(graph, self.name)
        masks += more
        result.skips += skips
        dropouts = remove_dropout(graph, self.name)
        pools = remove_identity_pools(graph, self.name)
        if before is not None:
            result.metrics["exact_distance"] = (
                prove_folded(before, graph).distance if levels else prove_equal(before, graph)
            )
        result.notes += [f"folded {masks} masks"] if masks else []
        result.notes += [f"removed {dropouts} dropout layers"] if dropouts else []
        result.notes += [f"removed {pools} pools that give what they read"] if pools else []
        fused = fuse_epilogues(graph, self.name)  # before they become parts of packed networks
        self._pack(graph, context, result)
        fused["max pools"] += fuse_packed_pools(graph, self.name)
        result.proven = levels
        choice = self._lay_out(graph, context)
        fused += fuse_epilogues(graph, self.name)  # product-quantized layers know now whether they run by table
        _prepare(graph)
        result.notes += [f"{n} {what} became parts of the layers before them" for what, n in fused.items() if n]
        self._tell(choice, result)
        return result

    def _pack(self, graph: Graph, context: Context, result: PassResult) -> None:
        if self.binary == "off":
            return
        packing = pack_binary(graph, verify=context.verify, author=self.name)
        left = {node.name for node in graph.nodes}
        result.skips = [skip for skip in result.skips if skip.node in left]  # norms that were not folded are packed now
        packing.tell(result)
        rest = settle_latent(graph)
        if rest:
            result.notes.append(f"latent weights of {rest} other binary layers became their values")

    def _lay_out(self, graph: Graph, context: Context) -> Choice:
        batch = example_batch(graph, context.inputs)
        return choose_layout(graph, self.layout, batch, self.kernels, self.tables)

    def _tell(self, choice: Choice, result: PassResult) -> None:
        result.notes += [*notes_of(choice.kernels), f"engine torch, {choice.reason}"]
        result.metrics |= {"engine": "torch", "layout": choice.layout, "channels_last_ratio": choice.ratio}
        if choice.kernels:
            result.metrics["kernels"] = metrics_of(choice.kernels)


def _prepare(graph: Graph) -> None:
    """So that torch.export and torch.compile see the layers as they run."""
    for layer in graph.module.eval().modules():
        if isinstance(layer, Int8Layer | PQLayer):
            layer.prepare()


def remove_dropout(graph: Graph, author: str) -> int:
    """Take out what does nothing in evaluation mode; returns how many nodes went."""
    found = [node for node in graph.nodes if isinstance(graph.layer(node), DROPOUTS)]
    with graph.edit(author):
        for node in found:
            node.replace_all_uses_with(node.all_input_nodes[0])
    return len(found)
