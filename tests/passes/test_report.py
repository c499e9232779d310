"""The report: rows, JSON, and a table that can be read."""

from __future__ import annotations

import json

import pytest
from fxpress.passes.base import Skip
from fxpress.passes.report import Report, Row, short

ROWS = [
    Row("trace", "exact", parameters=11_689_512, macs=1_814_073_344, size_bytes=46_800_000, latency_ms=20.0,
        latency_ratio=1.0, distance=0.0, seconds=1.2),
    Row("prune-channels", "lossy", {"ratio": 0.5}, parameters=3_000_000, macs=900_000_000, size_bytes=12_000_000,
        latency_ms=11.0, latency_ratio=0.55, distance=2e-7, seconds=0.4, notes=["5 of 10 channels removed"],
        skips=[Skip(f"conv{i}", "is an output") for i in range(5)], metrics={"loss": [1.0, 0.5]}),
]  # fmt: skip


def test_to_dict_is_json_and_comes_back() -> None:
    report = Report(list(ROWS), {"torch": "2", "seed": 0})
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_text() -> None:
    text = str(Report(list(ROWS), {"torch": "2", "seed": 0}))
    lines = text.splitlines()
    assert lines[0].split() == ["pass", "parameters", "MACs", "bytes", "latency", "ms", "ratio", "distance", "seconds"]
    assert lines[2].split()[:7] == ["prune-channels", "3M", "26%", "900M", "50%", "12M", "26%"]
    assert "prune-channels: 5 of 10 channels removed" in text
    assert "prune-channels: skipped conv0, conv1, conv2 and 2 more: is an output" in text
    assert lines[-1] == "torch 2, seed 0"
    assert max(map(len, lines)) <= 110


def test_of_many_reasons_a_few_are_told() -> None:
    skips = [Skip(f"norm{i}", f"its input is cat{i // 2}") for i in range(20)]
    lines = str(Report([Row("trace", "exact"), Row("fold-batchnorm", "exact", skips=skips)])).splitlines()
    assert [line for line in lines if "skipped" in line] == [
        "fold-batchnorm: skipped norm0, norm1: its input is cat0",
        "fold-batchnorm: skipped norm2, norm3: its input is cat1",
        "fold-batchnorm: skipped norm4, norm5: its input is cat2",
        "fold-batchnorm: skipped 14 more: see the skips of this row in the report's JSON",
    ]


def test_accuracy_has_a_column_only_if_measured() -> None:
    assert "accuracy" not in str(Report(list(ROWS)))
    rows = [Row("trace", "exact", parameters=1, macs=1, size_bytes=1, accuracy=0.98765)]
    assert "98.77%" in str(Report(rows))


def test_a_network_without_parameters_or_macs() -> None:
    assert "0" in str(Report([Row("trace", "exact")]))


def test_rows_by_name() -> None:
    report = Report([*ROWS, Row("prune-channels", "lossy", parameters=7)])
    assert report["prune-channels"].parameters == 7
    with pytest.raises(KeyError, match="no row 'emit'; rows: trace, prune-channels"):
        report["emit"]


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (812, "812"), (999.9, "1k"), (11_689_512, "11.7M"), (1_814_073_344, "1.81G")]
)
def test_short(number: float, text: str) -> None:
    assert short(number) == text
