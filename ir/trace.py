"""A model and its example inputs become a `Graph`.

`torch.export` (non-strict, evaluation mode, dynamic batch) gives ATen nodes; `importing` copies them, `functional`
removes in-place operations, `cleaning` what computes nothing, and `raising` puts layers under the model's own names.

Stochastic depth, auxiliary heads and whatever else is inactive in evaluation mode is not part of the graph; dropout and
batch norm are, and `.train()` activates them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from . import cleaning, exporting, functional, importing, raising
from .errors import ModelError, TraceError
from .graph import Graph, TensorSpec

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
    args, kwargs = _arguments(example_inputs, example_kwargs)
    _check_tensors(model)
    exported = exporting.export(model, args, kwargs)
    module, dropped = _build(exported.program, _origin(model), _argument_names(model, args, kwargs))
    _set_modes(module, {path: child.training for path, child in model.named_modules(remove_duplicate=False)})
    return Graph(module, exported.args, exported.kwargs, dynamic_batch=exported.dynamic_batch, dropped=dropped)


def _from_program(
    program: ExportedProgram, example_inputs: Inputs | None, example_kwargs: Mapping[str, Any] | None
) -> Graph:
    if example_inputs is None and example_kwargs is None and program.example_inputs is not None:
        args, kwargs = program.example_inputs
    else:
        args, kwargs = _arguments(example_inputs, example_kwargs)
    names = [f"arg_{i}" for i in range(len(args))]
    module, dropped = _build(program, lambda path: None, [*names, *kwargs])
    _set_modes(module, {})
    return Graph(module, tuple(args), dict(kwargs), dynamic_batch=exporting.is_dynamic(program), dropped=dropped)


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
    if not any(isinstance(leaf, Tensor) for _, leaf in leaves):
        raise TraceError("the example inputs hold no tensor", hint="Give a tensor, a tuple of tensors, or a dict.")
    return args, extra


def _bad_input(name: str, value: object) -> TraceError:
    return TraceError(
        f"{name} is a {type(value).__module__}.{type(value).__name__}, not a tensor",
        hint="Give a tensor, a tuple of positional inputs, or a dict of keyword inputs.",
    )


def _check_tensors(model: nn.Module) -> None:
    """All parameters and buffers exist and are finite."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if isinstance(tensor, nn.parameter.UninitializedTensorMixin) or tensor.is_meta:
            raise ModelError(f"{name!r} has no values yet", hint="Initialise the model (run it once) before tracing.")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.detach().sum())):
            _check_elements(name, tensor.detach())


def _check_elements(name: str, tensor: Tensor) -> None:
    """The sum of a tensor may overflow although its elements are finite: count them."""
    bad = int((~torch.isfinite(tensor)).sum())
    if bad and name.rpartition(".")[2] != "running_var_mask":
        kind = "NaN" if bool(torch.isnan(tensor).any()) else "infinite"
        raise ModelError(
            f"{name!r} of shape {tuple(tensor.shape)} holds {bad} {kind} value{'s' if bad > 1 else ''}",
            hint="Load finite weights; training may have diverged.",
        )


def _origin(model: nn.Module) -> Callable[[str], nn.Module | None]:
    modules = dict(model.named_modules(remove_duplicate=False))
    return modules.get


def _argument_names(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """Names of the inputs in the model's own signature, positional ones first."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    names: list[str] = []
    for index in range(len(args)):
        parameter = parameters[min(index, len(parameters) - 1)]
        variadic = parameter.kind is inspect.Parameter.VAR_POSITIONAL
        names.append(f"{parameter.name}_{index}" if variadic else parameter.name)
    return [*names, *kwargs]


def _set_modes(module: nn.Module, modes: dict[str, bool]) -> None:
    """Every module takes the mode of the model's module of its path, or of the closest one above it."""
    for path, child in module.named_modules(remove_duplicate=False):
        at = path
        while at and at not in modes:
            at = at.rpartition(".")[0]
        child.training = modes.get(at, False)


# Building -------------------------------------------------------------------------------------------------------------


def _build(
    program: ExportedProgram, origin: Callable[[str], nn.Module | None], names: list[str]
) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """The graph module of a program, and the state-dict keys that it does not read."""
    store = raising.Store({**program.state_dict, **_constants(program)}, frozenset(program.state_dict))
    graph = importing.import_program(program)
    functional.make_functional(graph)
    cleaning.clean(graph)
    layers = raising.raise_layers(graph, store, origin)
    cleaning.clean(graph)
    spec = program.call_spec
    graph._codegen = _PyTreeCodeGen(_PyTreeInfo(names, spec.in_spec, spec.out_spec))
    _describe(graph)
    tree = raising.build_tree(graph, store, layers)
    module = fx.GraphModule(nn.Module(), fx.Graph())
    for name, child in tree.named_children():
        module.add_module(name, child)
    for name, parameter in tree._parameters.items():
        module.register_parameter(name, parameter)
    for name, buffer in tree._buffers.items():
        module.register_buffer(name, buffer, persistent=name not in tree._non_persistent_buffers_set)
    module.graph = graph
    module.recompile()
    own = module.state_dict().keys()
    return module, tuple(key for key in program.state_dict if key not in own)


def _constants(program: ExportedProgram) -> dict[str, Tensor]:
    return {name: value for name, value in program.constants.items() if isinstance(value, Tensor)}


def _describe(graph: fx.Graph) -> None:
    """Keep of the metadata what the dialect knows: `spec`, `path`, `source`."""
    for node in graph.nodes:
        meta = {"spec": _spec(node.meta.get("val"))} if node.op != "output" else {}
        meta.update({k: node.meta[k] for k in ("path", "source") if node.meta.get(k)})
        node.meta = meta


def _spec(value: Any) -> Any:
    if isinstance(value, Tensor):
        return TensorSpec(tuple(_number(s) for s in value.shape), value.dtype)
    if isinstance(value, (tuple, list)):
        return tuple(_spec(v) for v in value)
    return _number(value)


def _number(value: Any) -> Any:
    """A size on the example inputs."""
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        hint = value.node.hint
        return int(hint) if isinstance(value, torch.SymInt) else hint
    return value
