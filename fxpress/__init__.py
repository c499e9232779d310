"""fxpress: makes a trained CNN several times smaller and faster, and proves what it cost.

These are the names to rely on. What needs torch is loaded on first use, so that `import fxpress` and `fxpress --help`
are quick.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from .ir.graph import Graph
    from .ir.trace import trace
    from .passes.budget import Budget
    from .passes.compile import Compiled, compile, load  # noqa: A004 - names of the contract
    from .passes.pipeline import Pipeline
    from .passes.train.distilling import distill
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
    "distill",
    "explain",
    "load",
    "trace",
]

_HOME_OF = {
    "Budget": ".passes.budget",
    "Compiled": ".passes.compile",
    "Data": ".runtime.data",
    "Graph": ".ir.graph",
    "Pipeline": ".passes.pipeline",
    "compile": ".passes.compile",
    "distill": ".passes.train.distilling",
    "explain": ".tools.explain",
    "load": ".passes.compile",
    "trace": ".ir.trace",
}


def __getattr__(name: str) -> object:
    """Load a public name from its home (PEP 562) and keep it."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(_HOME_OF[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
