"""The module tree of a graph as JSON: layers with their configuration, containers, modes and ties.

    "modules": [{"path": "", "training": true}, {"path": "conv1", "training": true, "type": "Conv2d", "config": {..}},
                {"path": "head2", "same": "head1"}, ..]             parents before children, as in `named_modules`
                {"path": "fc", .., "type": "PQLinear", "config": {..}, "packed": {..}}               as in `codecs.py`
    "tensors": {"conv1.weight": {..}, ..}                           rows as in `tensors.py`

A module that no node calls is a container: it only holds others. Decoding builds everything on the `meta` device and
checks it; `Record.fill` puts the real tensors in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, fx, nn

from ...ir import dialect
from ...ir.errors import GraphError
from .checks import JSON, FormatError, check_object, check_path
from .codecs import Place, codec_of, pack_layer
from .tensors import Record, named_tensors, read_record, tensor_row
from .values import decode, encode

# To JSON --------------------------------------------------------------------------------------------------------------


@dataclass
class Encoded:
    """The module tree as JSON: rows of modules and tensors, the tensors by name, and the bytes of packed layers."""

    modules: list[JSON] = field(default_factory=list)
    table: dict[str, JSON] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    packed: list[bytes] = field(default_factory=list)


def encode_modules(module: fx.GraphModule, *, exact: bool = False) -> Encoded:
    """Modules and tensor table as JSON, and the tensors by name, tied ones once.

    Args:
        module: the graph module.
        exact: whether all layers are stored by their state dicts, bit by bit.

    Raises:
        GraphError: a called module is not a layer of the dialect.
        FormatError: a tensor that cannot be stored.
    """
    called = {module.get_submodule(str(node.target)) for node in module.graph.nodes if node.op == "call_module"}
    found = Encoded()
    tied = _tied(module)
    layers: dict[nn.Module, str] = {}
    within: set[str] = set()  # paths of layers and of what is inside them
    names: dict[int, str] = {}
    for path, child in module.named_modules(remove_duplicate=False):
        if path.rpartition(".")[0] in within:
            within.add(path)
            continue
        row = _module_row(path, child, child in called, layers.get(child))
        found.modules.append(row)
        if child in called:
            within.add(path)
        if child in layers:
            continue
        codec = codec_of(child) if child in called and not exact else None
        if child in called:
            layers[child] = path
        if codec is not None and not any(id(t) in tied for *_, t in named_tensors(path, child, whole=True)):
            data, row["packed"] = pack_layer(path, child, codec)
            found.packed.append(data)
            continue
        for name, owner, leaf, tensor in named_tensors(path, child, whole=child in called):
            found.table[name] = tensor_row(name, owner, leaf, tensor, names.get(id(tensor)))
            found.tensors |= {} if id(tensor) in names else {name: tensor}
            names.setdefault(id(tensor), name)
    return found


def _tied(module: nn.Module) -> set[int]:
    """Tensors that several modules hold."""
    counts: dict[int, int] = {}
    for child in module.modules():
        for tensor in (*child._parameters.values(), *child._buffers.values()):
            counts[id(tensor)] = counts.get(id(tensor), 0) + 1
    return {key for key, count in counts.items() if count > 1 and key != id(None)}


def _module_row(path: str, module: nn.Module, is_layer: bool, same: str | None) -> dict[str, JSON]:
    if same is not None:
        return {"path": path, "same": same}
    row: dict[str, JSON] = {"path": path, "training": module.training}
    if is_layer:
        row |= {"type": dialect.layer_name(module), "config": {k: encode(v) for k, v in dialect.config(module).items()}}
    return row


# From JSON ------------------------------------------------------------------------------------------------------------


@dataclass
class Tree:
    """The module tree while it is rebuilt; `layers` is what a node may call, `tied` the second names among them."""

    root: fx.GraphModule
    containers: dict[str, nn.Module] = field(default_factory=dict)
    layers: dict[str, nn.Module] = field(default_factory=dict)
    tied: dict[str, nn.Module] = field(default_factory=dict)
    records: dict[str, Record] = field(default_factory=dict)
    packed: list[Place] = field(default_factory=list)

    def tensor_names(self) -> set[str]:
        """Names under which a node may read a parameter or buffer."""
        modules = {**self.containers, **self.layers, **self.tied}
        return {n for p, m in modules.items() for n, *_ in named_tensors(p, m, whole=p not in self.containers)}


def decode_modules(rows: list[JSON], table: dict[str, JSON]) -> Tree:
    """The module tree on the `meta` device and what is to be read into it.

    Raises:
        FormatError: a layer that cannot be built, a path that is not allowed, a tensor that is missing, left over or of
            another shape than its layer needs.
    """
    tree = Tree(fx.GraphModule(nn.Module(), fx.Graph()))
    for row in rows:
        _decode_module(row, tree)
    packed = {place.path for place in tree.packed}
    layers = ((path, layer) for path, layer in tree.layers.items() if path not in packed)
    missing = {name for path, layer in layers for name, *_ in named_tensors(path, layer, whole=True)}
    for name, row in table.items():
        _decode_tensor(name, row, tree)
        missing.discard(name)
    if missing:
        raise FormatError(f"tensor {min(missing)!r} is missing")
    return tree


def _decode_module(row: JSON, tree: Tree) -> None:
    """Build one module and hang it into the tree."""
    options = {"training": bool, "type": str, "config": dict, "same": str, "packed": dict}
    path = check_object(row, "a module", {"path": str}, options)["path"]
    fields, first = set(row) - {"path"}, not tree.containers
    layer = {"training", "type", "config"}
    allowed = [{"training"}] if first else [{"same"}, {"training"}, layer, {*layer, "packed"}]
    if fields not in allowed or first != (path == ""):
        raise FormatError(f"module {path[:200]!r} is neither a container, nor a layer, nor tied to one")
    if first:
        tree.containers[""] = tree.root
        tree.root.training = row["training"]
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
        if "packed" in row:
            tree.packed.append(Place.read(path, module, row["packed"]))
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
    if layer is None or any(place.path == layer for place in tree.packed):
        raise FormatError(f"tensor {name[:200]!r} belongs to no module, or to one that is packed")
    for found, owner, leaf, expected in named_tensors(layer, tree.layers[layer], whole=True):
        if found == name:
            if tuple(expected.shape) != record.shape or (leaf in owner._parameters) != (kind == "parameter"):
                raise FormatError(f"{kind} {name!r} of {record.shape} does not fit its layer, {tuple(expected.shape)}")
            return owner, leaf
    raise FormatError(f"layer {layer!r} has no tensor {leaf[:200]!r}")


def _prefixes(name: str) -> Iterator[str]:
    parts = name.split(".")[:64]
    return (".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1))
