"""The graph as one self-contained HTML page."""

from .page import build_page

__all__ = ["build_page"]
