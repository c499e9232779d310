"""The parts of the `.fxp` format; `runtime/artifact.py` is their face.

`container` is the file, `graph` the document in it, made of `modules`, `tensors`, `nodes` and `signature`; `values`,
`documents` and `checks` are what these are made of.
"""
