"""Every error that fxpress raises on purpose.

Errors are part of the interface: each names what was wrong (node, shape, value), where, and the next step.
The command line prints `str(error)` as its one line; `--debug` shows the traceback.
"""

from __future__ import annotations


class FxpressError(Exception):
    """Base of all errors of fxpress.

    Args:
        what: one sentence that says what is wrong, with the names and numbers at hand.
        hint: what the reader can do next; shown behind the sentence.
    """

    def __init__(self, what: str, *, hint: str = "") -> None:
        self.what = what
        self.hint = hint
        super().__init__(f"{what}. {hint}" if hint else what)


class TraceError(FxpressError):
    """The model could not be turned into a graph; names the line of the model's own code."""


class GraphError(FxpressError):
    """A graph broke an invariant (unused parameter, dangling node, shape that does not fit)."""


class VerifyError(FxpressError):
    """The oracle found a distance between the masked and the cut network; the graph was rolled back."""


class CutError(FxpressError):
    """A cut cannot be realised exactly; names the node that is in the way."""


class OptionError(FxpressError):
    """An unknown pass or option, or a value out of its range; names pass, option, value and what is allowed."""


class BudgetError(FxpressError):
    """A budget that cannot be met; says what is the least that can be reached."""


class DataError(FxpressError):
    """Data that is missing, empty, exhausted or of the wrong shape."""


class TrainingError(FxpressError):
    """Training stopped, for example at a loss that is not finite; names the step and the learning rate."""


class ArtifactError(FxpressError):
    """A file that is not a valid .fxp: truncated, corrupt, hostile, or of a newer format."""


class ModelError(FxpressError):
    """A model that cannot be compiled as given, for example with NaN weights, or that cannot be found."""


class KernelError(FxpressError):
    """A kernel was given tensors that do not fit each other, or an index layout that is not one."""
