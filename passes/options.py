"""Options as data: frozen pydantic models whose mistakes become one clear `OptionError`.

An error names who was configured, the option, what was given and what is allowed:
`pass 'prune-channels', option 'ratio': given 3, allowed: number >= 0 and < 1`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from ..ir.errors import OptionError


class InvalidOptionError(OptionError, ValueError):
    """An `OptionError` that pydantic may nest: inside another model it is reported under the option that holds it."""


class Options(BaseModel):
    """Base of everything that a pipeline file configures: frozen, no unknown keys, validated also in Python.

    Raises:
        OptionError: an unknown option or a value that is not allowed.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, arbitrary_types_allowed=False
    )

    def __init__(self, **options: Any) -> None:
        try:
            super().__init__(**options)
        except ValidationError as error:
            raise explain_error(type(self), error) from None

    @classmethod
    def title(cls) -> str:
        """What an error calls this model, e.g. `pass 'prune-channels'`."""
        return cls.__name__


def explain_error(model: type[Options], error: ValidationError) -> InvalidOptionError:
    """Every mistake that pydantic found, in one line."""
    mistakes = _without_union_noise(error.errors(include_url=False))
    return InvalidOptionError("; ".join(_explain_one(model, details) for details in mistakes))


def nearest(name: str, known: Iterable[str]) -> str:
    """`Did you mean 'ratio'? ` for a misspelt name, an empty string where nothing is near."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}? " if close else ""


def brief(value: Any) -> str:
    """A value as an error shows it: on one line, and cut where it is long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def allowed_values(schema: dict[str, Any]) -> str:
    """One option's JSON Schema in words: `number >= 0 and < 1`, `'global' or 'uniform'`."""
    if "anyOf" in schema:
        choices = [choice for choice in schema["anyOf"] if choice.get("type") != "null"]
        return " or ".join(dict.fromkeys(map(allowed_values, choices)))
    if "const" in schema:
        return repr(schema["const"])
    if "enum" in schema:
        return " or ".join(repr(value) for value in schema["enum"])
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    kind = str(schema.get("type", "any value"))
    if kind == "array" and "items" in schema:
        kind = f"list of {allowed_values(schema['items'])}"
    if isinstance(schema.get("additionalProperties"), dict):
        kind = f"mapping of names to {allowed_values(schema['additionalProperties'])}"
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<", "pattern": "matching"}
    return " and ".join([kind, *(f"{sign} {schema[key]}" for key, sign in signs.items() if key in schema)]).replace(
        f"{kind} and ", f"{kind} ", 1
    )


def _explain_one(model: type[Options], details: ErrorDetails) -> str:
    option, properties = str(details["loc"][0]) if details["loc"] else "", _properties(model)
    if details["type"] == "extra_forbidden":
        known = ", ".join(properties) or "none"
        return f"{model.title()} has no option {option!r}: {nearest(option, properties)}options: {known}"
    if details["type"] == "missing":
        return f"{model.title()} needs option {option!r}: {allowed_values(properties[option])}"
    nested = details.get("ctx", {}).get("error")
    reason = nested.what if isinstance(nested, OptionError) else details["msg"].removeprefix("Value error, ")
    if not option:
        return f"{model.title()}: {reason}"
    head = f"{model.title()}, option {option!r}: given {brief(details['input'])}"
    if isinstance(nested, ValueError):
        return f"{head}: {reason}"
    return f"{head}, allowed: {allowed_values(properties.get(option, {}))} ({_lower(reason)})"


def _properties(model: type[Options]) -> dict[str, dict[str, Any]]:
    properties: dict[str, dict[str, Any]] = model.model_json_schema().get("properties", {})
    return properties


def _without_union_noise(mistakes: list[ErrorDetails]) -> list[ErrorDetails]:
    """Pydantic reports one mistake per member of a union: keep, per option, the one that says most."""
    best: dict[str, ErrorDetails] = {}
    for details in mistakes:
        option = str(details["loc"][0]) if details["loc"] else ""
        if option not in best or details["type"] == "value_error":
            best[option] = details
    return list(best.values())


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
