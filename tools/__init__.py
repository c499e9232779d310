"""The command line, the explainer, the visualiser and the benchmarks."""
