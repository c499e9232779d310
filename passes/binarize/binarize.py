"""`binarize`: weights of one bit, activations of one to four."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import fx

from ...ir.errors import OptionError
from ...ir.graph import Graph, submodule
from ...runtime.layers import HalfWaveQuantizer
from ...runtime.layers.binary import Scale, Weights
from ...runtime.layers.half_wave_quantizer import Backward, ZeroBin
from ...runtime.training.statistics import reestimate_norms
from ..analyse.sharing import processes
from ..base import LOSSY, Context, Pass, PassResult, Semantics
from ..options import InvalidOptionError
from ..quantize.int8 import install_int8, observe_inputs
from .choosing import Ends, Job, choose
from .layers import binary_layer, drop_bias, scale_inputs
from .quantizing import Quantizing, Statistics
from .sources import Source, activation_name, is_ready, leaves, norm_of, trace_back
from .statistics import channel_statistics

IMAGES = 512
"""Calibration images that new batch norms take their first statistics from."""


class Binarize(Pass):
    """Give layers one-bit weights, and inputs that are quantised to few levels by a half-wave quantizer.

    A layer that reads an activation then stands in this order, which trains at once with `distill`:

        convolution → (max pool) → batch norm without affine parameters → Q → layer with W_q = α sign(W)

    ReLU and its relatives in front of such layers are replaced by Q; batch norms keep their factors only where a ReLU,
    a residual sum or a layer in full precision reads them. Where no batch norm was (behind sums, in networks without),
    one is made. The latent weights W are the trained ones, each input channel times the factor by which the quantizer's
    levels stand best for the activation before.

    The first and the last layers keep their precision, have weights and inputs of 8 bits (`int8`), or are `binary` like
    the others; a first one then reads its input unquantised. With `stage` this can be done in two steps, with training
    after each: activations first, then weights.

    Sources: Z. Cai, X. He, J. Sun, N. Vasconcelos, Deep Learning with Low Precision by Half-wave Gaussian Quantization,
    CVPR 2017; for the two stages, B. Zhuang et al., Towards Effective Low-bitwidth Convolutional Neural Networks, 2018.
    """

    name: ClassVar[str] = "binarize"
    semantics: ClassVar[Semantics] = LOSSY

    stage: Literal["both", "activations", "weights"] = "both"
    """What becomes coarse: everything at once, or one of the two, with training in between."""
    first: Ends = "float"
    """Layers that read the network's input: full precision, 8 bits, or one-bit weights on inputs as they are."""
    last: Ends = "float"
    """Layers behind which there is no other: full precision, 8 bits, or as all others."""
    ignore: tuple[str, ...] = ()
    """Patterns of layers that stay as they are."""
    bits: Annotated[int, Field(ge=1, le=4)] = 2
    """Of activations."""
    uniform: bool = True
    """Equal steps between levels, or the levels of least error."""
    zero_bin: ZeroBin = "strict"
    """What becomes zero: x ≤ 0 alone, or, with `round`, also what is nearer to it than to the first level."""
    backward: Backward = "clipped"
    """The slope that training sees: `vanilla` (ReLU), `clipped` at the largest level, or `log-tailed` above it."""
    weights: Weights = "binary"
    """Two values, or three."""
    scale: Scale = "filter"
    """One factor α per filter, one per layer, or none."""  # noqa: RUF001
    batches: Annotated[int, Field(ge=0)] = 20
    """Of `data.calibration` (or else `data.train`), from which all batch norms take statistics anew; 0: none."""

    @model_validator(mode="after")
    def _check_levels(self) -> Binarize:
        try:
            self.quantizer()
        except OptionError as error:
            raise InvalidOptionError(error.what, hint=error.hint) from None
        return self

    def quantizer(self) -> HalfWaveQuantizer:
        """A quantizer with these options."""
        return HalfWaveQuantizer(self.bits, self.uniform, self.zero_bin, self.backward)

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Rewrite what can be rewritten; the rest is skipped with its reason."""
        jobs, skips = choose(graph, self.first, self.last, self.ignore, self.title())
        result = PassResult(skips=skips)
        wanted = jobs if self.stage != "weights" else []
        sources = {job.path: trace_back(graph, job.node.all_input_nodes[0]) for job in wanted if job.inputs}
        open_ = {path: source for path, source in sources.items() if not is_ready(source)}
        statistics = self._statistics(graph, list(open_.values()), context)
        with graph.edit(self.name):
            if self.stage != "weights":
                self._quantise(graph, jobs, open_, statistics, result)
            if self.stage != "activations":
                self._binarize(graph, jobs, result)
        self._reestimate(graph, context, result)
        if self.stage != "activations":
            small = [job.node for job in jobs if job.kind == "int8"]
            result.notes += [note for note in (observe_inputs(graph, small, context, self.name),) if note]
        if not jobs:
            result.notes.append("no layer is left to binarize")
        return result

    # -- activations ----------------------------------------------------------------------------------------

    def _statistics(self, graph: Graph, sources: list[Source], context: Context) -> Statistics:
        """Of tensors that no batch norm normalises."""
        found = {leaf.node.name for source in sources for leaf in leaves(source) if norm_of(graph, leaf) is None}
        loader = context.data.calibration if context.data.calibration is not None else context.data.train
        if not found or loader is None or not self.batches:
            return {}
        console = context.console if processes().is_main_process else None
        return channel_statistics(graph, sorted(found), loader, IMAGES, console)

    def _quantise(
        self, graph: Graph, jobs: list[Job], sources: dict[str, Source], statistics: Statistics, result: PassResult
    ) -> None:
        builder = Quantizing(graph, self.quantizer, statistics, sources.values())
        replaced: dict[fx.Node, str] = {}
        for job in jobs:
            source = sources.get(job.path)
            if source is None:
                continue
            for node in (node for leaf in leaves(source) for node in leaf.activations):
                replaced[node] = str(activation_name(graph, node))
            made = builder.build(source, job.node)
            if made.slope is not None:
                layer: Any = graph.layer(job.node)
                scale_inputs(layer, made.slope)
            job.node.replace_input_with(job.node.all_input_nodes[0], made.node)
        result.notes += self._tell(
            builder, replaced, len({leaf.node for s in sources.values() for leaf in leaves(s) if not leaf.activations})
        )
        result.metrics |= {
            "quantizers": builder.count, "new_norms": builder.norms, "norms_without_affine": builder.plain,
            "replaced": dict(Counter(replaced.values())),
        }  # fmt: skip

    def _tell(self, builder: Quantizing, replaced: dict[fx.Node, str], bare: int) -> list[str]:
        kinds = ", ".join(f"{count} {name}" for name, count in Counter(replaced.values()).items())
        notes = [f"{builder.count} quantizers of {self.bits} bits" + (f" replace {kinds}" if kinds else "")]
        if bare:
            notes.append(f"{bare} inputs that no such activation gave lose what is below their mean")
        if builder.plain:
            notes.append(f"{builder.plain} batch norms without their factors and terms")
        if builder.norms:
            blind = f", {builder.blind} of them without statistics: train, or give calibration data"
            notes.append(f"{builder.norms} new batch norms{blind if builder.blind else ''}")
        return notes

    # -- weights --------------------------------------------------------------------------------------------

    def _binarize(self, graph: Graph, every: list[Job], result: PassResult) -> None:
        jobs = [job for job in every if job.kind == "binary"]
        install_int8(graph, {job.path: job.node for job in every if job.kind == "int8"})
        for job in jobs:
            layer: Any = graph.layer(job.node)
            graph.module.set_submodule(job.path, binary_layer(layer, self.weights, self.scale))
        if len(jobs) < len(every):
            result.notes.append(f"8 bits: {', '.join(job.path for job in every if job.kind == 'int8')}")
        dropped = sum(drop_bias(graph, job.node) for job in jobs)
        real = [job for job in jobs if job.inputs and not is_ready(trace_back(graph, job.node.all_input_nodes[0]))]
        layers: list[Any] = [submodule(graph.module, job.path) for job in jobs]
        binary = sum(layer.weight.numel() for layer in layers)
        total = sum(parameter.numel() for parameter in graph.module.parameters())
        kind = "one bit" if self.weights == "binary" else "three values"
        result.notes.append(f"weights of {len(jobs)} layers have {kind}: {binary:,} of {total:,} parameters")
        if dropped:
            result.notes.append(f"biases in front of batch norms removed: {dropped}")
        if real:
            result.notes.append(f"{len(real)} of these layers read values that are not quantised")
        result.metrics |= {"binary_layers": [job.path for job in jobs], "binary_parameters": binary}
        result.metrics["int8_layers"] = [job.path for job in every if job.kind == "int8"]

    # -- statistics -----------------------------------------------------------------------------------------

    def _reestimate(self, graph: Graph, context: Context, result: PassResult) -> None:
        loader = context.data.calibration if context.data.calibration is not None else context.data.train
        if loader is None or not self.batches:
            return
        used = reestimate_norms(graph.module, replace(context.data, train=loader), self.batches, seed=context.seed)
        if used:
            result.notes.append(f"statistics of batch norms from {used} batches")
