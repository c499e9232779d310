"""YAML without surprises: plain values only, and a key that is there twice is a mistake."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml
from yaml.constructor import ConstructorError

MERGE = "tag:yaml.org,2002:merge"
"""`<<: *anchor` takes over the keys of another mapping; those written beside it come first."""


class _StrictLoader(yaml.SafeLoader):
    """The safe loader, which otherwise silently keeps the last of equal keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        written = [key for key, _ in node.value if key.tag != MERGE]
        keys = [self.construct_object(key, deep=True) for key in written]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                raise ConstructorError(None, None, f"key {key!r} is there twice", written[index].start_mark)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """The content of a YAML text.

    Raises:
        yaml.YAMLError: it is not valid.
    """
    return yaml.load(text, _StrictLoader)
