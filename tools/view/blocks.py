"""Module blocks: which of the modules on a node's path are worth a frame in the drawing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from torch import fx


def blocks_of(nodes: list[fx.Node], heavy: Callable[[fx.Node], bool]) -> dict[str, list[str]]:
    """Blocks that enclose each node, from the outermost to the innermost.

    A module is a block where at least two nodes lie in it that are drawn as cards of their own (`heavy`): a
    convolution with its norm and activation is one card already. A block with the very members of the block around it
    is left out.
    """
    paths = {node.name: str(node.meta.get("path") or "") for node in nodes}
    size: Counter[str] = Counter()
    cards: Counter[str] = Counter()
    for node in nodes:
        around = _modules(paths[node.name])
        size.update(around)
        cards.update(around if heavy(node) else ())
    found: dict[str, list[str]] = {}
    for name, path in paths.items():
        chain = [module for module in _modules(path) if cards[module] >= 2]
        found[name] = [module for i, module in enumerate(chain) if i == 0 or size[module] < size[chain[i - 1]]]
    return found


def _modules(path: str) -> list[str]:
    """`a.b.c` → `["a", "a.b", "a.b.c"]`; none for the model itself."""
    parts = path.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)] if path else []
