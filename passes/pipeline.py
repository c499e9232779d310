"""A pipeline: passes in order, from Python, YAML or TOML."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Union

import yaml

from ..ir.errors import OptionError
from .base import Pass
from .options import brief, nearest
from .registry import find_pass
from .schema import pipeline_schema
from .yaml_file import parse_yaml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]

PassLike = Pass | str | Mapping[str, Any]
"""A pass object, its name, or `{name: options}`."""
PipelineLike = Union["Pipeline", str, Path, PassLike, Sequence[PassLike]]
"""What `compile` takes: a pipeline, a path to a .yaml or .toml file, or a list of passes."""

_ENTRY = "passes, each a name or {name: options}"


class Pipeline:
    """Passes in the order in which they run.

    Args:
        passes: pass objects, names, or `{name: options}`.
        seed: what `compile` seeds the passes with, unless it is itself given a seed other than 0.

    Raises:
        OptionError: an unknown pass or option, or a value that is not allowed.
    """

    def __init__(self, passes: Sequence[PassLike] = (), seed: int | None = None) -> None:
        if isinstance(passes, (str, Mapping)) or not isinstance(passes, Sequence):
            raise OptionError(f"'passes' is {_kind(passes)}; allowed: a list of {_ENTRY}")
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or seed < 0):
            raise OptionError(f"'seed' is {seed!r}; allowed: an integer >= 0")
        self.passes = tuple(make_pass(one) for one in passes)
        self.seed = seed

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.passes)

    def __len__(self) -> int:
        return len(self.passes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pipeline) and (self.passes, self.seed) == (other.passes, other.seed)

    def __hash__(self) -> int:
        return hash(self.fingerprint())

    def __repr__(self) -> str:
        return f"Pipeline({[_entry(one) for one in self.passes]!r}, seed={self.seed})"

    @classmethod
    def of(cls, source: PipelineLike) -> Pipeline:
        """A pipeline from whatever `compile` accepts."""
        if isinstance(source, Pipeline):
            return source
        if isinstance(source, Path) or (isinstance(source, str) and _looks_like_path(source)):
            return cls.load(source)
        if isinstance(source, Mapping) and "passes" in source:
            return cls.from_dict(source)
        return cls([source] if isinstance(source, (Pass, str, Mapping)) else source)

    @classmethod
    def load(cls, path: str | Path) -> Pipeline:
        """Read a pipeline from a .yaml, .yml or .toml file.

        Raises:
            OptionError: the file is missing, cannot be parsed (says the line), or names something unknown.
        """
        path = Path(path)
        try:
            return cls.from_dict(_parse_file(path))
        except OptionError as error:
            what = error.what if str(path) in error.what else f"{path}: {error.what}"
            raise OptionError(what, hint=error.hint) from None

    @classmethod
    def from_dict(cls, content: Any) -> Pipeline:
        """The inverse of `to_dict`; also takes what YAML and TOML files hold.

        Raises:
            OptionError: an unknown key, pass or option, or a value that is not allowed.
        """
        if not isinstance(content, Mapping):
            raise OptionError(f"a pipeline is {_kind(content)}; allowed: a mapping with 'passes' and perhaps 'seed'")
        for key in content:
            if key not in ("seed", "passes"):
                near = nearest(str(key), ("seed", "passes"))
                raise OptionError(f"a pipeline has no {key!r}: {near}keys: seed, passes")
        if "passes" not in content:
            raise OptionError(f"a pipeline needs 'passes': a list of {_ENTRY}")
        return cls(content["passes"], content.get("seed"))

    def to_dict(self) -> dict[str, Any]:
        """The pipeline as JSON values, without options that are at their defaults."""
        seed = {} if self.seed is None else {"seed": self.seed}
        return {**seed, "passes": [_entry(one) for one in self.passes]}

    def fingerprint(self) -> str:
        """SHA-256 over every option of every pass, defaults included."""
        full = [[one.name, one.model_dump(mode="json")] for one in self.passes]
        return hashlib.sha256(json.dumps([self.seed, full], sort_keys=True).encode()).hexdigest()

    @staticmethod
    def schema() -> dict[str, Any]:
        """JSON Schema of pipeline files, for editors that complete and check them."""
        return pipeline_schema()


def make_pass(source: PassLike) -> Pass:
    """A pass from an object, a name, or `{name: options}`.

    Raises:
        OptionError: an unknown pass or option, or a value that is not allowed.
    """
    if isinstance(source, Pass):
        return source
    if isinstance(source, str):
        return find_pass(source)()
    if not isinstance(source, Mapping) or not source:
        raise OptionError(f"a pass is given as {brief(source)}; allowed: a name, {{name: options}} or a pass object")
    if len(source) > 1:
        keys = ", ".join(map(repr, source))
        raise OptionError(f"one pass is given with the keys {keys}", hint="Indent the options under the pass's name.")
    ((name, options),) = source.items()
    cls = find_pass(str(name))
    if options is not None and not isinstance(options, Mapping):
        raise OptionError(f"the options of {cls.title()} are {brief(options)}; allowed: a mapping of options")
    return cls(**{str(key): value for key, value in (options or {}).items()})


def _entry(one: Pass) -> str | dict[str, Any]:
    return {one.name: settings} if (settings := one.settings()) else one.name


def _looks_like_path(text: str) -> bool:
    return Path(text).suffix in (".yaml", ".yml", ".toml")


def _kind(value: Any) -> str:
    return "empty" if value is None else f"a {type(value).__name__} ({brief(value)})"


def _parse_file(path: Path) -> Any:
    if not _looks_like_path(str(path)):
        raise OptionError(f"{path} is no pipeline file; allowed: .yaml, .yml or .toml")
    try:
        text = path.read_text(encoding="utf-8")
        return tomllib.loads(text) if path.suffix == ".toml" else parse_yaml(text)
    except FileNotFoundError:
        raise OptionError(f"there is no pipeline file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"{path} cannot be read: {error}") from None
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise OptionError(f"{path}{line} is not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, tomllib.TOMLDecodeError) as error:
        raise OptionError(f"{path} is not valid: {' '.join(str(error).split())}") from None
