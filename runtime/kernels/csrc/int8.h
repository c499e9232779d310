// Convolutions of 8-bit weights on 8-bit inputs, float32 in and out: what their kernels share.
//
// An image is rounded once, with its padding around it, to bytes q = round(x / step) + zero, channels-last. The window of
// an output is then a few runs of bytes that lie side by side (`segments`: the rows of the kernel, or its taps where it is
// dilated), which are read four bytes at a time: the weights of what is read beyond a run are zero.
#pragma once

#include "common.h"

namespace fx {

constexpr int64_t LANES16 = 16;  // outputs of a block: weights lie [output / 16][segment][dword][16][4]
constexpr int64_t SLACK = 64;    // bytes behind an image that may be read

// float32 -> bytes; NaN is read as 0.
struct Int8Rounding {
    float inverse;  // 1 / step
    int32_t zero;   // the byte of 0
    float low() const { return float(-zero); }
    float high() const { return float(255 - zero); }
};

// One row of `width` pixels, from float32 whose channels and pixels are so many floats apart, to bytes side by side.
struct Int8Pixels {
    const float* x;
    int64_t channel_step, pixel_step, channels, width;
    uint8_t* to;
};

// Outputs of `count` pixels beside each other.
struct Int8Row {
    const uint8_t* image;  // the window of the first pixel
    int64_t count, pixel_bytes;
    const int64_t* places;  // of the segments, in bytes from the window on
    int64_t segments, dwords;
    const int8_t* weights;
    const int32_t* offset;  // what `zero` adds to a sum, to be added with its sign changed; of all outputs
    const float *scale, *bias;
    bool relu;
    int64_t outputs;
    float* y;  // of the first pixel; `outputs` floats for each

    int64_t block_bytes() const { return segments * dwords * LANES16 * 4; }
};

struct Int8Kernels {
    void (*round)(const Int8Pixels& pixels, const Int8Rounding& rounding);
    void (*row)(const Int8Row& row);
};
extern const Int8Kernels int8_portable, int8_avx2, int8_avx512;

}  // namespace fx
