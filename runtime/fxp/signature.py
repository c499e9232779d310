"""How a graph takes its inputs and gives its outputs, as JSON.

    null                                                       one argument per placeholder, the output as it is
    {"names": ["x"], "inputs": structure, "outputs": structure}     structures with 0 for each tensor

A structure is made of tuples, lists, dicts and ordered dicts; the inputs are ((positional, ..), {keyword: .., ..}).
"""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.fx.graph import CodeGen, _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from .checks import JSON, FormatError, check_keyword, check_name, check_object
from .values import decode, encode


def encode_signature(codegen: CodeGen) -> JSON:
    """The calling convention of a graph as JSON.

    Raises:
        FormatError: it is neither plain nor the one of `torch.export`, or a class of the model's own is in it.
    """
    if type(codegen) is CodeGen:
        return None
    if type(codegen) is not _PyTreeCodeGen:
        raise FormatError(f"the graph has a {type(codegen).__name__}, whose calling convention cannot be stored")
    info = codegen.pytree_info
    outputs = None if info.out_spec is None else _encode_structure("outputs", info.out_spec)
    return {"names": list(info.orig_args), "inputs": _encode_structure("inputs", info.in_spec), "outputs": outputs}


def _encode_structure(what: str, spec: pytree.TreeSpec) -> JSON:
    structure = pytree.tree_unflatten([0] * spec.num_leaves, spec)
    try:
        return encode(structure)
    except FormatError as error:
        raise FormatError(f"the {what} of the model are not made of tuples, lists and dicts: {error}") from None


def decode_signature(signature: JSON, nodes: list[fx.Node]) -> CodeGen:
    """What generates the head and the return of `forward`; its names and numbers must fit the nodes.

    Raises:
        FormatError: they do not.
    """
    if signature is None:
        return CodeGen()
    check_object(signature, "the signature", {"names": list, "inputs": dict, "outputs": object})
    names = [check_name(name, "input") for name in signature["names"]]
    inputs = decode(signature["inputs"], {})
    if not (type(inputs) is tuple and [type(part) for part in inputs] == [tuple, dict]):
        raise FormatError("the inputs are not a tuple and a dict")
    for key in inputs[1]:
        check_keyword(key, "keyword input")
    in_spec = _structure(inputs, sum(node.op == "placeholder" for node in nodes))
    if len(set(names)) != len(names) or len(names) != len(inputs[0]) + len(inputs[1]):
        raise FormatError("the names of the inputs do not fit their number")
    out_spec, returned = None, nodes[-1].args[0]
    if signature["outputs"] is not None:
        count = len(returned) if isinstance(returned, (list, tuple)) else -1
        out_spec = _structure(decode(signature["outputs"], {}), count)
    return _PyTreeCodeGen(_PyTreeInfo(names, in_spec, out_spec))


def _structure(value: Any, leaves: int) -> pytree.TreeSpec:
    found, spec = pytree.tree_flatten(value)
    if len(found) != leaves or any(leaf != 0 for leaf in found):
        raise FormatError(f"the signature has {len(found)} values where the graph has {leaves}")
    return spec
