"""Layers of fxpress's own: plain, trainable torch modules. Importing the package registers all of them."""

from .binary_conv2d import BinaryConv2d as BinaryConv2d
from .binary_layer import BinaryLayer as BinaryLayer
from .binary_linear import BinaryLinear as BinaryLinear
from .binary_network import BinaryNetwork as BinaryNetwork
from .channel_mask import ChannelMask as ChannelMask
from .half_wave_quantizer import HalfWaveQuantizer as HalfWaveQuantizer
from .int8_conv2d import Int8Conv2d as Int8Conv2d
from .int8_layer import Int8Layer as Int8Layer
from .int8_linear import Int8Linear as Int8Linear
from .pq_conv2d import PQConv2d as PQConv2d
from .pq_layer import PQLayer as PQLayer
from .pq_linear import PQLinear as PQLinear
from .selection_mask import SelectionMask as SelectionMask
