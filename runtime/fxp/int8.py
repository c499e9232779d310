"""The stored form of 8-bit layers: one byte for each weight.

One layer is, without gaps and little endian,

    weights   int8, from -127 to 127, in the order of the layer's own weight
    steps     out float32
    range     2 float32: least and largest input
    bias      out float32, where there is one

which is `Int8Layer.stored_bytes`. The loaded layer computes the same bits as the stored one, and it can be trained: its
weights are then the rounded ones.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..layers.int8_layer import Int8Layer
from ..layers.int8_rounding import LARGEST
from .checks import FormatError

PLAIN = "int8"
_FLOAT: np.dtype[np.float32] = np.dtype("<f4")


def fits(layer: Int8Layer) -> bool:
    """Whether a layer has this form: float32, with weights that are finite."""
    return all(t.dtype == torch.float32 for t in (*layer.parameters(), *layer.buffers())) and bool(
        layer.weight.isfinite().all()
    )


def encode_layer(layer: Int8Layer) -> tuple[bytes, str]:
    """Bytes of a layer, and how it is coded."""
    floats = [layer.weight_scale, layer.input_range, *([] if layer.bias is None else [layer.bias])]
    parts = [layer.int8_weight.cpu().numpy().tobytes()]
    parts += [tensor.detach().cpu().numpy().astype(_FLOAT).tobytes() for tensor in floats]
    return b"".join(parts), PLAIN


def decode_layer(layer: Int8Layer, data: memoryview, coding: str) -> dict[str, Tensor]:
    """The tensors of a layer, which is still on the `meta` device, from its bytes.

    Raises:
        FormatError: another coding, another number of bytes than the layer's sizes ask for, or a weight of -128.
    """
    if coding != PLAIN or len(data) != layer.stored_bytes:
        raise FormatError(
            f"an 8-bit layer has {len(data)} bytes as {coding[:20]!r}, its sizes ask for {layer.stored_bytes}"
        )
    count, outputs = layer.weight.numel(), layer.weight_scale.numel()
    numbers = torch.from_numpy(np.frombuffer(data[:count], np.int8).astype(np.float32))
    if count and int(numbers.min()) < -LARGEST:
        raise FormatError("an 8-bit weight is -128; they go from -127 to 127")
    floats = torch.from_numpy(np.frombuffer(data[count:], _FLOAT).astype(np.float32))
    steps, span = floats[:outputs], floats[outputs : outputs + 2]
    weight = (numbers.view(outputs, -1) * steps[:, None]).view(layer.weight.shape)
    found = {"weight": weight, "weight_scale": steps.clone(), "input_range": span.clone()}
    return found if layer.bias is None else {**found, "bias": floats[outputs + 2 :].clone()}
