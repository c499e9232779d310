// Convolutions of 8-bit weights on 8-bit inputs, float32 in and out: what their kernels share.
//
// An image is rounded once, with its padding around it, to bytes q = round(x / step) + zero, channels-last; step and
// zero belong to the layer, or to each image by what its numbers span. The window of an output is then a few runs of
// bytes that lie side by side (`segments`: the rows of the kernel, or its taps where it is dilated), which are read
// four bytes at a time: the weights of what is read beyond a run are zero.
#pragma once

#include "common.h"

namespace fx {

constexpr int64_t LANES16 = 16;  // outputs of a block: weights lie [output / 16][segment][dword][16][4]
constexpr int64_t SLACK = 64;    // bytes behind an image that may be read

// Outputs, filled up to whole blocks: sums of a pixel that wait for a pool.
static inline int64_t whole_lanes(int64_t outputs) { return ceil_div(outputs, LANES16) * LANES16; }

// float32 -> bytes; NaN is read as 0.
struct Int8Rounding {
    float inverse;  // 1 / step
    int32_t zero;   // the byte of 0
    float low() const { return float(-zero); }
    float high() const { return float(255 - zero); }
};

// Least and largest number of a part of an image, 0 among them; what is not finite counts as 0.
struct Int8Span {
    float low, high;
};

// One row of `width` pixels, from float32 whose channels and pixels are so many floats apart, to bytes side by side.
struct Int8Pixels {
    const float* x;
    int64_t channel_step, pixel_step, channels, width;
    uint8_t* to;
};

// What becomes of whole sums: y[o] = relu?(scale[o] (sum + offset[o]) + bias[o]).
struct Int8End {
    const int32_t* offset;  // what `zero` adds to a sum, with its sign changed; of all outputs
    const float *scale, *bias;
    bool relu;
};

// Outputs of `count` pixels beside each other.
struct Int8Row {
    const uint8_t* image;  // the window of the first pixel
    int64_t count, pixel_bytes;
    const int64_t* places;  // of the dwords of a window, in bytes from its first one on
    int64_t dwords;
    const int8_t* weights;
    Int8End end;
    int64_t outputs;
    float* y;       // of the first pixel; `outputs` floats for each
    int32_t* sums;  // if this is not null, whole sums are written here in the place of y, `lanes` for each pixel

    int64_t block_bytes() const { return dwords * LANES16 * 4; }
    int64_t lanes() const { return whole_lanes(outputs); }
};

// A max pool behind a layer takes the largest sums, before they are ended: the ends rise or fall with the sum. Where they
// fall, with a negative scale, all bits of the sums are turned before and after it (`flips` is -1, else 0): this turns
// their order.
//
// Largest sums of the windows along a row: (width, lanes) -> (out_width, lanes).
struct Int8Across {
    const int32_t* sums;
    int64_t width, lanes, kernel, stride, padding, out_width;
    int32_t* to;
};

// Largest of `width` times `lanes` sums in some rows, ended: y (width, outputs).
constexpr int64_t POOL_ROWS = 16;  // most of them
struct Int8Down {
    const int32_t* rows[POOL_ROWS];
    int64_t count;
    const int32_t* flips;
    int64_t width, lanes, outputs;
    Int8End end;
    float* y;
};

struct Int8Kernels {
    Int8Span (*span)(const float* x, int64_t count);
    void (*round)(const Int8Pixels& pixels, const Int8Rounding& rounding);
    void (*row)(const Int8Row& row);
    void (*across)(const Int8Across& pool);
    void (*down)(const Int8Down& pool);
};
extern const Int8Kernels int8_portable, int8_avx2, int8_avx512;

}  // namespace fx
