"""The page: template, style, scripts and data become one HTML file that asks the network for nothing.

Names in a graph may come from a file of unknown origin. They reach the page as JSON, in which `<`, `>` and `&` are
escaped so that no name can end the script element; the page's own script makes text nodes of them, never markup; and a
content security policy allows that one script, by its hash, and no request at all.
"""

from __future__ import annotations

import base64
import hashlib
import json
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from ...ir.graph import Graph
from ...passes.report import Report
from .data import page_data

SCRIPTS = ("graph.js", "layout.js", "draw.js", "sensitivity.js", "panel.js", "app.js", "events.js")
_ESCAPES = {
    "<": "\\u003c",
    ">": "\\u003e",
    "&": "\\u0026",
    "\u2028": "\\u2028",
    "\u2029": "\\u2029",
    "://": ":\\u002f\\u002f",
}


def build_page(graph: Graph, name: str, report: Report | None = None) -> str:
    """The HTML of the whole page.

    Args:
        graph: the network to draw.
        name: its title.
        report: what the passes did, shown as a table.
    """
    script = "\n" + "\n".join(_read(file) for file in SCRIPTS)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return Template(_read("page.html")).substitute(
        title=escape(name).replace("/", "&#47;"),
        style=_read("page.css"),
        script=script,
        script_hash=f"sha256-{digest}",
        data=embed(page_data(graph, name, report)),
    )


def embed(value: Any) -> str:
    """JSON that may stand inside a script element."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for plain, escaped in _ESCAPES.items():
        text = text.replace(plain, escaped)
    return text


def _read(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")
