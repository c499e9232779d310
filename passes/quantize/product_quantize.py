"""`product-quantize`: weights become codebooks and indices."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator
from torch import nn

from ...ir.graph import Graph
from ..analyse.sharing import processes
from ..base import LOSSY, Context, Pass, PassResult, Semantics
from ..options import InvalidOptionError
from ..runner import check_finite
from .learning import Learner, install
from .outcome import describe, numbers
from .plan import candidates, make_jobs
from .progress import layer_bar
from .recipe import Recipe
from .settings import LayerSetting, LinearSetting, Precision, Setting, Width, Words, with_exceptions


class ProductQuantize(Pass):
    """Give convolutions and linear layers weights that are made of few codewords, named by small indices.

    The inputs of a layer are split into M sub-spaces of d; in each, the vectors of all outputs (of a convolution: of
    all outputs, taps and groups) share K codewords. A weight of Ct outputs and T taps takes 4 K M d bytes of codewords
    (2 or 1 with smaller ones) and T M Ct log2(K) / 8 of indices.

    *k-means* on the weights is where both begin (`correction: none` leaves it at that). *Error correction* then lowers
    the error of the layer's response instead of that of its weights, by block coordinate descent over sub-spaces in
    closed form, on Gram matrices of calibration images: G = XᵀX and, where inputs are not the original ones, XᵀY.
    With `correction: accumulated` a layer reads what the quantised layers before it give and learns to give what the
    original network did, so that it makes up for their errors.

    Sources: J. Wu et al., Quantized Convolutional Neural Networks for Mobile Devices, CVPR 2016; H. Jegou et al.,
    Product Quantization for Nearest Neighbor Search, 2011. The defaults are those of the former's AlexNet.
    """

    name: ClassVar[str] = "product-quantize"
    semantics: ClassVar[Semantics] = LOSSY

    subspace: Width = 8
    """Inputs of a convolution per sub-space, d."""
    codewords: Words = 128
    """Codewords per sub-space of a convolution, K: a power of two up to 256."""
    linear: LinearSetting = LinearSetting()
    """The same two of a linear layer."""
    last: LinearSetting | None = LinearSetting(subspace=1, codewords=16)
    """The same of the last linear layer, the classifier; null: as the others."""
    layers: dict[str, LayerSetting] = Field(default_factory=dict)
    """Exceptions by patterns of layer paths, in order: `{"layer3.*": {codewords: 64}, conv1: {skip: true}}`."""
    ignore: tuple[str, ...] = ()
    """Patterns of layers that stay as they are."""
    codebook: Precision = "fp32"
    """What a file keeps of the codewords; `int8` has a scale per sub-space."""
    entropy: bool = False
    """Files hold the indices entropy coded, where that is smaller."""
    rate_weight: Annotated[float, Field(ge=0, le=4)] = 0.0
    """With `entropy`: price μ of a bit in what is minimised, E + μ · bits of all indices. 1 is the slope of error over
    bits at high rates, 2 ln(2) / d times the mean squared error of k-means; above it the error rises fast."""
    correction: Literal["none", "layer", "accumulated"] = "accumulated"
    """Error correction: not at all, on inputs from the original network, or on those from the quantised layers."""
    sweeps: Annotated[int, Field(ge=1)] = 3
    """Times that error correction goes through all sub-spaces of a layer."""
    ridge: Annotated[float, Field(gt=0)] | None = None
    """Pull towards the original weights, as a share of the inputs' mean variance; null finds it from their number."""
    bias: Literal["refit", "keep"] = "refit"
    """`refit` lets biases make good what they can of the error (an addition to the paper); `keep` leaves them."""
    images: Annotated[int, Field(ge=1)] = 512
    """Calibration images, at most."""
    positions: Annotated[int, Field(ge=1)] = 64
    """Output positions of a convolution per image that error correction looks at; the same ones of every image."""
    iterations: Annotated[int, Field(ge=1)] = 40
    """Iterations of k-means, at most."""

    @model_validator(mode="after")
    def _check_rate(self) -> ProductQuantize:
        if self.rate_weight and not self.entropy:
            raise InvalidOptionError(
                f"option 'rate_weight' is {self.rate_weight:g}, which makes indices shorter with 'entropy: true' alone"
            )
        return self

    def needed(self) -> tuple[str, ...]:
        """Calibration data, unless the weights are all that is looked at."""
        return () if self.correction == "none" else ("calibration",)

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Quantise what can be quantised; the rest is skipped with its reason."""
        settings = with_exceptions(self._defaults(graph), self.layers, self.ignore, self.title())
        check_finite(graph.module)
        jobs, skips = make_jobs(graph, settings)
        loader = context.data.need("calibration", who=self.title()) if self.needed() else None
        after = graph.copy()
        console = context.console if processes().is_main_process else None
        recipe = self._recipe(context.seed)
        with layer_bar(console, self.name, len(jobs)) as bar:
            learner = Learner(graph, after, jobs, recipe, bar)
            learner.run(loader)
        install(after, learner.made, self.name)
        graph.adopt(after)
        notes = describe(learner.outcomes, jobs, recipe, learner.images)
        return PassResult(notes, skips, metrics=numbers(learner.outcomes))

    def _defaults(self, graph: Graph) -> dict[str, Setting]:
        """The setting of each layer before exceptions, by its path."""
        nodes = candidates(graph)
        linear = [path for path, node in nodes.items() if isinstance(graph.layer(node), nn.Linear)]
        result = {path: Setting(self.subspace, self.codewords, self.codebook) for path in nodes}
        for path in linear:
            chosen = self.last if self.last is not None and path == linear[-1] else self.linear
            result[path] = Setting(chosen.subspace, chosen.codewords, self.codebook)
        return result

    def _recipe(self, seed: int) -> Recipe:
        return Recipe(
            self.correction,
            self.sweeps,
            self.ridge,
            self.images,
            self.positions,
            self.bias == "refit",
            self.entropy,
            self.rate_weight,
            self.iterations,
            seed,
        )
