"""Compiled kernels behind `torch.ops.fxpress`, and the torch reference that computes the same.

Importing the package registers the operators:

    torch.ops.fxpress.pq_linear(x, codebook, layout, bias, out_features, tables, relu) -> (…, out)
    torch.ops.fxpress.pq_conv2d(x, codebook, layout, bias, out_channels, kernel_size, stride, padding, dilation,
                                groups, tables, relu, pool, channels_last) -> (N, out, Ho, Wo)

x and codebook (M, K, d) are float32, `layout` comes from `prepare_linear` or `prepare_conv2d`, bias may be None, tables
is "fp32", "int16" or "int8" (`reference.py` has the formulas). No gradients: a layer that trains decodes its weight.
8-bit layers: `int8_conv2d`, `int8_linear` (`int8_ops.py`).
Layers with one-bit weights: `binary_conv2d`, `binary_linear`, and both with levels for output (`binary_ops.py`);
whole networks of them in one call: `binary_network` (`network_ops.py`).

Layers hold an operator with everything but x bound to it (`bound.py`), for example
`BoundPQLinear(codebook, layout, bias, out_features, tables, relu)`, and call that.
"""

from .binary_ops import BoundBinaryConv2d as BoundBinaryConv2d
from .binary_ops import BoundBinaryConv2dLevels as BoundBinaryConv2dLevels
from .binary_ops import BoundBinaryLinear as BoundBinaryLinear
from .binary_ops import BoundBinaryLinearLevels as BoundBinaryLinearLevels
from .binary_prepare import prepare_binary_conv2d as prepare_binary_conv2d
from .binary_prepare import prepare_binary_linear as prepare_binary_linear
from .bound import Bound as Bound
from .int8_ops import BoundInt8Conv2d as BoundInt8Conv2d
from .int8_ops import BoundInt8Linear as BoundInt8Linear
from .int8_reference import prepare_int8 as prepare_int8
from .library import available as available
from .library import isa as isa
from .library import isas as isas
from .library import using as using
from .library import why_not as why_not
from .network_ops import binary_network as binary_network
from .pq_ops import BoundPQConv2d as BoundPQConv2d
from .pq_ops import BoundPQLinear as BoundPQLinear
from .prepare import prepare_codebook as prepare_codebook
from .prepare import prepare_conv2d as prepare_conv2d
from .prepare import prepare_linear as prepare_linear
