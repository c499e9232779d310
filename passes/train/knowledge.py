"""Places of knowledge: where, inside two networks, what the student computes can be held against the teacher's.

By default these are the stage ends: of each spatial resolution, the last activation. It is what a stage hands on when
its work is done, and it exists in both networks whatever their depth and width. Student and teacher are matched by
resolution; where they share none but have as many, in their order.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from ...ir.errors import OptionError
from ...ir.graph import Graph, TensorSpec
from ...ir.groups import find_groups
from ...ir.trace import trace
from ...runtime.training.features import Taps, find_node, module_path
from .module_paths import ancestors, output_paths

Resolution = tuple[int, ...]

_ACTIVATIONS = frozenset({
    "relu", "relu6", "leaky_relu", "prelu", "_prelu_kernel", "rrelu", "elu", "celu", "selu", "gelu", "silu", "mish",
    "hardswish", "hardtanh", "clamp", "clamp_min", "softplus", "softsign", "tanh", "threshold",
})  # fmt: skip
_HINT = "Name the places: module paths, names of nodes or glob patterns, as many in the teacher as in the student."


def find_places(
    graph: Graph,
    teacher: Graph | nn.Module,
    inputs: Any = None,
    *,
    places: Sequence[str] | None = None,
    teacher_places: Sequence[str] | None = None,
) -> Taps:
    """The places of knowledge of two networks.

    Args:
        graph: the student.
        teacher: a graph, the module of one, or any other network: that one is traced to look at it, and its places are
            the paths of modules whose output they are.
        inputs: the teacher's example inputs, as in `trace`; the student's if None.
        places: of the student, by name or glob pattern: paths of modules (`layer1.2`, `layer?`; a `*` does not reach
            over a dot), or else names of nodes (`relu_4`, `relu_*`). None finds them.
        teacher_places: of the teacher; the same as the student's if None.

    Returns:
        names that `tapped(graph.module, ...)` and `tapped(teacher, ...)` take.

    Raises:
        OptionError: a name or pattern that matches nothing, not as many places in both, no resolution in common, or a
            place that is computed between the modules of a teacher that is no graph.
        TraceError: the teacher cannot be traced.
    """
    module = teacher.module if isinstance(teacher, Graph) else teacher
    if places is not None:
        wanted = teacher_places if teacher_places is not None else places
        return Taps(named_places(graph.module, places), named_places(module, wanted))
    if teacher_places is not None:
        raise OptionError("places are named in the teacher and not in the student", hint=_HINT)
    other = _as_graph(teacher, graph, inputs)
    pairs = _matched(stage_ends(graph), stage_ends(other))
    theirs = [node for _, node in pairs]
    names = [node.name for node in theirs] if other.module is module else output_paths(module, other, theirs)
    return Taps([node.name for node, _ in pairs], names)


def stage_ends(graph: Graph) -> dict[Resolution, fx.Node]:
    """The last activation of each resolution, in execution order.

    A concatenation of activations counts as one. Left out are tensors of a single position, and those whose channels do
    not lie in dimension 1 (tokens).
    """
    groups = graph.analyse(find_groups)
    ends, active = dict[Resolution, fx.Node](), set[fx.Node]()
    for node in graph.nodes:
        size, kind = _resolution(node), _kind(graph, node)
        if size is None or not (kind in _ACTIVATIONS or (kind == "cat" and set(node.all_input_nodes) <= active)):
            continue
        active.add(node)
        axis = groups.channels(node)
        if axis is None or axis[0] == 1:
            ends.pop(size, None)  # the order is that of the last ones
            ends[size] = node
    return ends


def _matched(mine: dict[Resolution, fx.Node], theirs: dict[Resolution, fx.Node]) -> list[tuple[fx.Node, fx.Node]]:
    common = [size for size in mine if size in theirs]
    if common:
        return [(mine[size], theirs[size]) for size in common]
    if mine and len(mine) == len(theirs):
        return list(zip(mine.values(), theirs.values(), strict=True))
    sizes = [", ".join("x".join(map(str, size)) for size in ends) or "none" for ends in (mine, theirs)]
    raise OptionError(
        f"no places of knowledge match: resolutions with an activation are, in the student, {sizes[0]}; in the "
        f"teacher, {sizes[1]}",
        hint=_HINT,
    )


def _resolution(node: fx.Node) -> Resolution | None:
    """Space of `(N, channels, *space)`, None for other values and for a single position."""
    spec = node.meta.get("spec")
    if not isinstance(spec, TensorSpec) or len(spec.shape) < 3 or not spec.dtype.is_floating_point:
        return None
    return spec.shape[2:] if max(spec.shape[2:]) > 1 else None


def _kind(graph: Graph, node: fx.Node) -> str:
    """Name of the operation, `prelu` for the layer of that type, empty for other layers."""
    if node.op == "call_module":
        return "prelu" if isinstance(graph.layer(node), nn.PReLU) else ""
    return node.target._schema.name.rpartition("::")[2] if isinstance(node.target, torch._ops.OpOverload) else ""


def _as_graph(teacher: Graph | nn.Module, student: Graph, inputs: Any) -> Graph:
    """The teacher as a graph: itself, one around the module of a graph, or a new trace."""
    if isinstance(teacher, Graph):
        return teacher
    args, kwargs = (student.example_args, student.example_kwargs) if inputs is None else (inputs, None)
    if isinstance(teacher, fx.GraphModule) and all("spec" in n.meta for n in teacher.graph.nodes if n.op != "output"):
        return Graph(teacher, args, kwargs)
    return trace(teacher, args, example_kwargs=kwargs)


# Names ----------------------------------------------------------------------------------------------------------------


def named_places(module: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Places that the patterns match, in the order of the patterns and of execution, each once."""
    found: dict[str, None] = {}
    for pattern in patterns:
        names = _matches(module, pattern)
        if not names:
            raise OptionError(f"no module and no node of the network matches {pattern!r}", hint=_HINT)
        found.update(dict.fromkeys(names))
    return list(found)


def _matches(module: nn.Module, pattern: str) -> list[str]:
    if isinstance(module, fx.GraphModule):
        return _matching_nodes(module, pattern)
    return [path for path, _ in module.named_modules() if path and _fits(path, pattern)]


def _matching_nodes(module: fx.GraphModule, pattern: str) -> list[str]:
    nodes = [node for node in module.graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    paths = dict.fromkeys(path for node in nodes for path in ancestors(module_path(node)) if _fits(path, pattern))
    names = [find_node(module.graph, path).name for path in paths]
    return names or [node.name for node in nodes if fnmatch.fnmatchcase(node.name, pattern)]


def _fits(path: str, pattern: str) -> bool:
    """Whether a dotted path fits, part by part."""
    parts, wanted = path.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))
