"""The oracle: what proves the numbers of a graph.

The oracle of a cut: the network whose dead channels are masked to zero *where their consumers read them* must equal
the network without them. Neither side knows how the other works: the masked one runs the uncut graph, the cut one
runs on sliced layers.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .errors import VerifyError
from .nodes import arguments, call, operand

if TYPE_CHECKING:
    from .cut import Cut
    from .graph import Graph

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


# -- running ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every layer's own mode comes back afterwards."""
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for child, mode in modes:
            child.training = mode


def run(graph: Graph) -> Any:
    """Outputs on the example inputs, in evaluation mode."""
    with evaluating(graph.module):
        return graph.module(*graph.example_args, **graph.example_kwargs)


def distance(reference: Any, candidate: Any) -> float:
    """Largest relative distance max|a - b| / max|a| over the tensors of two outputs; infinite where not finite.

    Raises:
        VerifyError: the outputs differ in structure or shape.
    """
    ours, theirs = pytree.tree_leaves(reference), pytree.tree_leaves(candidate)
    if len(ours) != len(theirs):
        raise VerifyError(f"one network returns {len(ours)} tensors, the other {len(theirs)}")
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if isinstance(a, Tensor):
            worst = max(worst, _relative(a, b))
    return worst


def _relative(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        raise VerifyError(f"an output has shape {tuple(a.shape)} in one network and {tuple(b.shape)} in the other")
    if not a.numel():
        return 0.0
    a, b = a.detach().double(), b.detach().double()
    gap = float((a - b).abs().max())
    scale = float(a.abs().max())
    if gap != gap or scale != scale or gap == float("inf"):
        same = torch.equal(torch.isnan(a), torch.isnan(b)) and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
        return 0.0 if same else float("inf")
    return gap / scale if scale > 0 else gap


def tolerance(graph: Graph) -> float:
    """Relative tolerance for the precision of a graph's parameters."""
    dtypes = {p.dtype for p in graph.module.parameters()} or {torch.float32}
    return max(TOLERANCE.get(dtype, 1e-4) for dtype in dtypes)


# -- the oracle -------------------------------------------------------------------------------------------------


def prove_equal(before: Graph, after: Graph, limit: float | None = None) -> float:
    """Distance between the outputs of two graphs that must be equal.

    Raises:
        VerifyError: the distance is above the limit (by default that of the parameters' precision).
    """
    limit = tolerance(before) if limit is None else limit
    found = distance(run(before), run(after))
    if not found <= limit:
        raise VerifyError(
            f"the outputs differ by {found:.2e} (relative; {limit:.0e} allowed) although the pass must not change them"
        )
    return found


def prove_cut(cut: Cut, candidate: Graph, limit: float | None = None) -> float:
    """Distance between the masked network and the one that was cut.

    A distance above the limit in single precision or less is looked at again in double precision, where rounding
    cannot hide behind it.

    Raises:
        VerifyError: the two differ; names the first node where they do, the distance and the group.
    """
    graph = cut.groups.graph
    limit = tolerance(graph) if limit is None else limit
    found = cut_distance(cut, candidate)
    if found <= limit:
        return found
    exact = cut_distance(cut, candidate, torch.float64) if _convertible(graph) else found
    if exact <= TOLERANCE[torch.float64]:
        return found
    raise VerifyError(
        f"the cut network differs from the masked one by {found:.2e} (relative; {limit:.0e} allowed)"
        + _first_difference(cut, candidate, limit),
        hint="The graph is as it was before. Ignore this group, or report the model: this is a bug in a label rule",
    )


def cut_distance(cut: Cut, candidate: Graph, dtype: torch.dtype | None = None) -> float:
    """Relative distance between the masked and the cut network on the example inputs, in a given precision."""
    graph = cut.groups.graph
    if dtype is None:
        with evaluating(graph.module), evaluating(candidate.module):
            return distance(MaskedNetwork(cut).run_example(), _Network(candidate.module).run_inputs(graph))
    masked = MaskedNetwork(cut, _converted(graph.module, dtype))
    plain = _Network(_converted(candidate.module, dtype))
    with evaluating(masked.module), evaluating(plain.module):
        return distance(masked.run_inputs(graph, dtype), plain.run_inputs(graph, dtype))


def refit_distance(cut: Cut, candidate: Graph) -> float | None:
    """What refitted norms change: distance of the cut network from the masked one whose norms count dead channels as
    zeros; None where no norm lost a channel."""
    strict = MaskedNetwork(cut, refit=False)
    if not MaskedNetwork(cut)._refitted:
        return None
    with evaluating(strict.module), evaluating(candidate.module):
        return distance(strict.run_example(), _Network(candidate.module).run_inputs(cut.groups.graph))


def _convertible(graph: Graph) -> bool:
    """Whether a graph can run in double precision: it names no other floating-point type itself."""
    floats = {torch.float32, torch.float16, torch.bfloat16}
    return not any(
        argument in floats
        for node in graph.module.graph.nodes
        for argument in (*node.args, *node.kwargs.values())
        if isinstance(argument, torch.dtype)
    )


def _converted(module: fx.GraphModule, dtype: torch.dtype) -> fx.GraphModule:
    return copy.deepcopy(module).to(dtype)


class _Network(fx.Interpreter):
    """Runs a graph module node by node on example inputs, optionally in another precision."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=True)

    def run_inputs(self, graph: Graph, dtype: torch.dtype | None = None) -> Any:
        """Run on the example inputs of `graph`."""
        leaves = pytree.tree_leaves((graph.example_args, graph.example_kwargs))
        moved = [t.to(dtype) if dtype and isinstance(t, Tensor) and t.is_floating_point() else t for t in leaves]
        return self.run(*moved, enable_io_processing=False)


class MaskedNetwork(_Network):
    """The uncut network, whose dead channels read as zero wherever an operation mixes channels.

    With `refit`, norms whose channels are cut take their statistics over those that stay, as they will in the cut
    network; without, over all, dead ones counting as zeros.
    """

    def __init__(self, cut: Cut, module: fx.GraphModule | None = None, *, refit: bool = True) -> None:
        super().__init__(module or cut.groups.graph.module)
        self._graph = cut.groups.graph
        names = {node.name: node for node in self.graph.nodes}
        labels = cut.labels
        self._masks: dict[fx.Node, dict[fx.Node, Tensor]] = {}
        for node, sources in labels.readers.items():
            masks = {s: cut.mask(labels.values[s]) for s in sources if isinstance(labels.values.get(s), Tensor)}
            found = {names[s.name]: mask for s, mask in masks.items() if mask is not None}
            if found:
                self._masks[names[node.name]] = found
        self._refitted: dict[fx.Node, tuple[int, Tensor]] = {}
        for node, value in labels.refitted.items() if refit else ():
            mask = cut.mask(value)
            if mask is not None:
                dim = next(d for d, n in enumerate(mask.shape) if n > 1)
                self._refitted[names[node.name]] = (dim, mask.flatten().nonzero().flatten())

    def run_example(self) -> Any:
        """Run on the example inputs."""
        return self.run_inputs(self._graph)

    def run_node(self, n: fx.Node) -> Any:
        """Value of a node; a refitted norm runs on the channels that stay, the others are zero."""
        if n not in self._refitted:
            return super().run_node(n)
        dim, kept = self._refitted[n]
        x = self.env[operand(n)]
        if n.op == "call_function" and "norm" not in str(n.target):  # a mean or variance
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            return call(n, x.index_select(dim, kept), *args[1:], **kwargs)
        result = _norm_of_kept(self.module, n, x.index_select(dim, kept), kept, self.env)
        return torch.zeros_like(x, dtype=result.dtype).index_copy(dim, kept, result)

    def map_nodes_to_values(self, args: Any, n: fx.Node) -> Any:
        """Arguments of a node, with dead channels zero if the node mixes channels."""
        masks = self._masks.get(n, {})

        def load(source: fx.Node) -> Any:
            value = self.env[source]
            return torch.where(masks[source], value, 0) if source in masks else value

        return fx.map_arg(args, load)


def _norm_of_kept(module: nn.Module, node: fx.Node, x: Tensor, kept: Tensor, env: dict[Any, Any]) -> Tensor:
    """A layer, RMS or group norm on some of its channels."""
    if node.op == "call_module":
        layer: Any = module.get_submodule(str(node.target))
        weight, bias, eps, kind = layer.weight, getattr(layer, "bias", None), layer.eps, type(layer).__name__
    else:
        given = arguments(node)
        weight, bias, eps = env.get(given["weight"]), env.get(given.get("bias")), given["eps"]
        kind = {"aten.rms_norm": "RMSNorm", "aten.group_norm": "GroupNorm"}.get(str(node.target)[:-8], "LayerNorm")
    weight, bias = (None if t is None else t.index_select(0, kept) for t in (weight, bias))
    if kind == "RMSNorm":
        return F.rms_norm(x, (len(kept),), weight, eps)
    if kind == "GroupNorm":
        return F.group_norm(x, 1, weight, bias, eps)
    return F.layer_norm(x, (len(kept),), weight, bias, eps)


def _first_difference(cut: Cut, candidate: Graph, limit: float) -> str:
    """Where a masked and a cut network begin to differ: `; first at node ... of group ...`."""
    masked, plain = MaskedNetwork(cut), _Network(candidate.module)
    masked.garbage_collect_values = plain.garbage_collect_values = False
    with evaluating(masked.module), evaluating(plain.module):
        masked.run_example()
        plain.run_inputs(cut.groups.graph)
    theirs = {node.name: value for node, value in plain.env.items()}
    for node, value in masked.env.items():
        other = theirs.get(node.name)
        if not isinstance(value, Tensor) or not isinstance(other, Tensor):
            continue
        axis = cut.axis(node)
        if axis is not None:
            value = value.index_select(axis[0], torch.from_numpy(axis[1].nonzero()[0]))
        if value.shape != other.shape or _relative(value.float(), other.float()) > limit:
            names = ", ".join(group.name for group in cut.groups.of(node)[:3]) or "no group"
            where = f" ({node.meta['source']})" if node.meta.get("source") else ""
            return f"; first at node {node.name!r}{where}, which holds channels of {names}"
    return ""
