"""A model and its example inputs become a `Graph`.

`torch.export` (non-strict, evaluation mode, dynamic batch) gives ATen nodes; `importing` copies them, `functional`
removes in-place operations, `cleaning` what computes nothing, and `raising` puts layers under the model's own names.

Stochastic depth, auxiliary heads and whatever else is inactive in evaluation mode is not part of the graph; dropout and
batch norm are, and `.train()` activates them.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from . import dialect, raising
from .errors import TraceError
from .graph import Graph
from .tracing import cleaning, composing, explaining, exporting, functional, importing, layer_rules, specs
from .tracing.module_tree import Store, build_tree, check_finite

Inputs = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]


def trace(
    model: nn.Module | ExportedProgram | Graph,
    example_inputs: Inputs | None = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
) -> Graph:
    """Turn a model into a graph; the model itself is left as it was, its tensors are copied.

    Args:
        model: a module in any mode, an `fx.GraphModule`, an `ExportedProgram`, or a `Graph` (which is copied).
        example_inputs: a tensor, a tuple or list of positional inputs, or a dict of keyword inputs. A batch of one is
            repeated to two, since an exporter takes a size of one for a constant; `Graph.example_args` holds the
            inputs that were used.
        example_kwargs: keyword inputs beside positional ones.

    Returns:
        the graph, its layers in the training mode of the model's modules. `Graph.dynamic_batch` tells whether the
        batch size may change; `Graph.dropped` the state-dict keys that are not read in evaluation mode.

    Raises:
        TraceError: the model cannot be exported on these inputs; names the line of its code and what to do.
        ModelError: a parameter or buffer is NaN or infinite.
    """
    if isinstance(model, Graph):
        return model.copy()
    if isinstance(model, ExportedProgram):
        return _from_program(model, example_inputs, example_kwargs)
    if not isinstance(model, nn.Module):
        raise TraceError(
            f"cannot trace a {type(model).__name__}",
            hint="Give an nn.Module, a torch.fx.GraphModule, an ExportedProgram or a Graph.",
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise TraceError("cannot trace a TorchScript module", hint="Give the model that it was scripted from.")
    model = getattr(model, "_orig_mod", model)  # what torch.compile has wrapped
    args, kwargs = _arguments(example_inputs, example_kwargs)
    check_finite([*model.named_parameters(), *model.named_buffers()])
    modules = dict(model.named_modules(remove_duplicate=False))
    exported = exporting.export(model, args, kwargs)
    with torch.inference_mode(False):
        module, dropped = _build(exported.program, modules.get, _argument_names(model, len(args)))
        specs.complete(module.eval(), exported.args, exported.kwargs)
    _set_modes(module, {path: child.training for path, child in modules.items()})
    return Graph(module, exported.args, exported.kwargs, dynamic_batch=exported.dynamic_batch, dropped=dropped)


def _from_program(
    program: ExportedProgram, example_inputs: Inputs | None, example_kwargs: Mapping[str, Any] | None
) -> Graph:
    if example_inputs is None and example_kwargs is None and program.example_inputs is not None:
        args, kwargs = program.example_inputs
    else:
        args, kwargs = _arguments(example_inputs, example_kwargs)
    check_finite(program.state_dict.items())
    module, dropped = _build(program, _no_origin, [f"arg_{i}" for i in range(len(args))])
    specs.complete(module.eval(), args, kwargs)
    return Graph(module, tuple(args), dict(kwargs), dynamic_batch=exporting.is_dynamic(program), dropped=dropped)


def _no_origin(path: str) -> nn.Module | None:  # noqa: ARG001 - a program has forgotten the modules it was made of
    return None


# Inputs and model -----------------------------------------------------------------------------------------------------


def _arguments(inputs: Inputs | None, kwargs: Mapping[str, Any] | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword inputs; every leaf is a tensor, or a plain constant beside at least one tensor."""
    extra = dict(kwargs or {})
    if isinstance(inputs, Tensor):
        args: tuple[Any, ...] = (inputs,)
    elif isinstance(inputs, Mapping):
        args, extra = (), {**inputs, **extra}
    elif isinstance(inputs, (tuple, list)):
        args = tuple(inputs)
    elif inputs is None:
        args = ()
    else:
        raise _bad_input("example_inputs", inputs)
    leaves = pytree.tree_leaves_with_path((args, extra))
    for path, leaf in leaves:
        if not isinstance(leaf, (Tensor, int, float, bool, str, type(None))):
            raise _bad_input(f"example input {pytree.keystr(path)}", leaf)
    tensors = [leaf for _, leaf in leaves if isinstance(leaf, Tensor)]
    if not tensors:
        raise TraceError("the example inputs hold no tensor", hint="Give a tensor, a tuple of tensors, or a dict.")
    if any(tensor.numel() == 0 for tensor in tensors):
        raise TraceError("an example input has no elements", hint="Give a batch of at least one.")
    return args, extra


def _bad_input(name: str, value: object) -> TraceError:
    return TraceError(
        f"{name} is a {type(value).__module__}.{type(value).__name__}, not a tensor",
        hint="Give a tensor, a tuple of positional inputs, or a dict of keyword inputs.",
    )


def _argument_names(model: nn.Module, count: int) -> list[str]:
    """Names of the first `count` positional inputs in the model's own signature."""
    names: list[str] = []
    for parameter in inspect.signature(model.forward).parameters.values():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}_{i}" for i in range(count - len(names))]
        names.append(parameter.name)
    return names[:count]


def _set_modes(module: nn.Module, modes: dict[str, bool]) -> None:
    """Every module takes the mode of the model's module of its path, or of the closest one above it."""
    for path, child in module.named_modules(remove_duplicate=False):
        at = path
        while at and at not in modes:
            at = at.rpartition(".")[0]
        child.training = modes.get(at, False)


# Building -------------------------------------------------------------------------------------------------------------


def _build(
    program: ExportedProgram, origin: raising.Origin, names: list[str]
) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """The graph module of a program, and the state-dict keys that it does not read.

    Args:
        program: what was exported.
        origin: the user's module under a path.
        names: names of the positional inputs.
    """
    constants = {name: value for name, value in program.constants.items() if isinstance(value, Tensor)}
    store = Store(program.state_dict, constants)
    graph = importing.import_program(program)
    functional.make_functional(graph)
    cleaning.clean(graph)
    composing.compose(graph)
    layers = raising.raise_layers(graph, store, origin)
    cleaning.erase_dead(graph)
    _check_ops(graph)
    specs.describe(graph)
    spec = program.call_spec
    assert spec.in_spec is not None
    graph._codegen = _PyTreeCodeGen(_PyTreeInfo([*names, *spec.in_spec.child(1).context], spec.in_spec, spec.out_spec))
    module = build_tree(graph, store, layers)
    own = module.state_dict().keys()
    return module, tuple(key for key in program.state_dict if key not in own)


def _check_ops(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if not dialect.allowed(node.target):
            raise explaining.op_refusal(node)
        if moved := layer_rules.moved_statistics(node):
            raise explaining.own_tensor_refusal(moved, node)
