"""The result of a sensitivity scan as a chart of text, for reports on a terminal."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from .sensitivity import GroupSensitivity, Sensitivity

_BAR, _PARTS = 16, " ▏▎▍▌▋▊▉█"
_ROWS = 40


def sensitivity_table(found: Sensitivity) -> Table:
    """A row per group: its values at each ratio, and a bar as long as the root of their mean, which weighs the scores.

    Of many groups the least and the most sensitive are shown.
    """
    shown, left_out = _shown(found.groups)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("group", no_wrap=True, overflow="ellipsis", max_width=44)
    for title in ("channels", *(f"{ratio:.0%} masked" for ratio in found.ratios)):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("influence on the whole", no_wrap=True)
    highest = max((root(group) for group in found.groups), default=0.0) or 1.0
    for group in shown:
        cells = [group.name, str(group.channels), *(value_text(found, value) for value in group.values)]
        table.add_row(*map(Text, cells), Text(bar(root(group) / highest)))
    if left_out:
        table.add_row(Text(f"... and {left_out} between", style="dim"))
    return table


def sensitivity_title(found: Sensitivity) -> str:
    """What the chart shows."""
    what = "KL to the original in nats" if found.measure == "kl" else "accuracy lost"
    base = "" if found.accuracy is None else f" of {found.accuracy:.2%}"
    return f"{what}{base} when a share of one group alone is masked, {found.images} images"


def value_text(found: Sensitivity, value: float) -> str:
    """A value with the digits that it deserves: `0.0123` nats, `1.6 %` of accuracy."""
    return f"{value:.2g}" if found.measure == "kl" else f"{value:.1%}"


def root(group: GroupSensitivity) -> float:
    """Root of the mean value; 0 where masking did good."""
    return float(max(group.mean, 0.0) ** 0.5)


def bar(share: float, width: int = _BAR) -> str:
    """A bar of eighths of characters, `share` (0-1) of a width."""
    eighths = round(min(max(share, 0.0), 1.0) * width * 8)
    return (_PARTS[8] * (eighths // 8) + _PARTS[eighths % 8]).rstrip()


def _shown(groups: tuple[GroupSensitivity, ...]) -> tuple[list[GroupSensitivity], int]:
    """The groups to show in the order of the network, and how many are left out."""
    if len(groups) <= _ROWS:
        return list(groups), 0
    order = sorted(groups, key=root)
    kept = {id(group) for group in (*order[: _ROWS // 2], *order[-_ROWS // 2 :])}
    return [group for group in groups if id(group) in kept], len(groups) - len(kept)
