"""The steps from a model to a graph; `trace.py` takes them in order, and `raising.py` is the last but one."""
