"""What compensation did to one layer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Change:
    """One layer, before and behind.

    Attributes:
        layer: its path.
        method: `bias` or `least-squares`.
        place: where its new constant went: `bias`, `running mean`, `new bias`, or `unchanged`.
        before: relative error ‖Y − Ŷ‖ / ‖Y‖ of the layer as it was cut; Y is the response before the cut, Ŷ that to the
            same inputs without the removed channels, or, of sequential least squares, to what the layers before it,
            which have been treated already, give now.
        after: the same with what was put in.
        border: of `bias`, what zero-padded borders leave of a constant channel, in the same unit; 0 otherwise.
    """

    layer: str
    method: str
    place: str
    before: float
    after: float
    border: float = 0.0
