"""Contractions: matmul, einsum and attention unite the labels of the dimensions that they sum over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any

from torch import Tensor, fx

from ..labels import Labels, Term, along, channel_vector, collapse, varies, varying, zeros
from ..nodes import arguments, shape_of
from .pointwise import adopt, align
from .producers import Weight, data_input, dynamic


def matmul(labels: Labels, node: fx.Node) -> Any:
    """matmul, bmm and mm as an einsum over named dimensions."""
    a, b = list(arguments(node).values())[:2]
    ranks = len(shape_of(a)), len(shape_of(b))
    batch = "abcdefgh"[: max(ranks) - 2] if max(ranks) > 2 else ""
    left = (batch[len(batch) - max(0, ranks[0] - 2) :] + "xk")[-ranks[0] :] if ranks[0] > 1 else "k"
    right = batch[len(batch) - max(0, ranks[1] - 2) :] + "ky" if ranks[1] > 1 else "k"
    result = batch + ("x" if ranks[0] > 1 else "") + ("y" if ranks[1] > 1 else "")
    return contract(labels, node, (a, left), (b, right), result)


def einsum(labels: Labels, node: fx.Node) -> Any:
    """einsum of one or two operands, no repeated letter within an operand."""
    equation = str(node.args[0]).replace(" ", "")
    operands: Any = node.args[1]
    inputs, _, result = equation.partition("->")
    letters = inputs.split(",")
    simple = "." not in equation and "->" in equation and all(len(set(part)) == len(part) for part in letters)
    if len(operands) != 2 or not simple:
        return dynamic(labels, node)
    return contract(labels, node, (operands[0], letters[0]), (operands[1], letters[1]), result)


def attention(labels: Labels, node: fx.Node) -> Any:
    """scaled_dot_product_attention(q, k, v, mask): softmax(q k^T s + mask) v."""
    given = arguments(node)
    query, key, value = given["query"], given["key"], given["value"]
    rank = len(shape_of(query))
    heads = "abcdefgh"[: rank - 2]
    scores_shape = (*shape_of(query)[:-1], shape_of(key)[-2])
    scores = contract(labels, node, (query, heads + "xk"), (key, heads + "yk"), heads + "xy", shape=scores_shape)
    mask = given["attn_mask"]
    if isinstance(mask, fx.Node):
        if labels.is_constant(mask):
            adopt(labels, labels.representative(mask), scores)
        else:
            labels.unite(align(labels.read(mask), scores.shape).expand(scores.shape), scores)
    scores = labels.tie(scores, [rank - 1])
    return contract(labels, node, (scores, heads + "xk"), (value, heads + "ky"), heads + "xy")


def contract(
    labels: Labels,
    node: fx.Node,
    a: tuple[fx.Node | Tensor, str],
    b: tuple[fx.Node | Tensor, str],
    result: str,
    *,
    shape: Sequence[int] | None = None,
) -> Tensor:
    """Labels of a sum of products over the letters that `result` lacks.

    Labels along summed letters of both operands are united; labels along the others pass to the result. Where both
    operands bring labels of their own, a position would belong to two atoms, so these are united.
    """
    shape = tuple(shape_of(node) if shape is None else shape)
    for (constant, own), (other, letters) in ((a, b), (b, a)):
        if isinstance(constant, fx.Node) and labels.is_constant(constant) and isinstance(other, fx.Node):
            return _project(labels, node, (other, letters), (constant, own), result)
    sides = [_Side(labels, operand, letters) for operand, letters in (a, b)]
    order = "".join(dict.fromkeys(a[1] + b[1]))
    summed = [letter for letter in order if letter not in result]
    sizes = {letter: max(side.size(letter) for side in sides) for letter in order}
    readers = [s.operand for s in sides if isinstance(s.operand, fx.Node) and not labels.is_constant(s.operand)]
    labels.readers[node] = (*labels.readers.get(node, ()), *readers)

    brought: list[Tensor] = []
    inner: tuple[Tensor, ...] = ()
    if any(side.moves(summed) for side in sides):
        for side, partner in zip(sides, reversed(sides), strict=True):
            side.tie(letter for letter in result if letter not in partner.letters)
        left, right = (side.spread(order, sizes) for side in sides)
        labels.unite(left, right)
        lead = left if sides[0].moves(summed) else right
        if labels.attention == "heads":
            lead = labels.tie(lead, [order.index(letter) for letter in summed])
            brought.append(_Side(labels, lead, order).spread(result, sizes))
        inner = (collapse(lead).reshape(-1),)
    brought += [side.spread(result, sizes) for side in sides if not side.moves(summed) and side.live()]
    out = zeros(shape)
    for count, part in enumerate(piece.expand(shape) for piece in brought):
        if count:
            labels.unite(out, part)
            out = labels.tie(out, [d for d in range(len(shape)) if varies(out, d) != varies(part, d)])
        else:
            out = part
    vectors = (*inner, *((collapse(out).reshape(-1),) if varying(out) else ()))
    labels.terms.append(Term(node, prod(shape) * prod(sizes[letter] for letter in summed), vectors))
    return out


def _project(labels: Labels, node: fx.Node, a: tuple[fx.Node, str], weight: tuple[fx.Node, str], result: str) -> Tensor:
    """A contraction with a constant: a linear layer written out, whose constant is sliced along the summed letter.

    The constant gives out fresh atoms along its own letter where nothing else of the result is labelled.
    """
    shape, (source, letters), (constant, own) = shape_of(node), a, weight
    x = data_input(labels, source)
    labels.readers[node] = (source,)
    slot = Weight(labels, constant)
    sizes = dict(zip(letters + own, x.shape + slot.shape, strict=True))
    summed = [letter for letter in letters if letter not in result]
    macs = prod(shape) * prod(sizes[letter] for letter in summed)
    moving = [letter for letter in summed if letter in own and varies(x, letters.index(letter))]
    if varying(x) and not moving:
        passed = _Side(labels, x, letters).spread(result, sizes).expand(shape)
        shared = [letter for letter in own if letter in result and varies(passed, result.index(letter))]
        if shared:
            labels.pin(passed, "is multiplied, channel by channel, by a constant matrix")
        labels.terms.append(Term(node, macs, (collapse(passed).reshape(-1),)))
        return passed
    for letter in moving[:1]:
        slot.bind(own.index(letter), channel_vector(labels, x, letters.index(letter)))
    if len(moving) > 1:
        labels.pin(x, "is contracted with a constant over several dimensions")
    free = [letter for letter in own if letter in result and letter not in letters]
    vectors = [labels.slots[s] for s in labels.slots if moving and s == (slot.name, own.index(moving[0]))]
    if len(free) != 1:
        labels.terms.append(Term(node, macs, tuple(vectors)))
        return zeros(shape)
    fresh = labels.atoms_vector(sizes[free[0]])
    slot.bind(own.index(free[0]), fresh)
    labels.terms.append(Term(node, macs, (fresh, *vectors)))
    return along(fresh, result.index(free[0]), shape)


class _Side:
    """One operand of a contraction: its labels, and a letter for each of its dimensions."""

    def __init__(self, labels: Labels, operand: fx.Node | Tensor, letters: str) -> None:
        self.labels, self.operand, self.letters = labels, operand, letters
        self.x: Tensor = labels.read(operand)

    def size(self, letter: str) -> int:
        """Size along a letter, 1 where the operand lacks it."""
        return self.x.shape[self.letters.index(letter)] if letter in self.letters else 1

    def moves(self, letters: Sequence[str]) -> bool:
        """Whether the labels change along any of the letters."""
        return any(varies(self.x, self.letters.index(letter)) for letter in letters if letter in self.letters)

    def live(self) -> bool:
        """Whether any position belongs to an atom."""
        return bool(varying(self.x)) or bool(collapse(self.x).any())

    def tie(self, letters: Iterable[str]) -> None:
        """Unite positions along the letters."""
        self.x = self.labels.tie(self.x, [self.letters.index(letter) for letter in letters if letter in self.letters])

    def spread(self, order: str, sizes: Mapping[str, int]) -> Tensor:
        """Labels with dimensions in the order of letters; those not in `order` (all alike) go, missing ones expand."""
        x, letters = self.x, self.letters
        for position in range(len(letters) - 1, -1, -1):
            if letters[position] not in order:
                x, letters = x.select(position, 0), letters[:position] + letters[position + 1 :]
        x = x.permute([letters.index(letter) for letter in order if letter in letters])
        index = tuple(slice(None) if letter in letters else None for letter in order)
        return x[index].expand([sizes[letter] for letter in order])
