// What a binarized network computes besides its layers, value by value: one table of functions per instruction set.
#pragma once

#include "common.h"

namespace fx {

// Windows of a pool over one image, channels-last.
struct BinaryPool {
    int64_t channels, height, width, out_width, kernel[2], stride[2], padding[2], dilation[2];
    bool count_padding;  // of averages: padded places count as zeros
};

struct BinaryElements {
    // Levels of `pixels` times `channels` values: `edges` (4, channels) holds three ascending edges and a sign; the
    // level of x is how many of the edges sign x exceeds. NaN is level 0.
    void (*levels)(const float* x, int64_t pixels, int64_t channels, const float* edges, uint8_t* y);
    // y = relu?(factors[0][c] x + factors[1][c]), rounded after each operation
    void (*affine)(const float* x, int64_t pixels, int64_t channels, const float* factors, bool relu, float* y);
    // z = relu?(x + relu?(y))
    void (*add)(const float* x, const float* y, int64_t count, bool y_relu, bool relu, float* z);
    void (*relu)(const float* x, int64_t count, float* y);
    void (*decode)(const uint8_t* levels, int64_t count, float step, float* y);
    // one row of output pixels
    void (*max_levels)(const uint8_t* image, const BinaryPool& pool, int64_t row, uint8_t* y);
    void (*max_floats)(const float* image, const BinaryPool& pool, int64_t row, float* y);
    void (*average)(const float* image, const BinaryPool& pool, int64_t row, float* y);
    // mean over all pixels of an image
    void (*mean)(const float* image, int64_t pixels, int64_t channels, float* y);
    // (pixels, channels) -> (channels, pixels)
    void (*flatten)(const float* image, int64_t pixels, int64_t channels, float* y);
};
extern const BinaryElements binary_elements_portable, binary_elements_avx2, binary_elements_avx512;

}  // namespace fx
