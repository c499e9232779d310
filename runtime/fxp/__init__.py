"""The parts of the `.fxp` format; `runtime/artifact.py` is their face.

`container` is the file, `description` the document in it; its part `graph` is made of `modules`, `tensors`, `nodes`,
`signature` and `examples`, `documents` are the others; `values` and `checks` are what these are made of. `codecs` are
the layers with a stored form of their own, `quantized` and `bits` that of the product-quantized ones, `binary` that of
binary ones.
"""
