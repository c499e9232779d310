"""The module tree of a graph as JSON: layers with their configuration, modes, and the table of tensors.

    "modules": [{"path": "", "training": true}, {"path": "conv1", "training": true, "type": "Conv2d", "config": {..}},
                {"path": "head2", "same": "head1"}, ..]             parents before children, as in `named_modules`
    "tensors": {"conv1.weight": {"kind": "parameter", "requires_grad": true, "dtype": "F32", "shape": [..],
                                 "sha256": ".."}, "mask": {"kind": "buffer", "persistent": false, ..},
                "head2.weight": {"kind": "parameter", "same": "head1.weight"}, ..}

A module that no node calls is a container: it only holds others. Decoding builds everything on the `meta` device and
checks it; `Record.fill` puts the real tensors in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from ..ir import dialect
from ..ir.errors import GraphError
from .tensor_file import CODES, DTYPES, digest
from .value_json import JSON, FormatError, check_object, check_path, decode, encode

_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
_MAX_DIMS = 64


@dataclass
class Record:
    """One stored tensor: what its data must be, and the places where the loaded object belongs."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    sha256: str
    channels_last: bool = False
    requires_grad: bool | None = None  # None: not a parameter
    places: list[tuple[nn.Module, str]] = field(default_factory=list)

    def meta(self) -> Tensor:
        """A tensor of this shape and dtype that takes no memory."""
        return self._finish(torch.empty(self.shape, dtype=self.dtype, device="meta"))

    def fill(self, tensor: Tensor) -> Tensor:
        """Put the data in all places, tied ones get the same object; return that object."""
        if self.channels_last:
            tensor = tensor.contiguous(memory_format=_FORMATS[tensor.dim()])
        final = self._finish(tensor)
        for owner, leaf in self.places:
            (owner._parameters if leaf in owner._parameters else owner._buffers)[leaf] = final  # type: ignore[assignment]
        return final

    def _finish(self, tensor: Tensor) -> Tensor:
        return tensor if self.requires_grad is None else nn.Parameter(tensor, requires_grad=self.requires_grad)


# To JSON --------------------------------------------------------------------------------------------------------------


def encode_modules(module: fx.GraphModule) -> tuple[list[JSON], dict[str, JSON], dict[str, Tensor]]:
    """Modules and tensor table as JSON, and the tensors by name, tied ones once.

    Raises:
        GraphError: a called module is not a layer of the dialect.
        FormatError: a tensor that cannot be stored.
    """
    called = {module.get_submodule(str(node.target)) for node in module.graph.nodes if node.op == "call_module"}
    modules: list[JSON] = []
    table: dict[str, JSON] = {}
    tensors: dict[str, Tensor] = {}
    layers: dict[nn.Module, str] = {}
    within: set[str] = set()  # paths of layers and of what is inside them
    names: dict[int, str] = {}
    for path, child in module.named_modules(remove_duplicate=False):
        if path.rpartition(".")[0] in within:
            within.add(path)
            continue
        modules.append(_module_row(path, child, child in called, layers.get(child)))
        if child in called:
            within.add(path)
        if child in layers:
            continue
        if child in called:
            layers[child] = path
        for name, owner, leaf, tensor in _tensors(path, child, whole=child in called):
            table[name] = _tensor_row(name, owner, leaf, tensor, names.get(id(tensor)))
            tensors |= {} if id(tensor) in names else {name: tensor}
            names.setdefault(id(tensor), name)
    return modules, table, tensors


def _module_row(path: str, module: nn.Module, is_layer: bool, same: str | None) -> dict[str, JSON]:
    if same is not None:
        return {"path": path, "same": same}
    row: dict[str, JSON] = {"path": path, "training": module.training}
    if is_layer:
        row |= {"type": dialect.layer_name(module), "config": {k: encode(v) for k, v in dialect.config(module).items()}}
    return row


