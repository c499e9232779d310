"""`fxpress passes`: every pass with its first line and its options."""

from __future__ import annotations

import inspect
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..passes.base import Pass
from ..passes.options import allowed_values
from ..passes.registry import all_passes, find_pass


def list_passes() -> RenderableType:
    """All passes, each with its options in one table."""
    parts: list[RenderableType] = []
    for name, cls in all_passes().items():
        head = Text.assemble((name, "bold"), f"  {cls.semantics.value}  ", (cls.summary(), "dim"))
        parts += [head, Padding(_options(cls), (0, 0, 1, 2))]
    return Group(*parts, Text("fxpress passes NAME shows the whole documentation of one.", "dim"))


def describe_pass(name: str) -> RenderableType:
    """The whole documentation of one pass and its options.

    Raises:
        OptionError: no such pass.
    """
    cls = find_pass(name)
    head = Text.assemble((name, "bold"), f"  {cls.semantics.value}")
    texts = [Text(paragraph) for paragraph in _paragraphs(inspect.cleandoc(cls.__doc__ or ""))]
    return Group(head, *(Padding(text, (1, 0, 0, 0)) for text in texts), Padding(_options(cls), (1, 0, 0, 0)))


def _paragraphs(text: str) -> list[str]:
    """Paragraphs of a docstring for a terminal of any width; indented ones (formulas) keep their lines."""
    parts = text.split("\n\n")
    return [part if part.startswith(" ") else " ".join(part.split()) for part in parts]


def _options(cls: type[Pass]) -> RenderableType:
    """Option, default, what is allowed, what it does."""
    schema = cls.model_json_schema()
    fields: dict[str, dict[str, Any]] = schema.get("properties", {})
    if not fields:
        return Text("no options", "dim")
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for column in ("option", "default", "allowed", ""):
        table.add_column(column, overflow="fold", no_wrap=column in ("option", "default"))
    required = schema.get("required", [])
    for name, field in fields.items():
        default = "required" if name in required else str(field.get("default"))
        cells = (name, default, _allowed(field, schema), field.get("description", ""))
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _allowed(field: dict[str, Any], schema: dict[str, Any]) -> str:
    """What an option takes; of an object such as the budget the keys."""
    choices = [choice for choice in field.get("anyOf", [field]) if choice.get("type") != "null"]
    texts = []
    for choice in choices:
        properties = schema.get("$defs", {}).get(str(choice.get("$ref", "")).rpartition("/")[2], {}).get("properties")
        texts.append(f"{{{', '.join(properties)}}}" if properties else allowed_values(choice))
    return " or ".join(dict.fromkeys(texts))
