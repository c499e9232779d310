// The inner loops of int8.h in plain C++: the code to read first.
#pragma once

#include <cmath>

#include "int8.h"

namespace fx {
namespace {

FX_INLINE uint8_t rounded(float x, const Int8Rounding& at) {
    float value = x * at.inverse;
    value = value != value ? 0 : value;
    value = value < at.low() ? at.low() : value > at.high() ? at.high() : value;
    return uint8_t(int32_t(nearbyintf(value)) + at.zero);
}

inline void round_plain(const Int8Pixels& of, const Int8Rounding& at) {
    for (int64_t p = 0; p < of.width; p++)
        for (int64_t c = 0; c < of.channels; c++)
            of.to[p * of.channels + c] = rounded(of.x[c * of.channel_step + p * of.pixel_step], at);
}

// float32 of a whole sum, each operation rounded by itself.
FX_INLINE float ended(const Int8Row& of, int64_t output, int32_t sum) {
    float y = float(sum + of.offset[output]) * of.scale[output];
    if (of.bias) y += of.bias[output];
    return of.relu && y < 0 ? 0 : y;
}

}  // namespace
}  // namespace fx