def _tensors(path: str, module: nn.Module, whole: bool) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Name, owner, leaf and value of the tensors of a layer (`whole`), or of those that a container itself holds."""
    for inner, owner in module.named_modules() if whole else [("", module)]:
        for leaf, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            if tensor is not None:
                yield ".".join(filter(None, (path, inner, leaf))), owner, leaf, tensor


def _tensor_row(name: str, owner: nn.Module, leaf: str, tensor: Tensor, same: str | None) -> dict[str, JSON]:
    row: dict[str, JSON] = {"kind": "buffer", "persistent": leaf not in owner._non_persistent_buffers_set}
    if leaf in owner._parameters:
        row = {"kind": "parameter", "requires_grad": tensor.requires_grad}
    return row | ({"same": same} if same else describe(name, tensor))


def describe(name: str, tensor: Tensor) -> dict[str, JSON]:
    """What the data of a tensor must be: dtype, shape, checksum, and whether the channels come last in memory."""
    if tensor.dtype not in CODES or tensor.is_meta or tensor.layout != torch.strided:
        kind = f"{tensor.dtype} ({tensor.layout}, {tensor.device})"
        raise FormatError(f"{name} is a tensor of {kind}, which cannot be stored")
    row: dict[str, JSON] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "sha256": digest(tensor)}
    memory_format = _FORMATS.get(tensor.dim())
    if memory_format and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=memory_format):
        row["channels_last"] = True
    return row


# From JSON ------------------------------------------------------------------------------------------------------------


def read_record(name: str, row: JSON, extra: dict[str, type] | None = None) -> Record:
    """One row of a tensor table; the inverse of `describe`."""
    fields = {"dtype": str, "shape": list, "sha256": str, **(extra or {})}
    check_object(row, f"tensor {name[:200]!r}", fields, {"channels_last": bool})
    dtype, shape = DTYPES.get(row["dtype"]), tuple(row["shape"])
    channels_last = bool(row.get("channels_last"))
    if dtype is None or len(shape) > _MAX_DIMS or not all(type(n) is int and n >= 0 for n in shape):
        raise FormatError(f"tensor {name[:200]!r} has no valid dtype and shape")
    if channels_last and len(shape) not in _FORMATS:
        raise FormatError(f"tensor {name[:200]!r} of {len(shape)} dimensions cannot have its channels last")
    requires_grad = row.get("requires_grad")
    if requires_grad and not (dtype.is_floating_point or dtype.is_complex):
        raise FormatError(f"tensor {name[:200]!r} of {dtype} cannot be trained")
    return Record(dtype, shape, row["sha256"], channels_last, requires_grad)


@dataclass
class Tree:
    """The module tree while it is rebuilt; `layers` is what a node may call, `tied` the second names among them."""

    root: fx.GraphModule
    containers: dict[str, nn.Module] = field(default_factory=dict)
    layers: dict[str, nn.Module] = field(default_factory=dict)
    tied: dict[str, nn.Module] = field(default_factory=dict)
    records: dict[str, Record] = field(default_factory=dict)

    def tensor_names(self) -> set[str]:
        """Names under which a node may read a parameter or buffer."""
        modules = {**self.containers, **self.layers, **self.tied}
        return {n for p, m in modules.items() for n, *_ in _tensors(p, m, whole=p not in self.containers)}


def decode_modules(rows: list[JSON], table: dict[str, JSON]) -> Tree:
    """The module tree on the `meta` device and what is to be read into it.

    Raises:
        FormatError: a layer that cannot be built, a path that is not allowed, a tensor that is missing, left over or of
            another shape than its layer needs.
    """
    tree = Tree(fx.GraphModule(nn.Module(), fx.Graph()))
    for row in rows:
        _decode_module(row, tree)
    missing = {name for path, layer in tree.layers.items() for name, *_ in _tensors(path, layer, whole=True)}
    for name, row in table.items():
        _decode_tensor(name, row, tree)
        missing.discard(name)
    if missing:
        raise FormatError(f"tensor {min(missing)!r} is missing")
    return tree


def _decode_module(row: JSON, tree: Tree) -> None:
    """Build one module and hang it into the tree."""
    options = {"training": bool, "type": str, "config": dict, "same": str}
    path = check_object(row, "a module", {"path": str}, options)["path"]
    fields, first = set(row) - {"path"}, not tree.containers
    if fields not in ({"same"}, {"training"}, {"training", "type", "config"}) or first != (path == ""):
        raise FormatError(f"module {path[:200]!r} is neither a container, nor a layer, nor tied to one")
    if first:
        tree.containers[""] = tree.root
        tree.root.training = bool(row.get("training"))
        return
    check_path(path)
    if "same" in row:
        module = tree.layers.get(row["same"])
        if module is None:
            raise FormatError(f"module {path!r} is tied to {row['same'][:200]!r}, which is no layer before it")
        tree.tied[path] = module
    else:
        module = _build(path, row) if "type" in row else nn.Module()
        for inner in module.modules():
            inner.training = row["training"]
        (tree.layers if "type" in row else tree.containers)[path] = module
    owner, _, atom = path.rpartition(".")
    _free(tree, owner, atom).add_module(atom, module)


def _free(tree: Tree, owner: str, atom: str) -> nn.Module:
    """The container under the path `owner`, which must not have an attribute `atom` yet, method or child."""
    if owner not in tree.containers:
        raise FormatError(f"{owner[:200]!r} is not a module that holds others")
    if hasattr(tree.containers[owner], atom):
        raise FormatError(f"{atom!r} cannot be a name in module {owner!r}: it is taken")
    return tree.containers[owner]


def _build(path: str, row: dict[str, JSON]) -> nn.Module:
    try:
        config = {name: decode(value, {}) for name, value in row["config"].items()}
        absent = config.get("absent", [])
        if not isinstance(absent, list) or not all(isinstance(name, str) for name in absent):
            raise FormatError("the list of absent tensors is none")
        return dialect.build(row["type"], config)
    except GraphError as error:
        raise FormatError(f"layer {path!r}: {error.what}") from error
    except Exception as error:  # a constructor may answer hostile arguments with anything
        raise FormatError(f"layer {path!r} cannot be built: {error}") from error


def _decode_tensor(name: str, row: JSON, tree: Tree) -> None:
    """Check one row of the tensor table and put a `meta` tensor in its place."""
    what = f"tensor {name[:200]!r}"
    kind = row.get("kind") if isinstance(row, dict) else None
    fields: dict[str, type] = {"kind": str} | ({"requires_grad": bool} if kind == "parameter" else {"persistent": bool})
    if kind not in ("parameter", "buffer"):
        raise FormatError(f"{what} is neither a parameter nor a buffer")
    if "same" in row:
        check_object(row, what, {"same": str, **fields})
    else:
        tree.records[name] = read_record(name, row, fields)
    record = tree.records.get(row.get("same", name))
    if record is None or (record.requires_grad is None) != (kind == "buffer"):
        raise FormatError(f"{what} is tied to no {kind} before it")
    owner, leaf = _place(name, tree, record, kind)
    record.places.append((owner, leaf))
    meta = record.meta()
    if isinstance(meta, nn.Parameter):
        owner.register_parameter(leaf, meta)
    else:
        owner.register_buffer(leaf, meta, persistent=row["persistent"])


def _place(name: str, tree: Tree, record: Record, kind: str) -> tuple[nn.Module, str]:
    """Owner and leaf of a tensor; in a layer it must be what the layer expects, a container must not have it yet."""
    path, _, leaf = name.rpartition(".")
    if path in tree.containers:
        check_path(name)
        return _free(tree, path, leaf), leaf
    layer = next((p for p in _prefixes(name) if p in tree.layers), None)
    if layer is None:
        raise FormatError(f"tensor {name[:200]!r} belongs to no module")
    for found, owner, leaf, expected in _tensors(layer, tree.layers[layer], whole=True):
        if found == name:
            if tuple(expected.shape) != record.shape or (leaf in owner._parameters) != (kind == "parameter"):
                raise FormatError(f"{kind} {name!r} of {record.shape} does not fit its layer, {tuple(expected.shape)}")
            return owner, leaf
    raise FormatError(f"layer {layer!r} has no tensor {leaf[:200]!r}")


def _prefixes(name: str) -> Iterator[str]:
    parts = name.split(".")[:64]
    return (".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1))
