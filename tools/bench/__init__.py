"""Benchmarks, run as `python -m fxpress.tools.bench.NAME [--quick] [--json FILE]`."""
