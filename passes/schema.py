"""JSON Schema of pipeline files."""

from __future__ import annotations

import inspect
from typing import Any

from .base import Pass
from .registry import all_passes


def pipeline_schema() -> dict[str, Any]:
    """The schema of a whole pipeline file; editors complete pass names and options and show their documentation.

    In YAML, name it in the first line: `# yaml-language-server: $schema=fxpress.schema.json`.
    """
    passes = all_passes()
    definitions: dict[str, Any] = {}
    options = {name: _pass_schema(cls, definitions) for name, cls in passes.items()}
    bare = [
        {"const": name, "description": cls.summary()}
        for name, cls in passes.items()
        if not options[name].get("required")
    ]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "fxpress pipeline",
        "description": "Passes that compile a network, in the order in which they run.",
        "type": "object",
        "additionalProperties": False,
        "required": ["passes"],
        "properties": {
            "seed": {"type": "integer", "minimum": 0, "description": "Seeds every pass."},
            "passes": {"type": "array", "items": {"anyOf": [*bare, _configured(options)]}},
        },
        "$defs": definitions,
    }


def _configured(options: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One `{name: options}`: all names in one object, because editors then complete best."""
    return {
        "type": "object",
        "additionalProperties": False,
        "minProperties": 1,
        "maxProperties": 1,
        "properties": {name: _or_null(schema) for name, schema in options.items()},
    }


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    """Options may be left empty (`- emit:` is `- emit`) unless one is required."""
    if schema.get("required"):
        return schema
    return {"description": schema["description"], "anyOf": [schema, {"type": "null"}]}


def _pass_schema(cls: type[Pass], definitions: dict[str, Any]) -> dict[str, Any]:
    """The options of one pass; shared types such as the budget move to `definitions`."""
    schema = cls.model_json_schema(ref_template="#/$defs/{model}")
    definitions.update(schema.pop("$defs", {}))
    schema["description"] = inspect.cleandoc(cls.__doc__ or "")
    return schema
