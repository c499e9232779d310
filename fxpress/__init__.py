"""fxpress: makes a trained CNN several times smaller and faster, and proves what it cost.

These are the names to rely on. Each is loaded on first use, so that `import fxpress` and `fxpress --help` are quick.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .ir.errors import (
        ArtifactError,
        BudgetError,
        CutError,
        DataError,
        FxpressError,
        GraphError,
        ModelError,
        OptionError,
        TraceError,
        TrainingError,
        VerifyError,
    )
    from .ir.graph import Graph
    from .ir.trace import trace
    from .passes.budget import Budget
    from .passes.compile import Compiled, compile, load  # noqa: A004
    from .passes.pipeline import Pipeline
    from .runtime.data import Data
    from .tools.explain import explain

__version__ = version("fxpress")

__all__ = [
    "ArtifactError",
    "Budget",
    "BudgetError",
    "Compiled",
    "CutError",
    "Data",
    "DataError",
    "FxpressError",
    "Graph",
    "GraphError",
    "ModelError",
    "OptionError",
    "Pipeline",
    "TraceError",
    "TrainingError",
    "VerifyError",
    "__version__",
    "compile",
    "explain",
    "load",
    "trace",
]

_HOMES = {
    ".ir.errors": (
        "ArtifactError",
        "BudgetError",
        "CutError",
        "DataError",
        "FxpressError",
        "GraphError",
        "ModelError",
        "OptionError",
        "TraceError",
        "TrainingError",
        "VerifyError",
    ),
    ".ir.graph": ("Graph",),
    ".ir.trace": ("trace",),
    ".passes.budget": ("Budget",),
    ".passes.compile": ("Compiled", "compile", "load"),
    ".passes.pipeline": ("Pipeline",),
    ".runtime.data": ("Data",),
    ".tools.explain": ("explain",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    """Load a public name from its module (PEP 562) and keep it."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(_HOME_OF[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
