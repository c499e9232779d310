"""Layers whose stored form is another than their state dict, by name.

A codec turns a layer into bytes and back. All layers that have one lie in one tensor of the file, `fxpress/layers`,
behind each other in the order of the modules; the row of such a module says how many bytes are its own:

    {"path": "fc6", "type": "PQLinear", .., "packed": {"bytes": 4100, "coding": "bits", "frozen": ["codebook"]}}

`coding` is the codec's own word; `frozen` names the parameters that need no gradient, if any. A layer that the codec
does not fit, or that shares a tensor with another, is stored by its state dict like any other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from . import binary, int8, quantized
from .checks import JSON, FormatError, check_object

PACKED = "fxpress/layers"  # no path of a module has a slash


@dataclass(frozen=True)
class Codec:
    """How layers of one type are stored.

    Attributes:
        fits: whether a layer has the form.
        encode: layer -> its bytes and the coding.
        decode: layer on the `meta` device, its bytes and the coding -> its tensors by name, all of them.
    """

    fits: Callable[[Any], bool]
    encode: Callable[[Any], tuple[bytes, str]]
    decode: Callable[[Any, memoryview, str], dict[str, Tensor]]


_PRODUCT = Codec(quantized.fits, quantized.encode_layer, quantized.decode_layer)
_INT8 = Codec(int8.fits, int8.encode_layer, int8.decode_layer)
_SIGNS = Codec(binary.fits, binary.encode_layer, binary.decode_layer)
CODECS: dict[str, Codec] = {
    "PQLinear": _PRODUCT, "PQConv2d": _PRODUCT, "Int8Linear": _INT8, "Int8Conv2d": _INT8,
    "BinaryLinear": _SIGNS, "BinaryConv2d": _SIGNS,
}  # fmt: skip


def codec_of(layer: nn.Module) -> Codec | None:
    """The codec of a layer, None where it has none or does not fit."""
    codec = CODECS.get(type(layer).__name__)
    return codec if codec is not None and codec.fits(layer) else None


def pack_layer(path: str, layer: nn.Module, codec: Codec) -> tuple[bytes, dict[str, JSON]]:
    """Bytes of a layer and the entry `packed` of its module's row."""
    try:
        data, coding = codec.encode(layer)
    except FormatError as error:
        raise FormatError(f"layer {path!r}: {error}", error.hint) from None
    frozen = sorted(name for name, parameter in layer.named_parameters() if not parameter.requires_grad)
    return data, {"bytes": len(data), "coding": coding} | ({"frozen": frozen} if frozen else {})


@dataclass
class Place:
    """A layer on the `meta` device whose bytes are still to be read."""

    path: str
    layer: nn.Module
    row: dict[str, JSON]

    @classmethod
    def read(cls, path: str, layer: nn.Module, row: JSON) -> Place:
        """Check the entry `packed` of a module's row."""
        what = f"the stored form of layer {path!r}"
        check_object(row, what, {"bytes": int, "coding": str}, {"frozen": list})
        if type(layer).__name__ not in CODECS or row["bytes"] < 0:
            raise FormatError(f"{what} is none: a {type(layer).__name__} is stored by its state dict")
        if not all(isinstance(name, str) and name in layer._parameters for name in row.get("frozen", [])):
            raise FormatError(f"{what} names a parameter that the layer has not")
        return cls(path, layer, row)

    def fill(self, data: memoryview) -> None:
        """Put the tensors into the layer."""
        try:
            tensors = CODECS[type(self.layer).__name__].decode(self.layer, data, self.row["coding"])
        except FormatError as error:
            raise FormatError(f"layer {self.path!r}: {error}", error.hint) from None
        for name, tensor in tensors.items():
            learns = name not in self.row.get("frozen", [])
            value = nn.Parameter(tensor, requires_grad=learns) if name in self.layer._parameters else tensor
            setattr(self.layer, name, value)


def unpack_layers(places: list[Place], data: memoryview) -> None:
    """Fill all layers from the bytes of `fxpress/layers`."""
    start = 0
    for place in places:
        place.fill(data[start : start + place.row["bytes"]])
        start += place.row["bytes"]
