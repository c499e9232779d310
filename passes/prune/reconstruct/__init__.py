"""Loss without training: what removed channels gave to those who read them goes into the weights that stay."""

from .compensate import Compensation, Method, compensate

__all__ = ["Compensation", "Method", "compensate"]
