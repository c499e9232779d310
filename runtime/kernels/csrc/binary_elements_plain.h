// The loops of `BinaryElements` in plain C++, for the compiler to turn into vectors: included once per instruction set.
// Inputs may be outputs: no value is read after it is written.
#pragma once

#include "binary_elements.h"

#if defined(__clang__)
#define FX_LOOP _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define FX_LOOP _Pragma("GCC ivdep")
#else
#define FX_LOOP
#endif

namespace fx {
namespace {

// Rows of fewer than 64 channels are repeated up to this many values, so that vectors are full.
constexpr int64_t REPEATED = 128, FEW = 64;

// `rows` rows of `channels` values -> as many of `copies` times the channels, `REPEATED` apart.
void repeat(const float* from, int64_t rows, int64_t channels, int64_t copies, float* to) {
    for (int64_t row = 0; row < rows; row++)
        for (int64_t copy = 0; copy < copies; copy++)
            for (int64_t i = 0; i < channels; i++)
                to[row * REPEATED + copy * channels + i] = from[row * channels + i];
}

FX_INLINE void level_row(const float* x, int64_t count, const float* edges, int64_t step, uint8_t* y) {
    const float *a = edges, *b = edges + step, *c = edges + 2 * step, *sign = edges + 3 * step;
    FX_LOOP
    for (int64_t i = 0; i < count; i++) {
        const float value = x[i] * sign[i];
        y[i] = uint8_t((value > a[i] ? 1 : 0) + (value > b[i] ? 1 : 0) + (value > c[i] ? 1 : 0));
    }
}

void levels(const float* x, int64_t pixels, int64_t channels, const float* edges, uint8_t* y) {
    float wide[4 * REPEATED];
    int64_t copies = 1, step = channels;
    if (channels < FEW) {
        copies = least(REPEATED / channels, most(pixels, 1)), step = REPEATED;
        repeat(edges, 4, channels, copies, wide);
        edges = wide;
    }
    for (int64_t p = 0; p < pixels; p += copies)
        level_row(x + p * channels, least(copies, pixels - p) * channels, edges, step, y + p * channels);
}

FX_INLINE void affine_row(const float* x, int64_t count, const float* factor, const float* term, bool relu, float* y) {
    if (relu) {
        FX_LOOP
        for (int64_t i = 0; i < count; i++) {
            const float value = x[i] * factor[i] + term[i];
            y[i] = value < 0 ? 0 : value;
        }
        return;
    }
    FX_LOOP
    for (int64_t i = 0; i < count; i++) y[i] = x[i] * factor[i] + term[i];
}

void affine(const float* x, int64_t pixels, int64_t channels, const float* factors, bool relu, float* y) {
    float wide[2 * REPEATED];
    int64_t copies = 1, step = channels;
    if (channels < FEW) {
        copies = least(REPEATED / channels, most(pixels, 1)), step = REPEATED;
        repeat(factors, 2, channels, copies, wide);
        factors = wide;
    }
    for (int64_t p = 0; p < pixels; p += copies)
        affine_row(x + p * channels, least(copies, pixels - p) * channels, factors, factors + step, relu,
                   y + p * channels);
}

template <bool FIRST, bool LAST>
void add_all(const float* x, const float* y, int64_t count, float* z) {
    FX_LOOP
    for (int64_t i = 0; i < count; i++) {
        const float other = FIRST && y[i] < 0 ? 0 : y[i], sum = x[i] + other;
        z[i] = LAST && sum < 0 ? 0 : sum;
    }
}

void add(const float* x, const float* y, int64_t count, bool y_relu, bool relu, float* z) {
    if (y_relu) relu ? add_all<true, true>(x, y, count, z) : add_all<true, false>(x, y, count, z);
    else relu ? add_all<false, true>(x, y, count, z) : add_all<false, false>(x, y, count, z);
}

void relu_all(const float* x, int64_t count, float* y) {
    FX_LOOP
    for (int64_t i = 0; i < count; i++) y[i] = x[i] < 0 ? 0 : x[i];
}

void decode(const uint8_t* levels, int64_t count, float step, float* y) {
    FX_LOOP
    for (int64_t i = 0; i < count; i++) y[i] = float(levels[i]) * step;
}

struct MaxOf {
    template <class T>
    static FX_INLINE void take(const T* x, int64_t count, T* y) {
        FX_LOOP
        for (int64_t i = 0; i < count; i++) y[i] = x[i] > y[i] || x[i] != x[i] ? x[i] : y[i];  // NaN stays
    }
    static FX_INLINE void take(const uint8_t* x, int64_t count, uint8_t* y) {
        FX_LOOP
        for (int64_t i = 0; i < count; i++) y[i] = x[i] > y[i] ? x[i] : y[i];
    }
};

struct SumOf {
    static FX_INLINE void take(const float* x, int64_t count, float* y) {
        FX_LOOP
        for (int64_t i = 0; i < count; i++) y[i] += x[i];
    }
};

// Taps of a window that lie inside: first..last - 1.
FX_INLINE void inside(const BinaryPool& pool, int axis, int64_t start, int64_t size, int64_t* first, int64_t* last) {
    const int64_t step = pool.dilation[axis];
    *first = start < 0 ? ceil_div(-start, step) : 0;
    *last = start >= size ? 0 : least(pool.kernel[axis], ceil_div(size - start, step));
}

// Every window of a row: the first tap is copied, `Take` brings in the others; returns nothing where all are outside.
template <class Take, class T>
FX_INLINE int64_t window(const T* image, const BinaryPool& pool, int64_t row, int64_t column, T* to) {
    const int64_t top = row * pool.stride[0] - pool.padding[0], left = column * pool.stride[1] - pool.padding[1];
    int64_t y0, y1, x0, x1, taken = 0;
    inside(pool, 0, top, pool.height, &y0, &y1);
    inside(pool, 1, left, pool.width, &x0, &x1);
    for (int64_t ky = y0; ky < y1; ky++)
        for (int64_t kx = x0; kx < x1; kx++, taken++) {
            const int64_t at = (top + ky * pool.dilation[0]) * pool.width + left + kx * pool.dilation[1];
            const T* from = image + at * pool.channels;
            if (taken) {
                Take::take(from, pool.channels, to);
                continue;
            }
            FX_LOOP
            for (int64_t i = 0; i < pool.channels; i++) to[i] = from[i];
        }
    return taken;
}

template <class T>
FX_INLINE void max_row(const T* image, const BinaryPool& pool, int64_t row, T nothing, T* y) {
    for (int64_t x = 0; x < pool.out_width; x++, y += pool.channels)
        if (!window<MaxOf>(image, pool, row, x, y))
            for (int64_t i = 0; i < pool.channels; i++) y[i] = nothing;
}

void max_levels(const uint8_t* image, const BinaryPool& pool, int64_t row, uint8_t* y) {
    max_row<uint8_t>(image, pool, row, 0, y);
}

void max_floats(const float* image, const BinaryPool& pool, int64_t row, float* y) {
    max_row<float>(image, pool, row, -__builtin_huge_valf(), y);
}

void average(const float* image, const BinaryPool& pool, int64_t row, float* y) {
    for (int64_t x = 0; x < pool.out_width; x++, y += pool.channels) {
        const int64_t taken = window<SumOf>(image, pool, row, x, y);
        const float share = 1.0f / float(pool.count_padding ? pool.kernel[0] * pool.kernel[1] : most(taken, 1));
        FX_LOOP
        for (int64_t i = 0; i < pool.channels; i++) y[i] = taken ? y[i] * share : 0;
    }
}

void mean(const float* image, int64_t pixels, int64_t channels, float* y) {
    for (int64_t i = 0; i < channels; i++) y[i] = 0;
    for (int64_t p = 0; p < pixels; p++) SumOf::take(image + p * channels, channels, y);
    const float share = 1.0f / float(pixels);
    FX_LOOP
    for (int64_t i = 0; i < channels; i++) y[i] *= share;
}

void flatten(const float* image, int64_t pixels, int64_t channels, float* y) {
    for (int64_t p = 0; p < pixels; p++)
        for (int64_t c = 0; c < channels; c++) y[c * pixels + p] = image[p * channels + c];
}

constexpr BinaryElements PLAIN = {levels,     affine,     add,     relu_all, decode,
                                  max_levels, max_floats, average, mean,     flatten};

}  // namespace
}  // namespace fx
