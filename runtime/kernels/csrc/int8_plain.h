// The inner loops of int8.h in plain C++: the code to read first.
#pragma once

#include <cfloat>
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

inline Int8Span span_plain(const float* x, int64_t count) {
    constexpr int64_t SIDE = 32;  // by side, which compilers make vectors of
    float low[SIDE] = {}, high[SIDE] = {};
    for (int64_t i = 0; i < count; i += SIDE)
        for (int64_t j = 0; j < least(SIDE, count - i); j++) {
            const float value = fabsf(x[i + j]) <= FLT_MAX ? x[i + j] : 0;
            low[j] = value < low[j] ? value : low[j];
            high[j] = value > high[j] ? value : high[j];
        }
    for (int64_t j = 1; j < SIDE; j++) {
        low[0] = low[j] < low[0] ? low[j] : low[0];
        high[0] = high[j] > high[0] ? high[j] : high[0];
    }
    return {low[0], high[0]};
}

inline void round_plain(const Int8Pixels& of, const Int8Rounding& at) {
    for (int64_t p = 0; p < of.width; p++)
        for (int64_t c = 0; c < of.channels; c++)
            of.to[p * of.channels + c] = rounded(of.x[c * of.channel_step + p * of.pixel_step], at);
}

// float32 of a whole sum, each operation rounded by itself.
FX_INLINE float ended(const Int8End& at, int64_t output, int32_t sum) {
    float y = float(sum + at.offset[output]) * at.scale[output];
    if (at.bias) y += at.bias[output];
    return at.relu && y < 0 ? 0 : y;
}

FX_INLINE void finish(const Int8Row& of, int64_t pixel, int64_t output, int32_t sum) {
    if (of.sums) of.sums[pixel * of.lanes() + output] = sum;
    else of.y[pixel * of.outputs + output] = ended(of.end, output, sum);
}

inline void across_plain(const Int8Across& of) {
    for (int64_t x = 0; x < of.out_width; x++) {
        const int64_t left = x * of.stride - of.padding, end = least(left + of.kernel, of.width);
        for (int64_t o = 0; o < of.lanes; o++) {
            int32_t best = of.sums[most(left, 0) * of.lanes + o];
            for (int64_t tap = most(left, 0) + 1; tap < end; tap++)
                best = of.sums[tap * of.lanes + o] > best ? of.sums[tap * of.lanes + o] : best;
            of.to[x * of.lanes + o] = best;
        }
    }
}

inline void down_plain(const Int8Down& of) {
    for (int64_t x = 0; x < of.width; x++)
        for (int64_t o = 0; o < of.outputs; o++) {
            const int64_t at = x * of.lanes + o;
            int32_t best = of.rows[0][at];
            for (int64_t row = 1; row < of.count; row++) best = of.rows[row][at] > best ? of.rows[row][at] : best;
            of.y[x * of.outputs + o] = ended(of.end, o, best ^ of.flips[o]);
        }
}

}  // namespace
}  // namespace fx
